"""How well a promptable network segments: mean IoU after simulated clicks and boxes, and recall of automatic masks."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, UInt8

from vgen import trees
from vgen.automatic_masks import Automatic, generate
from vgen.data.scene_text import Claims, Thing, write
from vgen.data.scenes import Scenes, World, scene
from vgen.hosts import whole
from vgen.models import sam_prompt

COLOURS = np.array([(230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 200, 25), (145, 30, 180), (70, 240, 240)])


def clicked(task, params, embedding, truth, clicks: int):
    """([masks bool [b, n, size, size] after 1, 2, ... `clicks` clicks], the three answers to the first one).

    The first click is on the pixel farthest from the object's border, and of the three masks that is taken which the
    network likes best; each further one in the middle of the larger region of what is wrong, with the logits of the
    last mask fed back (`sam_prompt.correction`).  Nothing is clicked where nothing is wrong.
    truth: bool [b, n, size, size].  task: has `decode` as `vgen.tasks.segment.Segment`.
    """
    size, yes = truth.shape[-1], jnp.ones(truth.shape[:2], bool)
    prompt = sam_prompt.with_click(sam_prompt.no_prompt(yes.shape, clicks), sam_prompt.deepest_place(truth)[0], yes)
    out = task.decode(params, embedding, prompt)
    answers, logits = sam_prompt.full_size(out.logits, size) > 0, _liked(out)
    found = [sam_prompt.full_size(logits, size) > 0]
    for _ in range(clicks - 1):
        xy, inside, wrong = sam_prompt.correction(truth, found[-1])
        prompt = sam_prompt.with_click(prompt, xy, inside, wrong)
        logits = task.decode(params, embedding, prompt, logits, multimask=False).logits[:, :, 0]
        found.append(sam_prompt.full_size(logits, size) > 0)
    return found, answers


def _liked(out):
    """Logits [b, n, y, x] of the answer that the network likes best."""
    return jnp.take_along_axis(out.logits, out.iou.argmax(2)[:, :, None, None, None], 2)[:, :, 0]


@functools.partial(jax.jit, static_argnums=0)
def interactive(task, params, image, masks) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(IoU float32 [b, n] of each object of uint8 pictures [b, size, size, 3] by prompt, and "valid", where there is
    one; masks bool [b, n, size, size] by prompt).

    masks: bool [b, n, size, size], empty ones for none.
    one, three: after as many clicks (`clicked`); best: of the answers to the first click the one that fits best (the
    paper's "oracle").  box: the object's box alone, of three masks the one liked best.
    task: has `encode` and `decode` as `vgen.tasks.segment.Segment`.
    """
    truth, size = jnp.asarray(masks, bool), image.shape[1]
    embedding = task.encode(params, image)
    after, answers = clicked(task, params, embedding, truth, 3)
    box = sam_prompt.with_boxes(sam_prompt.no_prompt(truth.shape[:2], 3), sam_prompt.boxes_of(truth))
    boxed = sam_prompt.full_size(_liked(task.decode(params, embedding, box)), size) > 0
    found = {"one": after[0], "three": after[2], "box": boxed}
    scores = {name: sam_prompt.iou(mask, truth) for name, mask in found.items()}
    best = sam_prompt.iou(answers, truth[:, :, None]).max(2)
    return scores | {"best": best, "valid": truth.any((-2, -1))}, found


def means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean IoU of all objects of what `interactive` gives: iou_one_click, iou_three_clicks, iou_box, iou_best_of_three.

    Raises ValueError where there is no object at all.
    """
    rows = [{name: whole(value) for name, value in row.items()} for row in rows]
    valid = np.concatenate([row["valid"].ravel() for row in rows])
    if not valid.any():
        raise ValueError("segment_eval: no picture has a mask; open the data with masks")
    names = dict(one="iou_one_click", three="iou_three_clicks", box="iou_box", best="iou_best_of_three")
    return {
        said: float(np.concatenate([row[name].ravel() for row in rows])[valid].mean()) for name, said in names.items()
    }


def painted(
    images: UInt8[np.ndarray, "b h w 3"], masks: Bool[np.ndarray, "b n h w"], strength: float = 0.6
) -> UInt8[np.ndarray, "b h w 3"]:
    """Pictures with each of their masks in a colour of its own."""
    out = np.array(images, np.float32)
    for i in range(masks.shape[1]):
        blend = (1 - strength) * out + strength * COLOURS[i % len(COLOURS)]
        out = np.where(np.asarray(masks)[:, i, ..., None], blend, out)
    return np.rint(out).astype(np.uint8)


def matched(truth: Bool[np.ndarray, "n h w"], found: Bool[np.ndarray, "m h w"], threshold: float = 0.75):
    """(how many of the true masks some found one agrees with, how many of the found ones some true one does): IoU of at
    least `threshold`; above a half a mask agrees with one of a set that does not overlap at most.
    """
    a, b = (x.reshape(len(x), x.shape[1] * x.shape[2]).astype(np.float32) for x in (truth, found))
    both = a @ b.T
    agree = both >= threshold * np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1)
    return int(agree.any(1).sum()), int(agree.any(0).sum())


@functools.partial(jax.jit, static_argnums=0)
def by_words(task, params, image, masks, words) -> jax.Array:
    """IoU float32 [b, n, n] of objects (down) by the mask found for words (across), of three the one liked best.

    image: uint8 [b, size, size, 3].  masks: bool [b, n, size, size].  words: unit vectors [b, n, d].
    """
    embedding, truth = task.encode(params, image), jnp.asarray(masks, bool)
    out = task.decode(params, embedding, sam_prompt.no_prompt(truth.shape[:2], 0), text=words)
    found = sam_prompt.full_size(_liked(out), image.shape[1]) > 0
    return sam_prompt.iou(truth[:, :, None], found[:, None])


@dataclasses.dataclass(frozen=True)
class SegmentQuality:
    """Scores {"interactive", "automatic_masks"} of a trained `vgen.tasks.segment.Segment` on held-out scenes.

    interactive: see `means`.  automatic_masks: recall, the share of objects that some automatic mask agrees with at an
    IoU of at least `threshold`; precision, the share of masks that agree with an object; masks and objects per picture.
    world: arguments of World; the scenes have the seed `scene_seed`.  pictures: looked at by clicks; some: of them,
    those masked automatically.
    texts: also "text", of a network that is told words by a CLIP: mean IoU of objects by "a red circle" alone, among
    those of which there is one such in a picture of several, and of the same by the words for another object there.
    automatic: arguments of `vgen.automatic_masks.Automatic`.
    """

    world: dict[str, Any]
    pictures: int = 256
    some: int = 64
    batch: int = 16
    automatic: dict[str, Any] = dataclasses.field(default_factory=dict)
    threshold: float = 0.75
    scene_seed: int = 1
    split: str = "heldout"
    stage: str = "sam"
    texts: bool = False

    def __post_init__(self):
        Automatic(**self.automatic)  # or ValueError
        if not 1 <= self.some <= self.pictures:
            raise ValueError(f"SegmentQuality: some must be 1 to pictures={self.pictures}, got {self.some}")

    def __call__(self, run) -> dict[str, Any]:
        task, params = run.task(self.stage), trees.unflatten(run.weights(self.stage)[0])
        world = World(**self.world | {"seed": self.scene_seed})
        source = Scenes(task.size, self.split, self.pictures, world, masks=True)
        examples = [source[i] for i in range(self.pictures)]
        rows = []
        for start in range(0, self.pictures, self.batch):
            chosen = [examples[i] for i in range(start, min(start + self.batch, self.pictures))]
            new = len(chosen)
            chosen += chosen[-1:] * (self.batch - new)  # one shape for every call
            row, _ = interactive(
                task, params, *(np.stack([each[key] for each in chosen]) for key in ("image", "masks"))
            )
            rows.append({name: whole(value)[:new] for name, value in row.items()})
        scores = {"interactive": means(rows), "automatic_masks": self._automatic(task, params, examples[: self.some])}
        if self.texts:
            scores["text"] = self._texts(task, params, source, run.text_tokenizer())
        protocol = {
            "pictures": self.pictures, "some": self.some, "scene_seed": self.scene_seed, "split": self.split,
            "threshold": self.threshold, "automatic": dataclasses.asdict(Automatic(**self.automatic)),
        }  # fmt: skip
        return {"protocol": protocol, "scores": scores}

    def _texts(self, task, params, source: Scenes, tokenizer) -> dict[str, float]:
        encode, right, other = jax.jit(task.words_of), [], []
        for i in range(self.pictures):
            example, things = source[i], scene(source.world, i, task.size, self.split)["objects"]
            told = [write(Claims((Thing(thing.colour, thing.shape),))) for thing in things]
            room = source.world.max_objects - len(told)
            words = encode(params, *tokenizer([*told, *told[-1:] * room]))
            scores = whole(by_words(task, params, example["image"][None], example["masks"][None], words[None]))[0]
            for j, text in enumerate(told):
                if len(told) > 1 and told.count(text) == 1:
                    right.append(scores[j, j])
                    other.append(scores[j, (j + 1) % len(told)])
        if not right:
            raise ValueError(
                f"SegmentQuality: texts need several objects in a picture, and none of {self.pictures} has them"
            )
        return {
            "iou": float(np.mean(right)), "iou_by_the_words_for_another": float(np.mean(other)), "objects": len(right)
        }  # fmt: skip

    def _automatic(self, task, params, examples) -> dict[str, float]:
        network, settings = task.predictor(params), Automatic(**self.automatic)
        counts = np.zeros(4)
        for each in examples:
            true = each["masks"][each["masks"].any((1, 2))]
            found = generate(network, each["image"], settings)
            masks = np.stack([mask.segmentation for mask in found]) if found else np.zeros((0, *true.shape[1:]), bool)
            counts += (*matched(true, masks, self.threshold), len(true), len(masks))
        hit, right, true, made = counts.tolist()
        return {
            "recall": hit / max(true, 1), "precision": right / max(made, 1), "masks_per_picture": made / len(examples),
            "objects_per_picture": true / len(examples),
        }  # fmt: skip
