"""Train an image tower and a text tower so that pictures find their captions and captions their pictures.

Sources: Radford et al. 2021 (CLIP, arXiv:2103.00020), section 2.3 and figure 3; Li et al. 2022 (FLIP,
arXiv:2212.00794), section 3, for patches that are left out.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgen.data import images as image_ops
from vgen.data.preprocess import CLIP as CLIP_PREPROCESS
from vgen.hosts import whole
from vgen.metrics import retrieval
from vgen.models.clip import CLIP, unit
from vgen.models.mae import random_masking
from vgen.types import Batch, Context, Loss, Params

LOG_TOP = math.log(100.0)


@jax.custom_vjp
def clipped(x, low, high):
    """x held to [low, high], as if it were put back there behind every step: outside, only the gradients that lead back
    inside go through, so that it does not stay out for good.
    """
    return jnp.clip(x, low, high)


def _clipped_backward(kept, g):
    x, low, high = kept
    outward = ((x >= high) & (g < 0)) | ((x <= low) & (g > 0))  # a step goes against the gradient
    return jnp.where(outward, 0, g), None, None


clipped.defvjp(lambda x, low, high: (jnp.clip(x, low, high), (x, low, high)), _clipped_backward)


def info_nce(logits: Float[Array, "n n"]) -> Float[Array, ""]:
    """Mean over pictures and captions of the cross-entropy of the right one among all n of the other kind, in nats.

    logits: cosines times the temperature's inverse, pictures down, their captions across.  On a mesh they are of the
    global batch: whatever is sharded is gathered, and the gradient is that of one device.
    """
    right = jnp.diagonal(logits)
    each = [right - jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0)]
    return -(each[0].mean() + each[1].mean()) / 2


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Pictures and captions to unit vectors; a pair's cosine is to be the largest of the whole batch (InfoNCE).

    network: a CLIP.  size: pixels of its pictures.
    mask_ratio: share of the patches left out in training, other ones for each picture (FLIP; 0: CLIP); evaluation sees
      all of them.  text_padding: whether the text tower is told which tokens are padding (FLIP; CLIP's is not).
    low: least log of the factor on cosines; the largest is log 100.
    mean, std: of the pictures' channels in [0, 1], which the network gets normalised.

    Parameters: network.  Raises ValueError for a share that leaves no patch.
    """

    network: CLIP
    size: int
    mask_ratio: float = 0.0
    text_padding: bool = False
    low: float = -math.inf
    mean: tuple[float, float, float] = CLIP_PREPROCESS.mean
    std: tuple[float, float, float] = CLIP_PREPROCESS.std

    groups = {"main": r"network/.*"}
    buffers = ""

    def __post_init__(self):
        if not 0 <= self.mask_ratio < 1 or (self.mask_ratio and not self._kept()):
            raise ValueError(
                f"Contrastive: mask_ratio must be in [0, 1) and leave a patch, got {self.mask_ratio} of "
                f"{self._patches() if self.mask_ratio else 'all'} patches"
            )

    def _patches(self) -> int:
        vit = getattr(self.network.visual, "vit", None)
        if vit is None:
            raise ValueError("Contrastive: mask_ratio needs a ViT; a ResNet has no patches to leave out")
        return (self.size // vit.patch[0]) * (self.size // vit.patch[1])

    def _kept(self) -> int:
        return int(self._patches() * (1 - self.mask_ratio))

    def pixels(self, image) -> Float[Array, "b h w 3"]:
        """uint8 pictures as the network takes them."""
        return image_ops.standardise(image, self.mean, self.std)

    def init(self, key, batch: Batch) -> Params:
        variables = self.network.init(key, self.pixels(batch["image"][:1]), batch["text"][:1])
        return {"network": variables["params"]}

    def encode_image(self, params: Params, image, **kwargs) -> Float[Array, "b d"]:
        """Unit vectors of uint8 pictures [b, size, size, 3]; kwargs: of the tower."""
        return unit(self._apply(params, self.pixels(image), method="encode_image", **kwargs).features)

    def encode_text(self, params: Params, text, text_mask=None, **kwargs) -> Float[Array, "t d"]:
        """Unit vectors of tokens int [t, n]; text_mask: bool [t, n], False for padding."""
        mask = text_mask if self.text_padding else None
        return unit(self._apply(params, text, mask, method="encode_text", **kwargs).features)

    def score(self, params: Params, conds: Mapping[str, Any]) -> Float[Array, "b"]:
        """Cosines of conds["image_out"], uint8 [b, h, w, 3] of any size, with conds["text"]."""
        image = self.encode_image(params, image_ops.resized(conds["image_out"], self.size))
        return jnp.sum(image * self.encode_text(params, conds["text"], conds["text_mask"]), -1)

    def _apply(self, params, *args, **kwargs):
        return self.network.apply({"params": params["network"]}, *args, **kwargs)

    def scale(self, params: Params) -> Float[Array, ""]:
        """The factor on cosines, at most 100."""
        return jnp.exp(clipped(params["network"]["logit_scale"], self.low, LOG_TOP))

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: InfoNCE over the batch; metrics: the factor on cosines, and how often the right picture and the
        right caption are the nearest of the batch.
        """
        mask_key, dropout_key = jax.random.split(key)
        kwargs = dict(train=True, rngs={"dropout": dropout_key}) if ctx.train else {}
        kept = {}
        if self.mask_ratio and ctx.train:
            noise = jax.random.uniform(mask_key, (len(batch["image"]), self._patches()))
            kept = {"keep": random_masking(noise, self.mask_ratio).keep}
        image = self.encode_image(params, batch["image"], **kept, **(kwargs if self._has_dropout() else {}))
        text = self.encode_text(params, batch["text"], batch["text_mask"], **kwargs)
        return {"main": self.match(params, image, text)}

    def match(self, params: Params, image: Float[Array, "b d"], text: Float[Array, "b d"]) -> Loss:
        """InfoNCE of unit vectors, with the metrics of `losses`."""
        scale = self.scale(params)
        logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.promote_types(image.dtype, jnp.float32))
        truth = jnp.arange(len(logits))
        found = {
            "scale": scale,
            "caption_accuracy": (logits.argmax(1) == truth).mean(),
            "image_accuracy": (logits.argmax(0) == truth).mean(),
        }
        return Loss(info_nce(logits), found)

    def _has_dropout(self) -> bool:
        return hasattr(self.network.visual, "vit")

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Retrieval among all pictures and captions that are given: see `metrics.retrieval.recalls`."""
        run = jax.jit(
            lambda params, batch: (
                self.encode_image(params, batch["image"]),
                self.encode_text(params, batch["text"], batch["text_mask"]),
            )
        )
        rows: list[Any] = []
        texts = []
        for batch in batches:
            rows.append(run(params, {name: batch[name] for name in ("image", "text", "text_mask")}))
            texts.append(whole(batch["text"]))
        if not rows:
            raise ValueError("Contrastive.evaluate: no batches; the evaluation data is empty")
        image, text = (np.concatenate([whole(row[i]).astype(np.float32) for row in rows]) for i in (0, 1))
        _, same = np.unique(np.concatenate(texts), axis=0, return_inverse=True)
        return retrieval.recalls(image @ text.T, same.reshape(-1), same.reshape(-1))
