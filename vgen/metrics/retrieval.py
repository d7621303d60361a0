"""Finding what belongs together: recall of pictures by captions and of captions by pictures."""

import numpy as np
from jaxtyping import Float, Int


def recalls(
    similarity: Float[np.ndarray, "n m"],
    images: Int[np.ndarray, "n"],
    texts: Int[np.ndarray, "m"],
    at: tuple[int, ...] = (1, 5, 10),
) -> dict[str, float]:
    """{"caption_recall_K", "image_recall_K"}: share of the pictures with a caption of their own kind among the K most
    similar ones, and of the captions with a picture of theirs; K of `at`, those that are larger than the choice left
    out.

    similarity: of every picture (down) and caption (across).  images, texts: the kind of each; a picture and a caption
    of one kind belong together, so that two pictures with the same words are not told apart.
    Of equally similar ones those that come first are taken.  Raises ValueError for a kind that has no other side.
    """
    if missing := set(images.tolist()) ^ set(texts.tolist()):
        raise ValueError(f"recalls: kinds {sorted(missing)[:5]} are only pictures or only captions")
    scores = {}
    for name, table, own, other in (
        ("caption", similarity, images, texts),
        ("image", similarity.T, texts, images),
    ):
        order = np.argsort(-table, axis=1, kind="stable")
        hit = other[order] == own[:, None]
        scores |= {f"{name}_recall_{k}": float(hit[:, :k].any(1).mean()) for k in at if k <= table.shape[1]}
    return scores
