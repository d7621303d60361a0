"""Masked image tokens given text: train and sample MaskGIT-like generators (Muse's base and super-resolution models).

Sources: Chang et al. 2022 (MaskGIT), section 3.2; Chang et al. 2023 (Muse), sections 2.3 to 2.8 and 3.2.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vgen import guidance
from vgen.data import images as image_ops
from vgen.edit import inpaint_tokens
from vgen.edit.maskfree import GUIDANCE_SCALE, maskfree
from vgen.models.muse import BaseTransformer, SuperResTransformer
from vgen.models.vqgan import VQGAN
from vgen.sample import sample
from vgen.tokens import parallel, schedules
from vgen.types import Batch, Context, Edit, Loss, Params, Prediction, Sampler


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Predict masked tokens of an image from the others, a text and, for super-resolution, a smaller image's tokens.

    transformer: BaseTransformer, or SuperResTransformer, which makes this the second stage of a cascade.
    tokenizer: of the images generated here, frozen.  low_tokenizer: of the low-resolution tokens (None: `tokenizer`).
    text_encoder: called as (tokens, mask); its parameters train along when `train_text`, else they are frozen.
    size, low_size: pixels of the generated and, for super-resolution, of the conditioning image; a batch's images are
      reduced to these by box averaging.  max_steps: the longest decoding that sampling can be asked for.
    schedule: of the masked fraction, in training and decoding.  label_smoothing: of the cross-entropy.
    text_drop: share of the samples trained without their text.
    low_noise: largest share of conditioning tokens replaced by random ones in training (0: Muse, which does not say).

    Parameters: transformer, text_encoder, tokenizer and, where it is another network, low_tokenizer.
    """

    transformer: BaseTransformer | SuperResTransformer
    tokenizer: VQGAN
    text_encoder: nn.Module
    size: int
    low_tokenizer: VQGAN | None = None
    low_size: int = 0
    train_text: bool = False
    max_steps: int = 128
    schedule: str = "cosine"
    label_smoothing: float = 0.1
    text_drop: float = 0.1
    low_noise: float = 0.0

    buffers = ""

    def __post_init__(self):
        if self.superres and self.low_size < 1:
            raise ValueError("MaskedTokens: a SuperResTransformer needs low_size, the pixels of the conditioning image")
        grid = (self.size // self.tokenizer.downsampling,) * 2
        if tuple(self.transformer.grid) != grid:
            raise ValueError(
                f"MaskedTokens: size {self.size} at {self.tokenizer.downsampling} pixels per token is a grid of "
                f"{grid}, the transformer's is {tuple(self.transformer.grid)}"
            )
        if self.transformer.vocab != self.tokenizer.num_codes:
            raise ValueError(
                f"MaskedTokens: the tokenizer has {self.tokenizer.num_codes} codes, the transformer's vocab is "
                f"{self.transformer.vocab}; they must be equal"
            )

    @property
    def superres(self) -> bool:
        return isinstance(self.transformer, SuperResTransformer)

    @property
    def groups(self) -> dict[str, str]:
        return {"main": r"(transformer|text_encoder)/.*" if self.train_text else r"transformer/.*"}

    @property
    def mask_id(self) -> int:
        return self.transformer.vocab

    def init(self, key, batch: Batch) -> Params:
        """All parameters, the frozen ones too (of the right shapes)."""
        keys = jax.random.split(key, 4)
        text, mask = batch["text"][:1], batch["text_mask"][:1]
        image = jnp.zeros((1, self.size, self.size, 3), jnp.float32)
        params = {
            "text_encoder": self.text_encoder.init(keys[0], text, mask)["params"],
            "tokenizer": self.tokenizer.init(keys[1], image)["params"],
        }
        states, mask = self._read(params, text, mask)
        tokens = jnp.zeros((1, np.prod(self.transformer.grid)), jnp.int32)
        low = None
        if self.superres:
            low = jnp.zeros((1, np.prod(self.transformer.low_grid)), jnp.int32)
            if self.low_tokenizer is not None:
                params["low_tokenizer"] = self.low_tokenizer.init(keys[2], image)["params"]
        args = self._arguments(tokens, low, states, mask, None)
        return params | {"transformer": self.transformer.init(keys[3], *args, **self._codes(params))["params"]}

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: cross-entropy of the masked tokens, averaged over all of the batch's masked tokens."""
        fraction_key, mask_key, drop_key, noise_key, dropout_key = jax.random.split(key, 5)
        tokens, low = self._tokens(params, batch["image"])
        b = tokens.shape[0]
        fraction = schedules.sample_fraction(fraction_key, (b,), self.schedule)
        masked, mask = schedules.mask_tokens(mask_key, tokens, fraction, self.mask_id)
        if low is not None and self.low_noise:
            low = self._corrupt(noise_key, low)
        keep = jax.random.uniform(drop_key, (b,)) >= self.text_drop
        states, text_mask = self._read(params, batch["text"], batch["text_mask"], train=ctx.train, key=dropout_key)
        logits = self._predict(
            params, masked, low, states, text_mask, keep, train=ctx.train, rngs={"dropout": dropout_key}
        )
        value, accuracy = self._cross_entropy(logits, tokens, mask, self.label_smoothing)
        return {"main": Loss(value, {"accuracy": accuracy})}

    def _cross_entropy(self, logits, tokens, mask, smoothing):
        """(mean over masked tokens of the smoothed cross-entropy, share of them whose likeliest token is right)."""
        target = jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
        each = optax.softmax_cross_entropy(logits, optax.smooth_labels(target, smoothing))
        count = mask.sum()
        right = (logits.argmax(-1) == tokens) & mask
        return (each * mask).sum() / count, right.sum() / count

    def _tokens(self, params, images):
        """(tokens [b, n], low-resolution tokens [b, m] or None) of uint8 images; they carry no gradient."""
        x = image_ops.to_float(images)
        tokens = self._tokenize(params, "tokenizer", self._at(x, self.size))
        low = None
        if self.superres:
            low = self._tokenize(params, self._low_name, self._at(x, self.low_size))
        return tokens, low

    @property
    def _low_name(self):
        return "tokenizer" if self.low_tokenizer is None else "low_tokenizer"

    def _at(self, x, size):
        if x.shape[1] % size:
            raise ValueError(
                f"MaskedTokens: images of {x.shape[1]} pixels cannot be reduced to {size} by a whole factor"
            )
        return image_ops.downsample(x, x.shape[1] // size)

    def _tokenize(self, params, name, x):
        model = self.low_tokenizer if name == "low_tokenizer" else self.tokenizer
        tokens = model.apply({"params": jax.lax.stop_gradient(params[name])}, x, method="tokenize")
        return tokens.reshape(tokens.shape[0], -1)

    def _corrupt(self, key, low):
        share_key, where_key, what_key = jax.random.split(key, 3)
        share = self.low_noise * jax.random.uniform(share_key, (low.shape[0], 1))
        noise = jax.random.randint(what_key, low.shape, 0, self.transformer.low_vocab, low.dtype)
        return jnp.where(jax.random.uniform(where_key, low.shape) < share, noise, low)

    def _read(self, params, text, mask, train=False, key=None):
        """(text states, text mask); encoders return states, or states and mask."""
        kwargs = dict(train=True, rngs={"dropout": key}) if train and self.train_text else {}
        out = self.text_encoder.apply({"params": params["text_encoder"]}, text, mask, **kwargs)
        return out if isinstance(out, tuple) else (out, mask)

    def _predict(self, params, tokens, low, states, text_mask, keep, **kwargs):
        args = self._arguments(tokens, low, states, text_mask, keep)
        return self.transformer.apply({"params": params["transformer"]}, *args, **self._codes(params), **kwargs)

    def _codes(self, params) -> dict[str, Any]:
        """The codebooks that a transformer with by_codes is told."""
        if not getattr(self.transformer, "by_codes", False):
            return {}
        codes = {"codes": params["tokenizer"]["quantizer"]["codebook"]}
        return codes | ({"low_codes": params[self._low_name]["quantizer"]["codebook"]} if self.superres else {})

    def _arguments(self, tokens, low, states, text_mask, keep) -> tuple:
        """What the transformer is called with."""
        return (tokens, states, text_mask, keep) if low is None else (tokens, low, states, text_mask, keep)

    # ----------------------------------------------------------------------------------------------------- sampling

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, guidance_scale=4.0, steps=24, temperature=1.0,
        choice_temperature=4.5,
    ) -> dict[str, Any]:  # fmt: skip
        """{"tokens": int32 [b, n], "image_out": uint8 [b, size, size, 3]} by parallel decoding; knobs may be
        traced.

        conds: text, text_mask [b, l]; optional negative, negative_mask [b, l] (in the place of no text); tokens [b, m]
        of the stage before, for super-resolution; optional image uint8 [b, h, w, 3] to edit and mask bool [b, h, w],
        True where it is made anew.  An image without a mask is edited by text alone, in the base model
        (`edit.maskfree`); super-resolution then starts from nothing but the new low-resolution tokens.
        guidance_scale: t of p = (1 + t) conditional - t unconditional at the last step, rising linearly from 0.
        steps: at most max_steps.
        """
        b = conds["text"].shape[0]
        low = conds["tokens"] if self.superres else None
        denoise = self._denoiser(params, conds, low, self._weights(guidance_scale))
        sampler = self._sampler(steps, temperature, choice_temperature)
        n = int(np.prod(self.transformer.grid))
        edit = Edit(
            start=jnp.full((b, n), self.mask_id, jnp.int32), times=parallel.grid(steps, self.max_steps, self.schedule)
        )
        if "image" in conds:
            edit, denoise, steps = self._edit(params, conds, low, edit, denoise, steps)
        tokens = sample(denoise, edit.sampler or sampler, edit.times, key, edit.start, edit.hook, num_steps=steps)
        pixels = self.decode(params, tokens)
        if "mask" in conds:
            original, mask = self._at(image_ops.to_float(conds["image"]), self.size), self._mask_at(conds["mask"])
            pixels = inpaint_tokens.blend(original, pixels, mask, max(self.size / 16 - 1, 0.0))
        return {"tokens": tokens, "image_out": image_ops.to_uint8(pixels)}

    def _weights(self, scale) -> guidance.Weights:
        return guidance.rising(scale)

    def _sampler(self, steps, temperature, choice_temperature) -> Sampler:
        return parallel.maskgit_sampler(self.mask_id, choice_temperature=choice_temperature, temperature=temperature)

    def decode(self, params: Params, tokens):
        """Images [b, size, size, 3] in [-1, 1] of tokens [b, n]."""
        tokens = tokens.reshape(tokens.shape[0], *self.transformer.grid)
        x = self.tokenizer.apply({"params": params["tokenizer"]}, tokens, method="decode_indices")
        return jnp.clip(x, -1, 1)

    def _denoiser(self, params, conds, low, weights):
        """Guided logits: the text and its absence (or a negative text), in one batched call."""
        states, mask = self._read(params, conds["text"], conds["text_mask"])
        b = conds["text"].shape[0]
        cond = {"states": states, "mask": mask, "keep": jnp.ones(b, bool)}
        if "negative" in conds:
            states, mask = self._read(params, conds["negative"], conds["negative_mask"])
            other = {"states": states, "mask": mask, "keep": jnp.ones(b, bool)}
        else:
            other = cond | {"keep": jnp.zeros(b, bool)}
        if low is not None:
            cond, other = cond | {"low": low}, other | {"low": low}

        def apply(x, step, c):
            return Prediction(self._predict(params, x, c.get("low"), c["states"], c["mask"], c["keep"]))

        return guidance.mix(apply, [cond, other], weights)

    def _edit(self, params, conds, low, edit, denoise, steps):
        """(edit, denoiser, number of steps) for an image with a mask (inpainting) or without (mask-free)."""
        if "mask" in conds:
            tokens = self._tokenize(params, "tokenizer", self._at(image_ops.to_float(conds["image"]), self.size))
            anew = inpaint_tokens.token_mask(self._mask_at(conds["mask"]), self.transformer.grid)
            start = inpaint_tokens.inpaint(tokens, anew, self.mask_id).start
            return dataclasses.replace(edit, start=start), denoise, steps
        if self.superres:
            return edit, denoise, steps
        tokens = self._tokenize(params, "tokenizer", self._at(image_ops.to_float(conds["image"]), self.size))
        constant = self._denoiser(params, conds, low, guidance.cfg(1 + GUIDANCE_SCALE))
        iterations = min(100, self.max_steps)
        return maskfree(tokens, self.mask_id, num_steps=iterations, max_steps=self.max_steps), constant, iterations

    def _mask_at(self, mask):
        """The mask at this stage's size: a pixel is masked when any pixel it stands for is."""
        factor = mask.shape[1] // self.size
        b = mask.shape[0]
        return mask.reshape(b, self.size, factor, self.size, factor).any((2, 4)) if factor > 1 else mask

    # -------------------------------------------------------------------------------------------------- measurement

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Cross-entropy (nats, no smoothing) and accuracy of masked tokens, with text and without.

        Protocol: masked fractions evenly spread over the schedule, one mask per example, the same for every call.
        """

        def measure(params, batch, key):
            tokens, low = self._tokens(params, batch["image"])
            b = tokens.shape[0]
            fraction = schedules.mask_fraction((jnp.arange(b) + 0.5) / b, self.schedule)
            masked, mask = schedules.mask_tokens(key, tokens, fraction, self.mask_id)
            states, text_mask = self._read(params, batch["text"], batch["text_mask"])
            scores = {}
            for name, keep in (("", True), ("_no_text", False)):
                logits = self._predict(params, masked, low, states, text_mask, jnp.full(b, keep))
                scores[f"loss{name}"], scores[f"accuracy{name}"] = self._cross_entropy(logits, tokens, mask, 0.0)
            return scores

        run, rows = jax.jit(measure), []
        for i, batch in enumerate(batches):
            rows.append(run(params, {k: batch[k] for k in ("image", "text", "text_mask")}, jax.random.fold_in(key, i)))
        if not rows:
            raise ValueError("MaskedTokens.evaluate: no batches; the evaluation data is empty")
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"samples": images of the batch's first texts (super-resolution: from the true low-resolution tokens)}."""
        count = min(8, len(batch["text"]))
        conds = {name: batch[name][:count] for name in ("text", "text_mask")}

        def draw(params, conds, image):
            low = self._tokens(params, image)[1]
            conds = conds if low is None else conds | {"tokens": low}
            return self.sample(params, key, conds, steps=min(24, self.max_steps))["image_out"]

        pictures = jax.jit(draw)(params, conds, batch["image"][:count])
        return {"samples": image_ops.grid(np.asarray(pictures), columns=4)}
