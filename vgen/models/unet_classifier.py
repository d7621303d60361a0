"""ADM's classifier of noisy pictures, which guides sampling (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from vgen.models.clip_resnet import AttentionPool
from vgen.models.unet import Encoder
from vgen.models.unet_blocks import Given

_ADM = dict(in_channels=3, injection="scale_shift", resample="resblock", head_dim=64)
ADM_64 = dict(_ADM, widths=(128, 256, 384, 512), blocks=4, attention=(0, 1, 1, 1), image_size=64)
ADM_128 = dict(_ADM, widths=(128, 128, 256, 384, 512), attention=(0, 0, 1, 1, 1), image_size=128)
ADM_256 = dict(_ADM, widths=(128, 128, 256, 256, 512, 512), attention=(0, 0, 0, 1, 1, 1), image_size=256)
ADM_512 = dict(_ADM, widths=(64, 128, 128, 256, 256, 512, 512), attention=(0, 0, 0, 0, 1, 1, 1), image_size=512)
ADM_512 |= dict(time_width=128)


class NoisedClassifier(Encoder, kw_only=True):
    """A noisy picture and its time to the logits of its class: a U-Net's encoder and CLIP's attention pooling.

    image_size: pixels along each side.  outputs: number of classes.  The rest: see `vgen.models.unet.UNet`; head_dim is
    needed.
    Parameters: time, conv_in, down_i, mid, norm_out, pool {positions, attn}.
    """

    image_size: int = 64
    outputs: int = 1000

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Num[Array, "*b"],
        *,
        train: bool = False,
        control: Any = None,
        step: Any = None,
    ) -> Float[Array, "b outputs"]:
        """x, t, train, control, step: as of `UNet`.  Returns float32, or wider as x.

        Raises ValueError for pictures of another size, which the pool's positions do not fit.
        """
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"NoisedClassifier: x must be {self.image_size} pixels high and wide, got {x.shape}")
        self.check(x, None, None, None)
        given = Given(self.embed(x, t, None, None), control=control, step=step, train=train)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x = self.head(self.down(x, given)[0])
        heads = self.widths[-1] // self.head_dim
        return AttentionPool(heads, self.outputs, dtype=self.dtype, name="pool")(x).astype(wide)
