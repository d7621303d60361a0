"""The PatchGAN discriminator and the adversarial losses that train a tokenizer against it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.layers.conv import BatchNorm, GroupNorm
from vgen.sharding import constrain

normal_init = nn.initializers.normal(0.02)  # as in pix2pix


def _scale_init(key, shape):
    return 1 + normal_init(key, shape)


class Discriminated(NamedTuple):
    """logits: [b, h, w, 1], one per patch, high for real. updates: {"norm_1/mean": [c], ...} new running statistics."""

    logits: Array
    updates: Mapping[str, Array]


class NLayerDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) as in taming: 4x4 convolutions and leaky ReLU, classifying overlapping patches.

    channels: width of the first layer, doubled up to eight times. layers: convolutions of stride 2; the receptive field
      is 70 pixels for 3, 34 for 2, 16 for 1, so 2 suits 32-pixel images.
    norm: "batch" (published), "group", or "none" (then these convolutions have a bias; use it with `r1_penalty`).

    Parameters: conv_0 ... conv_{layers + 1}, norm_1 ... norm_layers. Raises ValueError on another norm.
    """

    channels: int = 64
    layers: int = 3
    norm: str = "batch"
    groups: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], train: bool = True) -> Discriminated:
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"NLayerDiscriminator norm: got {self.norm!r}, accepted: 'batch', 'group', 'none'")

        def conv(i, channels, stride, bias):
            layer = nn.Conv(
                channels, (4, 4), stride, padding=1, use_bias=bias, kernel_init=normal_init, dtype=self.dtype,
                name=f"conv_{i}",
            )  # fmt: skip
            return lambda x: constrain(layer(x))

        updates = {}
        x = nn.leaky_relu(conv(0, self.channels, 2, True)(images), 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = conv(i, self.channels * min(2**i, 8), stride, self.norm == "none")(x)
            if self.norm == "batch":
                x, new = BatchNorm(scale_init=_scale_init, dtype=self.dtype, name=f"norm_{i}")(x, train)
                updates |= {f"norm_{i}/{k}": v for k, v in new.items()}
            elif self.norm == "group":
                x = GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return Discriminated(conv(self.layers + 1, 1, 1, True)(x), updates)


def hinge_d(real: Float[Array, "*b"], fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Discriminator's hinge loss (Lim & Ye 2017), halved as in taming."""
    return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())


def hinge_g(fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Generator's side of the hinge loss: minus the mean logit."""
    return -fake.mean()


def vanilla_d(real: Float[Array, "*b"], fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Discriminator's cross-entropy, halved as in taming, which pairs it with `hinge_g`."""
    return 0.5 * nonsaturating_d(real, fake)


def nonsaturating_d(real: Float[Array, "*b"], fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Discriminator's cross-entropy -log D(real) - log(1 - D(fake)) (Goodfellow et al. 2014, eq. 1)."""
    return nn.softplus(-real).mean() + nn.softplus(fake).mean()


def nonsaturating_g(fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Generator's -log D(fake) (Goodfellow et al. 2014, section 3)."""
    return nn.softplus(-fake).mean()


def adaptive_weight(
    rec_grad: Any, gan_grad: Any, *, delta: float = 1e-4, max: float = 1e4, scale: float = 0.8
) -> Float[Array, ""]:
    """Weight of the generator's GAN loss: |grad rec| / (|grad gan| + delta), at most `max`, times `scale`.

    rec_grad, gan_grad: gradients of either loss with respect to the decoder's last layer (an array or a tree).
    Taming, eq. 7, whose delta is 1e-6; its code has 1e-4 and the factor 0.8. Carries no gradient.
    """

    def norm(tree):
        return jnp.sqrt(sum(jnp.square(g.astype(jnp.promote_types(g.dtype, jnp.float32))).sum()
                            for g in jax.tree.leaves(tree)))  # fmt: skip

    weight = norm(rec_grad) / (norm(gan_grad) + delta)
    return jax.lax.stop_gradient(jnp.clip(weight, 0, max) * scale)


def r1_penalty(
    score: Callable[[Float[Array, "b h w c"]], Float[Array, "b *rest"]], images: Float[Array, "b h w c"]
) -> Float[Array, ""]:
    """Mean over the batch of |d score / d image|^2 at real images (Mescheder et al. 2018, eq. 9, without gamma / 2).

    score: images to logits, each image's from itself alone (so no batch normalisation); logits of patches are summed.
    """
    grads = jax.grad(lambda x: score(x).sum())(images)
    return jnp.square(grads).reshape(len(images), -1).sum(-1).mean()
