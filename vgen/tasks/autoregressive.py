"""Image tokens one after the other, given a class or a text: train and sample a prior over a tokenizer's codes.

Sources: van den Oord et al. 2017 (VQ-VAE), section 4.2; Esser et al. 2021 (VQ-GAN), sections 3.2 and 3.3; Ramesh et al.
2021 (DALL-E), section 2.2.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vgen import guidance, hosts
from vgen.data import images as image_ops
from vgen.edit import inpaint_tokens
from vgen.sample import sample
from vgen.tokens import raster
from vgen.types import Batch, Context, Loss, Params


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """Predict every token of an image from those before it in raster order and, where there is one, the condition.

    network: what predicts, see below.  tokenizer: of the images, frozen: tokenize, decode_indices, num_tokens and
      downsampling, as VQGAN and DVAE have them.  size: pixels of a picture; a batch's images are reduced to it by box
      averaging.
    classes: of the labels, 0 for none.  text: whether the network is told a text; without either it is told nothing.
    drop: share of the samples trained without their condition, which makes classifier-free guidance possible.  0: no
      guidance, and half of its work saved.
    text_weight: share of the text's own cross-entropy in the loss (DALL-E: 1 / 8), 0 for none.
    noise: largest share of the tokens that are looked at, not of those to be predicted, which training replaces by
      random ones (1 - pkeep of taming).
    canvas: (height, width) in pixels of the pictures that are drawn, where they are larger than `size`: each token then
      sees a window of `size` pixels (Esser et al. 2021, section 3.3).

    A network is called as network(ids, train=..., **condition), the condition being {"label": int32 [b]},
    {"text": int32 [b, l], "text_mask": bool [b, l]} or {}, with drop also "keep", bool [b], False for samples that are
    not told theirs.  It gives logits [b, n, vocab] of ids, int32 [b, n] in raster order, all of a grid: logits[:, i]
    depend on ids[:, :i] and the condition alone, the network itself shifts.  It has a field `vocab`, the tokenizer's
    number of codes; its `grid`, where it has one, must be this task's.  Dropout takes the rng "dropout".
    It may also have two methods that decode with a cache, which is then used; without them the whole network runs for
    every token:
      prefill(**condition), applied with mutable=["cache"]: makes the collection "cache", of what it knows ahead of the
        first token, batch and length being those of its condition and its grid; the result is not looked at;
      advance(previous, i, **condition), applied with this collection mutable: int32 [b] the token at place i - 1
        (anything where i = 0) and the traced place i -> logits [b, vocab] at place i.
      Without a condition both are also given batch=b.
    With text_weight it has a method joint(ids, train=..., **condition) -> (logits, text logits [b, l, text vocab], of
    which [:, k] depend on text[:, :k] alone).

    Parameters: network, tokenizer.
    """

    network: nn.Module
    tokenizer: nn.Module
    size: int
    classes: int = 0
    text: bool = False
    drop: float = 0.0
    text_weight: float = 0.0
    noise: float = 0.0
    canvas: tuple[int, int] | None = None

    groups = {"main": r"network/.*"}
    buffers = ""

    def __post_init__(self):
        if self.classes and self.text:
            raise ValueError(f"Autoregressive: either classes or text, got classes {self.classes} and text")
        if not 0 <= self.drop < 1 or (self.drop and not self.conditions):
            raise ValueError(f"Autoregressive: drop must be in [0, 1), and 0 without classes and text, got {self.drop}")
        if not 0 <= self.text_weight < 1 or (self.text_weight and not self.text):
            raise ValueError(f"Autoregressive: text_weight must be in [0, 1), and 0 without text: {self.text_weight}")
        factor, codes = self.tokenizer.downsampling, self.tokenizer.num_tokens
        if self.size % factor or any(side % factor or side < self.size for side in self.canvas or ()):
            raise ValueError(
                f"Autoregressive: size {self.size} and canvas {self.canvas} must be multiples of the tokenizer's "
                f"{factor} pixels per token, and the canvas no smaller than size"
            )
        if self.network.vocab != codes:
            raise ValueError(
                f"Autoregressive: the tokenizer has {codes} codes, the network's vocab is {self.network.vocab}; they "
                "must be equal"
            )
        if tuple(getattr(self.network, "grid", self.grid)) != self.grid:
            raise ValueError(
                f"Autoregressive: size {self.size} at {factor} pixels per token is a grid of {self.grid}, the "
                f"network's is {tuple(self.network.grid)}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens in training."""
        return (self.size // self.tokenizer.downsampling,) * 2

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a batch says of its images."""
        return ("label",) if self.classes else ("text", "text_mask") if self.text else ()

    def init(self, key, batch: Batch) -> Params:
        """All parameters, the frozen ones too (of the right shapes)."""
        keys = jax.random.split(key)
        image = jnp.zeros((1, self.size, self.size, 3), jnp.float32)
        ids = jnp.zeros((1, math.prod(self.grid)), jnp.int32)
        told = {name: batch[name][:1] for name in self.conditions}
        return {
            "tokenizer": self.tokenizer.init(keys[0], image)["params"],
            "network": self.network.init(keys[1], ids, **told)["params"],
        }

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: cross-entropy of the image's tokens, mean; with text_weight also of the text's, those of its mask.

        NaN, which ends a training, where a label is no class.
        """
        drop_key, noise_key, dropout_key = jax.random.split(key, 3)
        ids = self._tokens(params, batch["image"])
        told = {name: batch[name] for name in self.conditions}
        if self.drop:
            told = self._dropped(told, jax.random.uniform(drop_key, ids.shape[:1]) < self.drop)
        seen = self._noised(noise_key, ids) if self.noise else ids
        value, metrics = self._measured(params, seen, ids, told, train=ctx.train, rngs={"dropout": dropout_key})
        if self.classes:
            known = (batch["label"] >= 0) & (batch["label"] < self.classes)
            value = jnp.where(known.all(), value, jnp.nan)
        return {"main": Loss(value, {name: metrics[name] for name in metrics if name != "loss"})}

    def _measured(self, params, seen, ids, told, **kwargs):
        """(what is minimised, {"loss" of the image's tokens, "accuracy", with text_weight "text_loss"})."""
        if self.text_weight:
            logits, words = self._apply(params, seen, method="joint", **told, **kwargs)
        else:
            logits, words = self._apply(params, seen, **told, **kwargs), None
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        metrics = {"loss": each.mean(), "accuracy": (logits.argmax(-1) == ids).mean()}
        if words is None:
            return metrics["loss"], metrics
        mask = told["text_mask"]
        each = optax.softmax_cross_entropy_with_integer_labels(words, told["text"])
        metrics["text_loss"] = jnp.where(mask, each, 0).sum() / jnp.maximum(mask.sum(), 1)
        return (1 - self.text_weight) * metrics["loss"] + self.text_weight * metrics["text_loss"], metrics

    def _apply(self, params, *args, method=None, **kwargs):
        return self.network.apply({"params": params["network"]}, *args, method=method, **kwargs)

    def _tokens(self, params, images):
        """Tokens [b, n] of uint8 images; they carry no gradient."""
        x = self._at(image_ops.to_float(images), self.size)
        variables = {"params": jax.lax.stop_gradient(params["tokenizer"])}
        return self.tokenizer.apply(variables, x, method="tokenize").reshape(x.shape[0], -1)

    def _at(self, x, size):
        if x.shape[1] % size:
            raise ValueError(
                f"Autoregressive: images of {x.shape[1]} pixels cannot be reduced to {size} by a whole factor"
            )
        return image_ops.downsample(x, x.shape[1] // size)

    def _dropped(self, told, gone):
        """The condition, which is not told to the samples that `gone`, bool [b] or one for all, marks."""
        return told | {"keep": jnp.broadcast_to(~jnp.asarray(gone), told[self.conditions[0]].shape[:1])}

    def _noised(self, key, ids):
        where_key, what_key = jax.random.split(key)
        other = jax.random.randint(what_key, ids.shape, 0, self.network.vocab, ids.dtype)
        return jnp.where(jax.random.uniform(where_key, ids.shape) < self.noise, other, ids)

    # ----------------------------------------------------------------------------------------------------- sampling

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, guidance_scale=1.0, temperature=1.0, top_k=0, top_p=1.0
    ) -> dict[str, Any]:
        """{"tokens": int32 [b, n], "image_out": uint8 [b, h, w, 3]}, token by token; knobs may be traced.

        conds: label [b], or text, text_mask [b, l] and optionally negative, negative_mask [b, l] in the place of no
        text; optional image uint8 [b, size, size, 3] and mask bool [b, size, size], True where it is made anew (each
        token knows what is above it, and to its left, alone).
        guidance_scale: s of unconditional + s (conditional - unconditional), of logits; of no effect where drop is 0.
        temperature: 0 takes the likeliest token.  top_k: how many tokens may be drawn, 0 for all.  top_p: the share of
        probability that may be drawn from, among the top k.
        Raises ValueError for an image without a mask, and for one together with a canvas.
        """
        b = next(iter(conds.values())).shape[0]
        told, weights = self._guided(conds, guidance_scale)
        canvas = self._canvas
        start = jnp.full((b, math.prod(canvas)), raster.UNKNOWN, jnp.int32)
        if "image" in conds:
            start = self._known(params, conds, start)
        denoise, cache = self._denoiser(params, told, weights, b)
        sampler = raster.raster_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        x = sample(denoise, sampler, raster.grid(start.shape[1]), key, raster.Drawn(start, cache))
        return {"tokens": x.ids, "image_out": image_ops.to_uint8(self.decode(params, x.ids))}

    @property
    def _canvas(self) -> tuple[int, int]:
        """(rows, columns) of tokens in what is drawn."""
        height, width = self.canvas or (self.size, self.size)
        return height // self.tokenizer.downsampling, width // self.tokenizer.downsampling

    def _guided(self, conds, scale) -> tuple[list[dict[str, Any]], guidance.Weights]:
        """The conditions that every token is asked under, and their weights."""
        told = {name: conds[name] for name in self.conditions}
        if not self.drop:
            return [told], guidance.single
        if self.text and "negative" in conds:
            other = self._dropped({"text": conds["negative"], "text_mask": conds["negative_mask"]}, False)
        else:
            other = self._dropped(told, True)
        return [self._dropped(told, False), other], guidance.cfg(scale)

    def _denoiser(self, params, told, weights, b):
        """(the denoiser, the cache that it begins with): of a window where there is a canvas, else with a cache if the
        network has one.
        """
        count = len(told)
        told = jax.tree.map(lambda *x: jnp.concatenate(x), *told)
        if self._canvas != self.grid:
            forward = functools.partial(self._apply, params, **told)
            return raster.sliding(forward, self._canvas, self.grid, weights, count), ()
        if not hasattr(self.network, "advance"):
            return raster.whole(functools.partial(self._apply, params, **told), weights, count), ()
        told = told or {"batch": b}
        run = functools.partial(self.network.apply, mutable=["cache"], **told)
        _, made = run({"params": params["network"]}, method="prefill")

        def advance(previous, i, cache):
            variables = {"params": params["network"], "cache": cache}
            logits, kept = run(variables, previous, i, method="advance")
            return logits, kept["cache"]

        return raster.cached(advance, weights, count), made["cache"]

    def _known(self, params, conds, start):
        """The tokens to begin with of an image: those of cells without a masked pixel are kept."""
        if "mask" not in conds or self.canvas is not None:
            raise ValueError("Autoregressive.sample: an image needs a mask of what is made anew, and no canvas")
        anew = inpaint_tokens.token_mask(conds["mask"], self.grid)
        return jnp.where(anew, start, self._tokens(params, conds["image"]))

    def decode(self, params: Params, ids):
        """Images [b, h, w, 3] in [-1, 1] of tokens [b, n]."""
        ids = ids.reshape(ids.shape[0], *self._canvas)
        x = self.tokenizer.apply({"params": params["tokenizer"]}, ids, method="decode_indices")
        return jnp.clip(x, -1, 1)

    # -------------------------------------------------------------------------------------------------- measurement

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Of the image's tokens: cross-entropy (nats per token: "loss"), bits_per_token, perplexity and accuracy.

        With drop the loss and accuracy without the condition too, "_no_class" or "_no_text" behind their names; with
        text_weight also "text_loss".  Nothing is random.
        """

        def measure(params, batch):
            ids, told = self._tokens(params, batch["image"]), {name: batch[name] for name in self.conditions}
            scores = dict(self._measured(params, ids, ids, self._dropped(told, False) if self.drop else told)[1])
            if self.drop:
                without = self._measured(params, ids, ids, self._dropped(told, True))[1]
                end = "_no_class" if self.classes else "_no_text"
                scores |= {name + end: without[name] for name in ("loss", "accuracy")}
            return scores

        run, rows = jax.jit(measure), []
        for batch in batches:
            rows.append(run(params, {name: batch[name] for name in ("image", *self.conditions)}))
        if not rows:
            raise ValueError("Autoregressive.evaluate: no batches; the evaluation data is empty")
        scores = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        return scores | {"bits_per_token": scores["loss"] / math.log(2), "perplexity": math.exp(scores["loss"])}

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"samples": pictures of the batch's first texts or classes}."""
        count = min(8, len(batch["image"]))
        conds = {name: batch[name][:count] for name in self.conditions} or {"label": jnp.zeros(count, jnp.int32)}
        pictures = jax.jit(self.sample)(params, key, conds)["image_out"]
        return {"samples": image_ops.grid(hosts.whole(pictures), columns=4)}
