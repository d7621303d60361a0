"""GPT over image tokens, told a class or a text ahead of them: taming's minGPT and DALL-E's sparse transformer.

Sources: Esser et al. 2021, "Taming transformers", section 3.2 (CompVis/taming-transformers, MIT); Ramesh et al. 2021,
"Zero-shot text-to-image generation", section 2.2 and appendix B.1, of which no code was published.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vgen.layers.attention import Past
from vgen.layers.transformer import Block, Stacked, norm_layer

EPS = 1e-5  # of every norm
# Sizes of published networks; heads of taming's as the paper says (section 3.2), which its checkpoints do not tell.
IMAGENET = dict(depth=24, width=1024, heads=16)
IMAGENET_BIG = dict(depth=48, width=1536, heads=16)
DALL_E = dict(depth=64, width=3968, heads=62)
PATTERNS = ("full", "row", "column", "conv")


def dall_e_patterns(depth: int) -> tuple[str, ...]:
    """Which tokens each layer of DALL-E looks at: row, column, row, row, again and again, and a convolution at last."""
    return tuple("column" if i % 4 == 1 else "row" for i in range(depth - 1)) + ("conv",)


def visible(
    pattern: str,
    queries: Int[Array, "n"],
    keys: Int[Array, "m"],
    *,
    prefix: int,
    columns: int,
    kernel: int = 11,
    unmasked: int = 0,
) -> Bool[Array, "n m"]:
    """Which keys a query may look at, both given as places in a sequence of `prefix` places and image tokens.

    All look at no later place, but the first `unmasked` at each other.  An image token looks at all of the prefix and,
    of the image's tokens so far, at ("full") all, ("row") the last `columns` and itself, ("column") those of its
    column, or ("conv") those under a kernel of kernel x kernel tokens around it.  Rows and kernels run on over the
    border, by distance in raster order (DALL-E, figure 11).
    Raises ValueError for another pattern.
    """
    q, k = queries[:, None], keys[None]
    back = q - k
    if pattern == "full":
        near = jnp.ones(back.shape, bool)
    elif pattern == "row":
        near = back <= columns
    elif pattern == "column":
        near = back % columns == 0
    elif pattern == "conv":
        half = kernel // 2
        near = jnp.any(jnp.stack([jnp.abs(back - columns * row) <= half for row in range(half + 1)]), axis=0)
    else:
        raise ValueError(f"GPT: patterns must be of {', '.join(PATTERNS)}, got {pattern!r}")
    return ((back >= 0) & (near | (k < prefix))) | ((q < unmasked) & (k < unmasked))


class Joint(NamedTuple):
    """Logits [b, n, vocab] of the image's tokens, and [b, l, text_vocab] of the text's (None without text_head)."""

    image: Float[Array, "b n vocab"]
    text: Float[Array, "b l text_vocab"] | None


class GPT(Stacked):
    """Pre-norm transformer over [start, text 1 ... l, image 1 ... n - 1], which predicts the image's n tokens.

    Called as `vgen.tasks.autoregressive.Autoregressive` says, with a cache too.
    vocab: of the image's tokens.  grid: (rows, columns) of the image.  heads, mlp_dim (None: four times
      width), dropout: of the blocks and behind the embeddings.
    classes: None for no class, else each has a start of its own, and there is one more for none.
    text_vocab, text_length: 0 for no text.  Where a text has no token each place has its own learned padding (DALL-E,
      section 2.2); a text that is left out is nothing but padding.
    text_head: predict the text too, by logits of its own (`joint`): one softmax over both vocabularies with the other
      one ruled out.  DALL-E's paper is silent on that, and on what is ahead of the first word: a learned start here.
    own_start: False: the start is looked up among the image's tokens, class c as token c, as in taming.
    positions: "table", one for the whole sequence; "axes": of rows and of columns for the image, a table ahead of it.
    length: of the sequence and its table, at most 1 + text + image - 1, which is also the default.
    unmasked: so many places at the beginning see each other.
    patterns, kernel: what each layer looks at, see `visible` and `dall_e_patterns`; () for everything so far.

    Parameters: embed, start, text_embed, padding [l, width]; position [length, width], or prefix_position, row and
    column; layers [depth, ...], norm, logits, text_logits.
    Raises ValueError where fields contradict each other, and for a condition that is missing or that it has no place
    for.
    """

    vocab: int
    grid: tuple[int, int]
    depth: int
    width: int
    heads: int
    mlp_dim: int | None = None
    classes: int | None = None
    text_vocab: int = 0
    text_length: int = 0
    text_head: bool = False
    own_start: bool = True
    positions: str = "table"
    length: int | None = None
    unmasked: int = 0
    patterns: tuple[str, ...] = ()
    kernel: int = 11
    dropout: float = 0.0

    @property
    def prefix(self) -> int:
        """Places ahead of the image's tokens."""
        return 1 + self.text_length

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def places(self) -> int:
        """Of the sequence: the image's last token is never looked at."""
        return self.prefix + self.tokens - 1

    def setup(self):
        self._check()
        normal = nn.initializers.normal(0.02)
        embed = lambda count: nn.Embed(count, self.width, dtype=self.dtype, embedding_init=normal)
        self.embed = embed(self.vocab)
        if self.own_start:
            self.start = embed(1 if self.classes is None else self.classes + 1)
        if self.text_vocab:
            self.text_embed = embed(self.text_vocab)
            self.padding = self.param("padding", normal, (self.text_length, self.width))
        table = lambda name, length: self.param(name, normal, (length, self.width))
        if self.positions == "table":
            self.position = table("position", self.length or self.places)
        else:
            self.prefix_position = table("prefix_position", self.prefix)
            self.row, self.column = (table(name, side) for name, side in zip(("row", "column"), self.grid))
        self.layers = Block(
            self.heads,
            self.mlp_dim or 4 * self.width,
            eps=EPS,
            act="gelu",
            dropout=self.dropout,
            dtype=self.dtype,
            kernel_init=normal,
        )
        self.drop = nn.Dropout(self.dropout)
        self.norm = norm_layer("layer", EPS, dtype=self.dtype)
        head = lambda count: nn.Dense(count, use_bias=False, dtype=self.dtype, kernel_init=normal)
        self.logits = head(self.vocab)
        if self.text_head:
            self.text_logits = head(self.text_vocab)

    def _check(self):
        if self.positions not in ("table", "axes"):
            raise ValueError(f"GPT: positions must be 'table' or 'axes', got {self.positions!r}")
        if bool(self.text_vocab) != bool(self.text_length) or (self.text_head and not self.text_vocab):
            raise ValueError(
                f"GPT: text_vocab {self.text_vocab} and text_length {self.text_length} come together, and text_head "
                f"({self.text_head}) needs them"
            )
        if self.patterns and (len(self.patterns) != self.depth or set(self.patterns) - set(PATTERNS)):
            raise ValueError(
                f"GPT: patterns must be {self.depth} of {', '.join(PATTERNS)}, one a layer, got {self.patterns}"
            )
        if self.length is not None and self.length < self.places:
            raise ValueError(f"GPT: length must be at least the sequence's {self.places}, got {self.length}")

    # ------------------------------------------------------------------------------------------------------ forward

    def __call__(self, ids: Int[Array, "b n"], **kwargs) -> Float[Array, "b n vocab"]:
        """Logits of every token of ids, n = rows x columns; kwargs: train, and the condition: see `joint`."""
        return self.joint(ids, **kwargs)[0]

    def joint(
        self,
        ids: Int[Array, "b n"],
        *,
        label: Int[Array, "b"] | None = None,
        text: Int[Array, "b l"] | None = None,
        text_mask: Bool[Array, "b l"] | None = None,
        keep: Bool[Array, "b"] | None = None,
        train: bool = False,
    ) -> Joint:
        """Logits of image and text, as a tuple.

        label: int32 in [0, classes).  text: int32 in [0, text_vocab), l at most text_length; text_mask: False where
        there is no text.  keep: False for samples that are not told their label or text (None: all are).
        """
        if ids.shape[1] != self.tokens:
            raise ValueError(f"GPT: ids {ids.shape} must be [b, {self.tokens}], the tokens of a grid {self.grid}")
        prefix = self._prefix(ids.shape[0], label, text, text_mask, keep)
        x = self._run(jnp.concatenate([prefix, self.embed(ids[:, :-1])], axis=1), train=train)
        words = _wide(self.text_logits(x[:, : self.text_length])) if self.text_head else None
        return Joint(_wide(self.logits(x[:, self.prefix - 1 :])), words)

    def plain(
        self, ids: Int[Array, "b n"], embeddings: Float[Array, "b m width"] | None = None
    ) -> Float[Array, "b l vocab"]:
        """Logits behind every token of [embeddings, ids], nothing else ahead of them: minGPT itself."""
        x = self.embed(ids)
        x = x if embeddings is None else jnp.concatenate([embeddings.astype(x.dtype), x], axis=1)
        return _wide(self.logits(self._run(x)))

    def prefill(self, batch: int | None = None, **condition) -> Float[Array, "b vocab"]:
        """Logits of the first token, and what is ahead of it in the cache; condition: see `joint`, else the batch."""
        batch = next(iter(condition.values())).shape[0] if batch is None else batch
        x = self._run(self._prefix(batch, **condition), Past(jnp.int32(0), self.places))
        return _wide(self.logits(x[:, -1]))

    def advance(self, previous: Int[Array, "b"], i: Any, batch: int | None = None, **condition) -> Float[Array, "b v"]:
        """Logits of the token at place i (traced) of the image, given that before it, and the rest by the cache.

        What is ahead of the image must be in the cache (`prefill`); of the first token `previous` is not looked at.
        """
        first = self._prefix(previous.shape[0], **condition)[:, -1]
        x = jnp.where(i == 0, first, self.embed(previous))[:, None]
        return _wide(self.logits(self._run(x, Past(i + self.prefix - 1, self.places))[:, 0]))

    # -------------------------------------------------------------------------------------------------------- parts

    def _prefix(self, b, label=None, text=None, text_mask=None, keep=None):
        """Embeddings [b, prefix, width] of what is ahead of the image."""
        if (label is None) != (self.classes is None) or (text is None) != (not self.text_vocab):
            raise ValueError(
                f"GPT: classes {self.classes} and text_vocab {self.text_vocab} say what it must be told, got "
                f"{'no' if label is None else 'a'} label and {'no' if text is None else 'a'} text"
            )
        parts = [self._start(b, label, keep)[:, None]]
        if text is not None:
            parts.append(self._text(text, text_mask, keep))
        return jnp.concatenate(parts, axis=1)

    def _start(self, b, label, keep):
        label = jnp.zeros(b, jnp.int32) if label is None else label
        if not self.own_start:
            if keep is not None and self.classes is not None:
                raise ValueError("GPT: own_start is False, so there is no start for samples without a class")
            return self.embed(label)  # QUIRK: taming's classes share a table with the image's tokens (Net2Net)
        return self.start(label if keep is None or self.classes is None else jnp.where(keep, label, self.classes))

    def _text(self, text, mask, keep):
        b, length = text.shape
        if length > self.text_length:
            raise ValueError(f"GPT: text {text.shape} is longer than text_length {self.text_length}")
        mask = jnp.ones(text.shape, bool) if mask is None else mask
        mask = mask if keep is None else mask & keep[:, None]
        text, mask = (jnp.pad(x, ((0, 0), (0, self.text_length - length))) for x in (text, mask))
        x = self.text_embed(text)
        return jnp.where(mask[..., None], x, self.padding.astype(x.dtype))

    def _positions(self):
        if self.positions == "table":
            return jnp.asarray(self.position)
        axes = (self.row[:, None] + self.column[None]).reshape(self.tokens, self.width)
        return jnp.concatenate([self.prefix_position, axes])

    def _run(self, x, past: Past | None = None, train=False):
        """Normalised states of embeddings x [b, n, width], the first of which is at past.place."""
        n, table = x.shape[1], self._positions()
        if n > table.shape[0]:
            raise ValueError(f"GPT: got a sequence of {n}, there are positions for {table.shape[0]}")
        here = table[:n] if past is None else jax.lax.dynamic_slice_in_dim(table, past.place, n)
        x = self.drop(x + here.astype(x.dtype), deterministic=not train)
        look = dict(causal=True) if not (self.patterns or self.unmasked) else dict(mask=self._mask(n, past))
        return self.norm(self.run_stack(self.layers, x, depth=self.depth, past=past, train=train, **look))

    def _mask(self, n, past):
        """The mask of a layer as a function of its index."""
        queries, keys = (jnp.arange(n),) * 2 if past is None else (past.place + jnp.arange(n), jnp.arange(past.length))
        sizes = dict(prefix=self.prefix, columns=self.grid[1], kernel=self.kernel, unmasked=self.unmasked)
        kinds = sorted(set(self.patterns)) or ["full"]
        masks = jnp.stack([visible(kind, queries, keys, **sizes)[None, None] for kind in kinds])
        which = jnp.asarray([kinds.index(pattern) for pattern in self.patterns] or [0] * self.depth)
        return lambda layer: masks[which[layer]]


def _wide(x):
    """In float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
