"""Train an encoder by what it can tell of pictures' hidden patches (He et al. 2021, MAE, arXiv:2111.06377)."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgen.data import images as image_ops
from vgen.data.preprocess import IMAGENET
from vgen.hosts import whole
from vgen.layers.conv import depth_to_space, space_to_depth
from vgen.models.mae import MAE
from vgen.types import Batch, Context, Loss, Params


@dataclasses.dataclass(frozen=True)
class MaskedImage:
    """Pixels of the hidden patches from those that are seen; the loss is the network's own.

    network: an MAE.  mean, std: of the pictures' channels in [0, 1], which the network gets normalised.

    Parameters: network, of which a ViT takes "network/encoder".
    """

    network: MAE
    mean: tuple[float, float, float] = IMAGENET["mean"]
    std: tuple[float, float, float] = IMAGENET["std"]

    groups = {"main": r"network/.*"}
    buffers = ""

    def pixels(self, image) -> Float[Array, "b h w 3"]:
        """uint8 pictures as the network takes them."""
        return image_ops.standardise(image, self.mean, self.std)

    def init(self, key, batch: Batch) -> Params:
        keys = dict(zip(("params", "mask"), jax.random.split(key)))
        return {"network": self.network.init(keys, self.pixels(batch["image"][:1]))["params"]}

    def features_of(self, params: Params, image) -> Float[Array, "b d"]:
        """Mean of the patches' tokens of uint8 pictures, of which nothing is hidden."""
        out = self.network.apply({"params": params["network"]}, self.pixels(image), method="encode")
        return out.tokens[:, 1:].mean(1)

    def _reconstruct(self, params, image, key, train=False):
        keys = dict(zip(("mask", "dropout"), jax.random.split(key)))
        return self.network.apply({"params": params["network"]}, self.pixels(image), train=train, rngs=keys)

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: mean squared error of the hidden patches, each normalised where the network says so."""
        return {"main": Loss(self._reconstruct(params, batch["image"], key, ctx.train).loss, {})}

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """The loss on held-out pictures, the same patches hidden in every call."""
        run = jax.jit(lambda params, image, key: self._reconstruct(params, image, key).loss)
        rows = [run(params, batch["image"], jax.random.fold_in(key, i)) for i, batch in enumerate(batches)]
        if not rows:
            raise ValueError("MaskedImage.evaluate: no batches; the evaluation data is empty")
        return {"loss": float(np.mean(rows))}

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"reconstructions"}: for eight pictures what is seen, what is made of it, and the whole, side by side.

        Where the network's patches are normalised, a hidden patch gets the mean and the deviation of the true one, as
        in the paper's figures; seen patches are shown as they are.
        """
        pictures = jax.jit(self.reconstructions)(params, batch["image"][:8], key)
        return {"reconstructions": image_ops.grid(whole(pictures).reshape(-1, *pictures.shape[2:]), columns=6)}

    def reconstructions(self, params: Params, image, key):
        """uint8 [b, 3, h, w, 3] of uint8 pictures: with the hidden patches grey, with them reconstructed, and whole."""
        out, side = self._reconstruct(params, image, key), self.network.patch_size
        x = self.pixels(image)
        true = space_to_depth(x, side)  # [b, rows, columns, pixels]
        made = out.pred.reshape(true.shape)
        if self.network.norm_pix:
            deviation = jnp.sqrt(true.var(-1, ddof=1, keepdims=True) + 1e-6)
            made = made * deviation + true.mean(-1, keepdims=True)
        hidden = out.mask.reshape(*true.shape[:3], 1) > 0
        views = [jnp.where(hidden, 0, true), jnp.where(hidden, made, true), true]
        views = jnp.stack([depth_to_space(view, side) for view in views], 1)
        return image_ops.unstandardise(views, self.mean, self.std)
