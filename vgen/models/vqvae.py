"""VQ-VAE: a convolutional autoencoder whose latents are the codes of a learned codebook.

Source: van den Oord, Vinyals, Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937, section
4.1: strided convolutions of 4x4 and residual blocks of ReLU, 3x3, ReLU, 1x1, all 256 wide, and their mirror image. What
the paper leaves open follows DeepMind's example (google-deepmind/sonnet, examples/vqvae_example.ipynb).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vgen.layers.conv import BatchNorm
from vgen.layers.quantize import VectorQuantizer
from vgen.models.vqgan import Tokenizer
from vgen.sharding import constrain

LAYOUTS = ("paper", "sonnet", "batch_norm")
SONNET = dict(channels=128, hidden=32, code_dim=64, num_codes=512, layout="sonnet")  # of DeepMind's example
RITHESH = dict(channels=256, num_codes=512, layout="batch_norm")  # of ritheshkumar95/pytorch-vqvae


class _Half(nn.Module):
    """Fields that encoder and decoder share; see VQVAE for their meaning."""

    channels: int = 256
    hidden: int | None = None
    blocks: int = 2
    levels: int = 2
    code_dim: int | None = None
    layout: str = "paper"
    image_channels: int = 3
    dtype: Any = None

    def width(self, level: int) -> int:
        """Channels behind the encoder's strided convolution `level`, counted from the image."""
        if self.layout not in LAYOUTS:
            raise ValueError(f"VQVAE layout: got {self.layout!r}, accepted: {', '.join(map(repr, LAYOUTS))}")
        narrower = self.levels - 1 - level if self.layout == "sonnet" else 0
        return self.channels >> narrower

    def conv(self, x, channels, size, name):
        return constrain(nn.Conv(channels, (size, size), dtype=self.dtype, name=name)(x))

    def norm(self, x, name):
        """Normalised by running statistics, in the layout that has them."""
        return BatchNorm(dtype=self.dtype, name=name)(x, False)[0] if self.layout == "batch_norm" else x

    def residual(self, x):
        """All residual blocks: ReLU, 3x3, ReLU, 1x1."""
        for i in range(self.blocks):
            name, h = f"block_{i}", nn.relu(x)
            # QUIRK: pytorch-vqvae rectifies in place (modules.py, ResBlock), and so what it adds to is the rectified
            # input. Tested in vqvae_test.py.
            x = h if self.layout == "batch_norm" else x
            h = self.conv(h, self.hidden or self.channels, 3, f"{name}_conv1")
            h = self.conv(nn.relu(self.norm(h, f"{name}_norm1")), self.channels, 1, f"{name}_conv2")
            x = x + self.norm(h, f"{name}_norm2")
        return x


class Encoder(_Half):
    """Images [b, h, w, 3] in [-1, 1] to latents [b, h / 2^levels, w / 2^levels, code_dim or channels].

    Parameters: down_i, down_norm_i (layout "batch_norm", all but the last), conv_mid (layout "sonnet"),
    block_i_{conv1,conv2} (norm1, norm2), conv_out (with code_dim).
    Raises ValueError if h or w is no multiple of 2^levels, or for an unknown layout.
    """

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        factor = 2**self.levels
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(
                f"Encoder: height and width of images {images.shape} must be multiples of {factor}; resize or crop them"
            )
        x = images
        for i in range(self.levels):
            x = constrain(nn.Conv(self.width(i), (4, 4), 2, padding=1, dtype=self.dtype, name=f"down_{i}")(x))
            if i + 1 < self.levels:
                x = nn.relu(self.norm(x, f"down_norm_{i}"))
        if self.layout == "sonnet":
            x = nn.relu(self.conv(nn.relu(x), self.channels, 3, "conv_mid"))
        x = self.residual(x)
        return x if self.code_dim is None else self.conv(nn.relu(x), self.code_dim, 1, "conv_out")


class Decoder(_Half):
    """Codes [b, h, w, code_dim or channels] to images [b, h 2^levels, w 2^levels, 3], nominally in [-1, 1].

    Layout "batch_norm" ends in a tanh, others do not clip.  `conv_out/kernel` is the last layer.
    Parameters: conv_in (layout "sonnet", or with code_dim), block_i_{conv1,conv2} (norm1, norm2), up_i and up_norm_i
    (layout "batch_norm"), i from the image down to 1, conv_out: transposed convolutions of 4x4 and stride 2.
    """

    @nn.compact
    def __call__(self, z: Float[Array, "b h2 w2 d"]) -> Float[Array, "b h w c"]:
        up = lambda x, channels, name: constrain(
            nn.ConvTranspose(channels, (4, 4), (2, 2), dtype=self.dtype, name=name)(x)
        )
        narrow = self.code_dim is not None or self.layout == "sonnet"
        x = self.conv(z, self.channels, 3, "conv_in") if narrow else z
        x = nn.relu(self.residual(x))
        for i in reversed(range(1, self.levels)):
            x = nn.relu(self.norm(up(x, self.width(i - 1), f"up_{i}"), f"up_norm_{i}"))
        x = up(x, self.image_channels, "conv_out")
        return jnp.tanh(x) if self.layout == "batch_norm" else x


class VQVAE(Tokenizer):
    """Encoder, vector quantizer and decoder; images in [-1, 1] at its edges, tokens int32 in between.

    channels: width of the convolutions.  hidden: width inside the residual blocks (None: `channels`, as in the paper).
    blocks: residual blocks of each half.  levels: strided convolutions, 2^levels pixels per token along each axis.
    num_codes: codebook size K.  code_dim: width of the codes, with a convolution to and from it; None: `channels`.
    layout: "paper"; "sonnet", DeepMind's example: half the width next to the image and one more 3x3 convolution in each
      half; "batch_norm", pytorch-vqvae: batch norms, and a tanh at the end.  That one is for trained weights: its norms
      go by their running statistics.
    The rest: see `VectorQuantizer`.  Parameters: encoder, decoder, quantizer (codebook, ...).
    """

    channels: int = 256
    hidden: int | None = None
    blocks: int = 2
    levels: int = 2
    num_codes: int = 512
    code_dim: int | None = None
    layout: str = "paper"
    image_channels: int = 3
    ema: bool = False
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    normalize: bool = False
    init_scale: float | None = None
    dtype: Any = None

    def setup(self):
        sizes = dict(
            channels=self.channels, hidden=self.hidden, blocks=self.blocks, levels=self.levels, code_dim=self.code_dim,
            layout=self.layout, image_channels=self.image_channels, dtype=self.dtype,
        )  # fmt: skip
        self.encoder, self.decoder = Encoder(**sizes), Decoder(**sizes)
        self.quantizer = VectorQuantizer(
            self.num_codes,
            self.channels if self.code_dim is None else self.code_dim,
            ema=self.ema,
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            normalize=self.normalize,
            init_scale=self.init_scale,
        )

    @property
    def downsampling(self) -> int:
        """Pixels per token along each axis."""
        return 2**self.levels
