"""Gated PixelCNN: tokens of a grid in raster order, each predicted from all that come before it.

Source: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders", arXiv:1606.05328 (section 2.2
and figure 2), the prior of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937, section 4).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.linear import linear
from vgen.layers.transformer import Stacked, stack
from vgen.sharding import constrain


def gate(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
    """tanh of the first half of the channels times the sigmoid of the second (eq. 2)."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.tanh(a) * nn.sigmoid(b)


class GatedLayer(nn.Module):
    """One layer of both stacks; x is the pair (vertical, horizontal) of maps [b, h, w, width].

    The vertical stack sees the rows above, the horizontal one what is left in its own row and, through vert_to_horiz,
    what the vertical one has found: together everything before a token, without the blind spot of masked convolutions.
    kernel: odd; the vertical convolution is kernel // 2 + 1 rows high and `kernel` wide, the horizontal one
      kernel // 2 + 1 wide, both ending at the token.
    first: the token itself is hidden from both (mask "A"), and there is no residual; later layers may look at their own
      place, which knows no more than what came before (mask "B").
    classes: of the class whose embedding moves both gates (eq. 4; 0: none).

    Parameters: vert, vert_to_horiz, horiz, horiz_resid and, with classes, label.
    """

    width: int
    kernel: int = 3
    first: bool = False
    classes: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]],
        label: Int[Array, "b"] | None = None,
        keep: Bool[Array, "b"] | None = None,
        layer: Any = None,
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """label: None without classes.  keep: whose class is told, None for all.  layer: of `stack`, not read."""
        vertical, horizontal = x
        half = self.kernel // 2
        across = self._conv((half + 1, self.kernel), ((half, 0), (half, half)), "vert")(vertical)
        along = self._conv((1, half + 1), ((0, 0), (half, 0)), "horiz")(horizontal)
        along = along + linear(2 * self.width, dtype=self.dtype, name="vert_to_horiz")(across)
        told = 0.0 if label is None else self._class(label, keep)
        h = linear(self.width, dtype=self.dtype, name="horiz_resid")(gate(along + told))
        return gate(across + told), (h if self.first else h + horizontal)

    def _conv(self, size, padding, name):
        if self.kernel % 2 == 0:
            raise ValueError(f"GatedLayer {self.name!r}: kernel must be odd, got {self.kernel}")
        mask = None
        if self.first:
            mask = np.ones((*size, self.width, 2 * self.width), np.float32)
            mask[(-1,) if size[0] > 1 else (slice(None), -1)] = 0  # the row of the token, or the token in its row
        # The gate halves what goes through it, and nothing goes around it in the vertical stack: twice the usual spread
        # keeps the signal of rows far above as large in the last layer as it was in the first.
        init = nn.initializers.variance_scaling(4.0 if name == "vert" else 1.0, "fan_in", "truncated_normal")
        return nn.Conv(2 * self.width, size, padding=padding, mask=mask, kernel_init=init, dtype=self.dtype, name=name)

    def _class(self, label, keep):
        init = nn.initializers.normal(0.02)
        table = nn.Embed(self.classes, 2 * self.width, embedding_init=init, dtype=self.dtype, name="label")
        told = table(label)
        return (told if keep is None else jnp.where(keep[:, None], told, 0))[:, None, None]


class PixelCNN(Stacked, kw_only=True):
    """Tokens [b, n] int32, a grid row by row, to logits [b, n, vocab]; those of token i depend on tokens before i only.

    vocab: tokens are in [0, vocab).  grid: rows and columns.  width, depth: channels of the feature maps, and layers.
    kernel, first_kernel: see `GatedLayer`, of the layers and of the first.  hidden: width ahead of the logits.
    classes: 0 for a network that is told nothing.

    What is told enters linearly, so that a class that is not told is no embedding at all: nothing is learned for it.
    Parameters: embed, first, layers (stacked [depth - 1, ...]), hidden, logits.
    Raises ValueError for tokens that are not of the grid and for a label where there are no classes.
    """

    vocab: int
    grid: tuple[int, int]
    width: int = 128
    depth: int = 15
    kernel: int = 3
    first_kernel: int = 7
    hidden: int = 512
    classes: int = 0

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b n"],
        label: Int[Array, "b"] | None = None,
        keep: Bool[Array, "b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n v"]:
        """label: classes in [0, classes), None for nobody's.  keep: whose class is told, None for all.  train: not
        read, nothing differs in training.
        """
        if tokens.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"PixelCNN: tokens {tokens.shape} are not {math.prod(self.grid)}, those of a grid {self.grid}"
            )
        if label is not None and not self.classes:
            raise ValueError("PixelCNN: got a label, but classes is 0; leave the label out or set classes")
        b = tokens.shape[0]
        if label is None and self.classes:
            label, keep = jnp.zeros(b, jnp.int32), jnp.zeros(b, bool)
        init = nn.initializers.normal(1.0)
        x = nn.Embed(self.vocab, self.width, embedding_init=init, dtype=self.dtype, name="embed")(tokens)
        x = x.reshape(b, *self.grid, self.width)
        common = dict(classes=self.classes, dtype=self.dtype)
        pair = GatedLayer(self.width, self.first_kernel, first=True, **common, name="first")((x, x), label, keep)
        if self.depth > 1:
            layers = GatedLayer(self.width, self.kernel, **common, name="layers")
            pair = self.run_stack(layers, pair, depth=self.depth - 1, label=label, keep=keep)
        x = nn.relu(linear(self.hidden, dtype=self.dtype, name="hidden")(pair[1]))
        return linear(self.vocab, dtype=self.dtype, name="logits")(x).reshape(*tokens.shape, self.vocab)

    def run_stack(self, block: nn.Module, x, *, depth: int, **kwargs):
        """As of Stacked, for a pair of maps."""
        pair = lambda pair: jax.tree.map(self.constrain or constrain, pair)
        return stack(block, x, depth=depth, remat=self.remat, unroll=self.unroll, constrain=pair, **kwargs)
