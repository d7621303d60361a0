"""Masked image tokens given a text or a class: train and sample MaskGIT and Muse's base and super-resolution models.

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
from vgen.hosts import whole
from vgen.models.maskgit import MaskGIT
from vgen.models.muse import BaseTransformer, SuperResTransformer
from vgen.models.vqgan import VQGAN
from vgen.sample import sample
from vgen.tokens import parallel, schedules
from vgen.types import Batch, Context, Edit, Loss, Params, Prediction, Sampler


@dataclasses.dataclass(frozen=True)
class MaskedTokens:
    """Predict masked tokens of an image from the others, a text or a class and, for super-resolution, a smaller image's
    tokens.

    transformer: BaseTransformer, or SuperResTransformer, which makes this the second stage of a cascade; MaskGIT for
      classes.
    tokenizer: of the images generated here, frozen.  low_tokenizer: of the low-resolution tokens (None: `tokenizer`).
    text_encoder: called as (tokens, mask); its parameters train along when `train_text`, else they are frozen.  None,
      and only then, in a system of classes.
    size, low_size: pixels of the generated and, for super-resolution, of the conditioning image; a batch's images are
      reduced to these by box averaging.  max_steps: the longest decoding that sampling can be asked for.
    schedule: of the masked fraction, in training and decoding.  label_smoothing: of the cross-entropy.
    text_drop: share of the samples trained without their text or class; of classes 0 as published, and then there is no
      guidance.
    low_noise: largest share of conditioning tokens replaced by random ones in training (0: Muse, which does not say).
    edit_from: share of the steps that inpainting leaves out at the beginning (MaskGIT's editing: 2 of 12).

    Parameters: transformer, text_encoder, tokenizer and, where it is another network, low_tokenizer.
    """

    transformer: BaseTransformer | SuperResTransformer | MaskGIT
    tokenizer: VQGAN
    size: int
    text_encoder: nn.Module | None = None
    low_tokenizer: VQGAN | None = None
    low_size: int = 0
    train_text: bool = False
    max_steps: int = 128
    schedule: str = "cosine"
    label_smoothing: float = 0.1
    text_drop: float = 0.1
    low_noise: float = 0.0
    edit_from: float = 0.0

    buffers = ""

    def __post_init__(self):
        if (self.text_encoder is None) != isinstance(self.transformer, MaskGIT):
            raise ValueError(
                "MaskedTokens: a MaskGIT is told a class and takes no text_encoder, other transformers need one; got "
                f"{type(self.transformer).__name__} and {type(self.text_encoder).__name__}"
            )
        if not 0 <= self.edit_from < 1:
            raise ValueError(f"MaskedTokens: edit_from must be in [0, 1), got {self.edit_from}")
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
        return getattr(self.transformer, "mask_id", self.transformer.vocab)

    @property
    def classes(self) -> int:
        """How many classes there are; 0 in a system of texts."""
        return self.transformer.classes if self.text_encoder is None else 0

    @property
    def conditions(self) -> tuple[str, ...]:
        """What a batch says of its images."""
        return ("label",) if self.classes else ("text", "text_mask")

    @property
    def _always_told(self) -> bool:
        """Whether training never leaves the class out; a text is left out, or there is an empty one."""
        return bool(self.classes) and not self.text_drop

    def init(self, key, batch: Batch) -> Params:
        """All parameters, the frozen ones too (of the right shapes)."""
        keys = jax.random.split(key, 4)
        image = jnp.zeros((1, self.size, self.size, 3), jnp.float32)
        params = {"tokenizer": self.tokenizer.init(keys[1], image)["params"]}
        first = {name: batch[name][:1] for name in self.conditions}
        if not self.classes:
            params["text_encoder"] = self.text_encoder.init(keys[0], first["text"], first["text_mask"])["params"]
        tokens = jnp.zeros((1, np.prod(self.transformer.grid)), jnp.int32)
        low = None
        if self.superres:
            low = jnp.zeros((1, np.prod(self.transformer.low_grid)), jnp.int32)
            if self.low_tokenizer is not None:
                params["low_tokenizer"] = self.low_tokenizer.init(keys[2], image)["params"]
        args = self._arguments(tokens, low, self._told(params, first), None)
        made = self.transformer.init(keys[3], *args, method=self._method, **self._codes(params))
        return params | {"transformer": made["params"]}

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: cross-entropy of the masked tokens, averaged over all of the batch's masked tokens.

        NaN, which ends a training, where a label is no class.
        """
        fraction_key, mask_key, drop_key, noise_key, dropout_key = jax.random.split(key, 5)
        tokens, low = self._tokens(params, batch["image"])
        b = tokens.shape[0]
        fraction = schedules.sample_fraction(fraction_key, (b,), self.schedule)
        masked, mask = schedules.mask_tokens(mask_key, tokens, fraction, self.mask_id)
        if low is not None and self.low_noise:
            low = self._corrupt(noise_key, low)
        keep = jax.random.uniform(drop_key, (b,)) >= self.text_drop
        told = self._told(params, batch, train=ctx.train, key=dropout_key)
        logits = self._predict(params, masked, low, told, keep, train=ctx.train, rngs={"dropout": dropout_key})
        value, accuracy = self._cross_entropy(logits, tokens, mask, self.label_smoothing)
        if self.classes:
            known = (batch["label"] >= 0) & (batch["label"] < self.classes)
            value = jnp.where(known.all(), value, jnp.nan)
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

    def _told(self, params, conds, prefix="text", **kwargs) -> dict[str, Any]:
        """What the transformer is told, [b, ...]: {"label"}, or {"states", "mask"} of the texts of that name."""
        if self.classes:
            return {"label": conds["label"]}
        return dict(zip(("states", "mask"), self._read(params, conds[prefix], conds[f"{prefix}_mask"], **kwargs)))

    def _read(self, params, text, mask, train=False, key=None):
        """(text states, text mask); encoders return states, or states and mask."""
        kwargs = dict(train=True, rngs={"dropout": key}) if train and self.train_text else {}
        out = self.text_encoder.apply({"params": params["text_encoder"]}, text, mask, **kwargs)
        return out if isinstance(out, tuple) else (out, mask)

    @property
    def _method(self) -> str:
        return "image_logits" if self.classes else "__call__"

    def _predict(self, params, tokens, low, told, keep, **kwargs):
        args = self._arguments(tokens, low, told, keep)
        kwargs |= self._codes(params)
        return self.transformer.apply({"params": params["transformer"]}, *args, method=self._method, **kwargs)

    def _codes(self, params) -> dict[str, Any]:
        """The codebooks that a transformer with by_codes is told."""
        if not getattr(self.transformer, "by_codes", False):
            return {}
        codes = {"codes": params["tokenizer"]["quantizer"]["codebook"]}
        return codes | ({"low_codes": params[self._low_name]["quantizer"]["codebook"]} if self.superres else {})

    def _arguments(self, tokens, low, told, keep) -> tuple:
        """What the transformer is called with."""
        said = (told["label"],) if self.classes else (told["states"], told["mask"])
        return (tokens, *([] if low is None else [low]), *said, keep)

    # ----------------------------------------------------------------------------------------------------- sampling

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, guidance_scale=4.0, steps=24, temperature=1.0,
        choice_temperature=4.5, revise=0.0, revise_temperature=0.3,
    ) -> dict[str, Any]:  # fmt: skip
        """{"tokens": int32 [b, n], "image_out": uint8 [b, size, size, 3]} by parallel decoding; knobs may be
        traced.

        conds: text, text_mask [b, l], or label [b]; optional negative, negative_mask [b, l] (in the place of no text);
        tokens [b, m] of the stage before, for super-resolution; optional image uint8 [b, h, w, 3] to edit and mask bool
        [b, h, w], True where it is made anew: inpainting, outpainting, or with another label the replacement of what is
        there.  An image without a mask is edited by text or class alone, in the base model (`edit.maskfree`);
        super-resolution then starts from nothing but the new low-resolution tokens.
        guidance_scale: t of p = (1 + t) conditional - t unconditional at the last step, rising linearly from 0; of no
        effect where training never left out a class.
        steps: at most max_steps.
        revise: share of the steps that are left, when all is decoded, to find half of the tokens again each, at
        revise_temperature (`parallel.second_thoughts`); 0 as published.
        """
        b = conds[self.conditions[0]].shape[0]
        low = conds["tokens"] if self.superres else None
        denoise = self._denoiser(params, conds, low, self._weights(guidance_scale))
        decoding, heat, hook = steps, temperature, None
        if not (isinstance(revise, (int, float)) and revise == 0):  # a traced share may be 0, too
            decoding = steps - jnp.floor(revise * steps + 1e-4).astype(jnp.int32)
            heat = lambda step: jnp.where(step.t < 1, temperature, revise_temperature)
            hook = parallel.second_thoughts(self.mask_id)
        sampler = self._sampler(decoding, heat, choice_temperature)
        n = int(np.prod(self.transformer.grid))
        edit = Edit(
            start=jnp.full((b, n), self.mask_id, jnp.int32),
            times=parallel.grid(decoding, self.max_steps, self.schedule), hook=hook,
        )  # fmt: skip
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
        """Guided logits: the text and its absence (or a negative text), in one batched call; so of a class, if training
        ever left it out.
        """
        b = conds[self.conditions[0]].shape[0]
        more = {"keep": jnp.ones(b, bool)} | ({} if low is None else {"low": low})
        cond = {"told": self._told(params, conds)} | more

        def apply(x, step, c):
            return Prediction(self._predict(params, x, c.get("low"), c["told"], c["keep"]))

        if self._always_told:
            return lambda x, step: apply(x, step, cond)
        if "negative" in conds:
            other = cond | {"told": self._told(params, conds, "negative")}
        else:
            other = cond | {"keep": jnp.zeros(b, bool)}
        return guidance.mix(apply, [cond, other], weights)

    def _edit(self, params, conds, low, edit, denoise, steps):
        """(edit, denoiser, number of steps) for an image with a mask (inpainting) or without (mask-free)."""
        if "mask" in conds:
            tokens = self._tokenize(params, "tokenizer", self._at(image_ops.to_float(conds["image"]), self.size))
            anew = inpaint_tokens.token_mask(self._mask_at(conds["mask"]), self.transformer.grid)
            start = inpaint_tokens.inpaint(tokens, anew, self.mask_id).start
            if self.edit_from:
                left_out = jnp.floor(self.edit_from * steps + 1e-4).astype(jnp.int32)
                edit = dataclasses.replace(edit, times=jax.tree.map(lambda x: jnp.roll(x, -left_out), edit.times))
                steps = steps - left_out
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
        """Cross-entropy (nats, no smoothing) and accuracy of masked tokens, with text and without; so of a class, if
        training ever left it out.

        Protocol: masked fractions evenly spread over the schedule, one mask per example, the same for every call.
        """

        def measure(params, batch, key):
            tokens, low = self._tokens(params, batch["image"])
            b = tokens.shape[0]
            fraction = schedules.mask_fraction((jnp.arange(b) + 0.5) / b, self.schedule)
            masked, mask = schedules.mask_tokens(key, tokens, fraction, self.mask_id)
            told, scores = self._told(params, batch), {}
            without = {"_no_class" if self.classes else "_no_text": False}
            ways = {"": True} | ({} if self._always_told else without)
            for name, keep in ways.items():
                logits = self._predict(params, masked, low, told, jnp.full(b, keep))
                scores[f"loss{name}"], scores[f"accuracy{name}"] = self._cross_entropy(logits, tokens, mask, 0.0)
            return scores

        run, rows = jax.jit(measure), []
        for i, batch in enumerate(batches):
            seen = {name: batch[name] for name in ("image", *self.conditions)}
            rows.append(run(params, seen, jax.random.fold_in(key, i)))
        if not rows:
            raise ValueError("MaskedTokens.evaluate: no batches; the evaluation data is empty")
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"samples": images of the batch's first texts or classes (super-resolution: from the true low-resolution
        tokens)}.
        """
        count = min(8, len(batch["image"]))
        conds = {name: batch[name][:count] for name in self.conditions}

        def draw(params, conds, image):
            low = self._tokens(params, image)[1]
            conds = conds if low is None else conds | {"tokens": low}
            return self.sample(params, key, conds, steps=min(24, self.max_steps))["image_out"]

        pictures = jax.jit(draw)(params, conds, batch["image"][:count])
        return {"samples": image_ops.grid(whole(pictures), columns=4)}
