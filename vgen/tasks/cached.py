"""Training on features: what frozen encoders say of pictures and texts, computed once (see `vgen.data.features`).

The kinds are "latents" (latent_mean, latent_std: the autoencoder's Gaussian, so that training draws from it as before)
and "text" (context, and what else the text encoder gives: context_mask, pooled).  The encoder of a kind that a batch
holds need not be in memory.  What stands for no text is a frozen parameter then, `empty`.

feature_parts, features and empty_features are methods of a task with vae, text_encoder, train_text, pixels, null_text
and empty_text, such as `vgen.tasks.diffuse.Diffuse`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vgen.types import Batch, Params

KINDS = {"latents": "vae", "text": "text_encoder"}  # and the part that computes them
LATENTS = ("latent_mean", "latent_std")
TEXT = ("context", "context_mask", "pooled")


def feature_parts(task, kinds: tuple[str, ...]) -> list[str]:
    """The parts of the parameters that compute these kinds of features.

    Raises ValueError for no or another kind, a part that the task has not, and a text encoder that is trained along.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"features must be some of {', '.join(KINDS)}, got {tuple(kinds)}")
    for kind in kinds:
        if getattr(task, KINDS[kind]) is None:
            raise ValueError(f"features {kind!r} need a {KINDS[kind]}, which the task has not")
    if "text" in kinds and task.train_text:
        raise ValueError("features 'text' cannot be computed once: the text_encoder is trained along")
    return [KINDS[kind] for kind in kinds]


def features(task, params: Params, batch: Batch, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What `losses` and `evaluate` take in the place of image, and of text and text_mask."""
    out = {}
    if "latents" in kinds:
        x = task.pixels(batch["image"], "target" in batch)
        posterior = task.vae.apply({"params": params["vae"]}, x, method="encode")
        out |= {"latent_mean": posterior.mean, "latent_std": jnp.exp(posterior.logvar / 2)}
    if "text" in kinds:
        said = task.text_encoder.apply({"params": params["text_encoder"]}, batch["text"], batch["text_mask"])
        out |= named(said, batch["text_mask"])
    return out


def empty_features(task, params: Params, length: int) -> dict[str, Any]:
    """{name: array} of the empty text in `length` tokens, the parameters `empty`; {} where nothing reads them."""
    if not task.null_text:
        return {}
    nothing = task.empty_text(jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool), jnp.zeros(1, bool))
    said = features(task, params, dict(zip(("text", "text_mask"), nothing)), ("text",))
    return {name: x[0] for name, x in said.items()}


def named(out, mask) -> dict[str, Any]:
    """What a text encoder returned, under the names that networks know."""
    if isinstance(out, Mapping):
        return dict(out)
    if isinstance(out, tuple):
        return {"context": out[0], "context_mask": out[1]}
    return {"context": out, "context_mask": mask}


def latents(batch: Batch, key=None) -> Float[Array, "b h w d"]:
    """A draw from the latents of a batch, the one that Gaussian.sample makes with this key; without one the mean."""
    mean, std = (jnp.asarray(batch[name], jnp.promote_types(batch[name].dtype, jnp.float32)) for name in LATENTS)
    return mean if key is None else mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def text(batch: Batch) -> dict[str, Array]:
    """What the text encoder said, numbers in float32 or wider."""
    said = {name: jnp.asarray(batch[name]) for name in TEXT if name in batch}
    wide = lambda x: x if x.dtype == bool else x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return {name: wide(x) for name, x in said.items()}


def dropped(said: Mapping[str, Array], empty: Params, keep) -> dict[str, Array]:
    """`text` with `empty` {name: one text's} in the place of those that are not kept."""
    spread = lambda x: keep.reshape(-1, *(1,) * (x.ndim - 1))
    return {name: jnp.where(spread(x), x, empty[name].astype(x.dtype)) for name, x in said.items()}
