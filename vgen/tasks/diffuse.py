"""Diffusion of pictures or of an autoencoder's latents: unconditional, by class or by text; trained and sampled.

Sources: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021; Ho & Salimans 2022 (classifier-free guidance); Rombach et al.
2022 (latent diffusion).  The parts are those of `vgen.diffusion`; what a system adds is its network and its settings.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vgen import guidance
from vgen.data import images as image_ops
from vgen.diffusion import losses as objectives
from vgen.diffusion import predictions, solvers, times
from vgen.diffusion.schedules import Schedule
from vgen.edit import compose, from_image
from vgen.layers import attention
from vgen.models.autoencoder import AutoencoderKL
from vgen.tasks import cached
from vgen.types import Batch, Context, Edit, Loss, Params

THRESHOLDS = ("none", "clip", "dynamic")


@dataclasses.dataclass(frozen=True)
class Diffuse:
    """Denoise pictures, or their latents, under no condition, a class, a text.

    network: called as (x, t, **conditions): UNet, DiT, PixArt.  schedule: its noise; `time_scale` times its times are
      what the network is told.  prediction, variance: see `diffusion.predictions`.
    size: pixels of the pictures.  vae: the frozen first stage, or None for diffusion of pixels.
    scale_by_std: latents are divided by the standard deviation of the first training batch (Rombach et al. 2022, D.1),
      kept below `latents`; for a vae that was trained along, whose scale nobody knows.
    classes: of the labels; the network has one class more, which stands for none, where `drop` is not 0.  A network
      whose num_classes is None is not told them: they are then the classifier's alone.
    text_encoder: called as (tokens, mask) -> states, (states, mask) or {context, context_mask, pooled}; its parameters
      train along when `train_text`, else they are frozen.  empty, pad_id: ids of the empty text, and of the padding.
    zero_empty: no text is zeros, in the place of what the encoder says of the empty text (SDXL's published sampling).
    micro: numbers that the network is told of a picture: "none", "size" (PixArt-alpha) or "crop" (SDXL).
    drop: share of the samples trained without their condition.
    weight: of the loss, arguments of `objectives.weight_of`.  draw: of the times, arguments of `times.sample_times`.
    bound: weight of a learned variance's variational bound, see `objectives.hybrid_loss`.  offset: of offset noise.
    solver, solver_knobs, grid_knobs, max_steps: see `solvers.solver`.
    pure_start: sampling begins from sigma times the noise, without the alpha of the first row (k-diffusion's samplers).
    threshold: of x0 while sampling: "none", "clip" to [-1, 1], or "dynamic".  rescale: phi of `guidance.rescaled`.
    classifier: of noised pictures with logits over `classes`, frozen below `classifier`; for the knob classifier_scale.
    image_edit: what is done with a picture to edit, see `vgen.edit.from_image`.
    method: an Edit of all sampling, or a function (conds, steps) -> Edit of a batch's; behind all other edits.
    picture: pixels (height, width) of what is sampled, `size` both by default.

    Parameters: network and, where there are such parts, vae, text_encoder, classifier, latents {scale}.  A batch may
    hold features (see `vgen.tasks.cached`) in the place of image and text.
    Raises ValueError for settings that contradict each other.
    """

    network: nn.Module
    schedule: Schedule
    size: int
    prediction: str = "eps"
    variance: str | None = None
    time_scale: float = 1.0
    vae: AutoencoderKL | None = None
    scale_by_std: bool = False
    classes: int = 0
    text_encoder: nn.Module | None = None
    train_text: bool = False
    empty: tuple[int, ...] = (1,)
    pad_id: int = 0
    zero_empty: bool = False
    micro: str = "none"
    drop: float = 0.1
    weight: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "simple"})
    draw: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bound: float = 1e-3
    offset: float = 0.0
    solver: str = "ddim"
    solver_knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid_knobs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_steps: int = 100
    pure_start: bool = False
    threshold: str = "none"
    rescale: float = 0.0
    classifier: nn.Module | None = None
    image_edit: Callable[..., Edit] = from_image.usual
    method: Any = None
    picture: tuple[int, int] | None = None

    def __post_init__(self):
        predictions.kind_of(self.prediction)
        objectives.weight_of(**self.weight)
        if self.solver not in solvers.SOLVERS:
            raise ValueError(f"Diffuse: solver must be one of {', '.join(solvers.SOLVERS)}, got {self.solver!r}")
        if self.threshold not in THRESHOLDS:
            raise ValueError(f"Diffuse: threshold must be one of {', '.join(THRESHOLDS)}, got {self.threshold!r}")
        if self.micro not in ("none", "size", "crop"):
            raise ValueError(f"Diffuse: micro must be none, size or crop, got {self.micro!r}")
        if self.classifier is not None and not self.classes:
            raise ValueError("Diffuse: a classifier needs classes, the number of its labels")
        rows, needed = getattr(self.network, "label_rows", None), self.classes + bool(self.drop)
        if self.classes and rows is not None and rows < needed:
            raise ValueError(
                f"Diffuse: the network has {rows} labels, {self.classes} classes{' and none' * bool(self.drop)} need "
                f"{needed}; give it num_classes={needed - rows + self.network.num_classes}, or drop=0"
            )
        factor = self.vae.downsampling if self.vae is not None else 1
        if self.size < 1 or self.size % factor:
            raise ValueError(f"Diffuse: size {self.size} must be a multiple of the vae's {factor} pixels per latent")
        if self.schedule.length is not None and not 1 <= self.max_steps <= self.schedule.length:
            raise ValueError(f"Diffuse: max_steps must be in 1..{self.schedule.length}, got {self.max_steps}")

    @property
    def conditional(self) -> bool:
        return bool(self.classes) or self.text_encoder is not None

    @property
    def groups(self) -> dict[str, str]:
        network = r"network/(?!null_context).*"
        return {"main": rf"{network}|text_encoder/.*" if self.train_text else network}

    @property
    def buffers(self) -> str:
        own = getattr(self.network, "null_tokens", 0)  # PixArt's null context stays as it was drawn
        kept = {"latents/scale": self.scale_by_std, "network/null_context": own}
        return "|".join(name for name, there in kept.items() if there)

    def latent_shape(self, shape: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(height, width, channels) of x for pictures of `shape` pixels, of `size` by default."""
        height, width = shape or (self.size, self.size)
        factor = 1 if self.vae is None else self.vae.downsampling
        if height % factor or width % factor:
            raise ValueError(f"Diffuse: a picture of {height} x {width} is no multiple of {factor} pixels per latent")
        return height // factor, width // factor, 3 if self.vae is None else self.vae.latent_channels

    def init(self, key, batch: Batch) -> Params:
        """All parameters, the frozen ones too (of the right shapes), but for those that a batch of features spares."""
        keys = jax.random.split(key, 4)
        image, t = jnp.zeros((1, self.size, self.size, 3)), jnp.zeros(1)
        params = {"latents": {"scale": jnp.ones(())}} if self.scale_by_std else {}
        if self.vae is not None and "latent_mean" not in batch:
            params["vae"] = self.vae.init(keys[0], image)["params"]
        if self.null_text and "context" in batch:
            params["empty"] = {name: jnp.zeros_like(x[0]) for name, x in cached.text(batch).items()}
        elif self.text_encoder is not None and "context" not in batch:
            text = batch["text"][:1], batch["text_mask"][:1]
            params["text_encoder"] = self.text_encoder.init(keys[1], *text)["params"]
        if self.classifier is not None:
            params["classifier"] = self.classifier.init(keys[2], jnp.zeros((1, *self.latent_shape())), t)["params"]
        one = {name: value[:1] for name, value in batch.items()}
        cond = self.condition(params, one, jnp.ones(1, bool))
        x = jnp.zeros((1, *self.latent_shape()))
        extra = cond.pop("beside", None)
        x = x if extra is None else jnp.concatenate([x, extra], -1)
        return params | {"network": self.network.init(keys[3], x, t, **cond)["params"]}

    # --------------------------------------------------------------------------------------------------- conditions

    def condition(self, params: Params, batch: Batch, keep, train: bool = False, key=None) -> dict[str, Any]:
        """What the network is called with beside x and t; where keep [b] is False, the absence of a condition.

        batch: label [b]; text, text_mask [b, l], or features of them; optional beside [b, h, w, c], further channels of
        the input; optional original, corner, target [b, 2], the sizes and crops of `micro`, in pixels (height, width).
        """
        cond, b = {}, keep.shape[0]
        if self.classes and getattr(self.network, "num_classes", self.classes) is not None:
            cond["labels"] = jnp.where(keep, batch["label"], self.classes) if self.drop else batch["label"]
        if self.text_encoder is not None:
            said = self._said(params, batch, keep, train and self.train_text, key)
            if self.zero_empty:
                said |= {k: v * predictions.spread(keep, v) for k, v in said.items() if k in ("context", "pooled")}
            cond |= said
            if not self.null_text:
                cond["keep_context"] = keep
        size = jnp.full((b, 2), float(self.size))
        pooled = cond.pop("pooled", None)
        if self.micro == "size":
            size = batch.get("original", size)
            target = batch.get("target", size)  # in training, the ratio is that of the bucket
            cond |= {"size": size, "aspect": target[:, 0] / target[:, 1]}
        elif self.micro == "crop":
            numbers = [batch.get("original", size), batch.get("corner", 0 * size), batch.get("target", size)]
            cond["added"] = (pooled, jnp.concatenate(numbers, -1))
        if "beside" in batch:
            cond["beside"] = batch["beside"]
        return cond

    def _said(self, params, batch, keep, train, key):
        """What the text encoder says, or said, of the texts that are kept; of the empty text elsewhere."""
        if "context" in batch:
            said = cached.text(batch)
            return cached.dropped(said, params["empty"], keep) if self.null_text else said
        tokens, mask = jnp.asarray(batch["text"]), jnp.asarray(batch["text_mask"])
        if self.null_text:
            tokens, mask = self.empty_text(tokens, mask, keep)
        kwargs = dict(train=True, rngs={"dropout": key}) if train else {}
        return cached.named(self.text_encoder.apply({"params": params["text_encoder"]}, tokens, mask, **kwargs), mask)

    @property
    def null_text(self) -> bool:
        """Whether the empty text stands for none; PixArt has a null context of its own."""
        return self.text_encoder is not None and not getattr(self.network, "null_tokens", 0)

    def empty_text(self, tokens, mask, keep):
        """The empty text where keep is False."""
        length = tokens.shape[1]
        empty = jnp.asarray((*self.empty, *[self.pad_id] * length)[:length], tokens.dtype)
        seen = jnp.arange(length) < len(self.empty)
        return jnp.where(keep[:, None], tokens, empty), jnp.where(keep[:, None], mask, seen)

    def denoiser(self, params: Params, control=None):
        """(x, step, condition) -> Prediction, the network as `guidance.mix` takes it.

        What the control keeps is in aux {"kept": ...}, see `attention.kept`.
        """

        def network(x, t, cond, step):
            return self._network(params, x, t, cond, control=control, step=step)

        def denoise(x, step, cond):
            told = lambda x, t: network(x, t, cond, step)
            return predictions.denoiser(
                told, self.prediction, variance=self.variance, time=lambda step: step.t * self.time_scale
            )(x, step)

        return denoise

    def _network(self, params, x, t, cond, **kwargs):
        cond = dict(cond)
        extra = cond.pop("beside", None)
        x = x if extra is None else jnp.concatenate([x, extra.astype(x.dtype)], -1)
        params, control = {"params": params["network"]}, kwargs.get("control")
        if control is None or not control.keep:
            return self.network.apply(params, x, t, **cond, **kwargs)
        raw, collections = self.network.apply(params, x, t, **cond, **kwargs, mutable=["kept"])
        return raw, {"kept": attention.kept(collections)}

    # ------------------------------------------------------------------------------------------------------ latents

    def encode(self, params: Params, images, key=None):
        """x0 [b, h, w, c] of uint8 images: the pictures, or latents, drawn with a key and the mode without."""
        return self._latents(params, self.pixels(images), key)

    def pixels(self, images, bucketed: bool = False):
        """float [b, h, w, 3] in [-1, 1] of uint8 images; squares of a multiple of the size shrink to it.

        bucketed: these are of the size that they are to have.
        Raises ValueError for those of a bucket that is no multiple of the pixels per latent.
        """
        x = image_ops.to_float(images)
        if bucketed:
            self.latent_shape(x.shape[1:3])
        elif x.shape[1] != self.size and x.shape[1] % self.size == 0 and x.shape[1] == x.shape[2]:
            x = image_ops.downsample(x, x.shape[1] // self.size)
        return x

    def _x0(self, params, batch: Batch, key=None):
        """`encode` of a batch: of its latents, or its pictures."""
        if "latent_mean" in batch:
            return self._normal(params, cached.latents(batch, key))
        return self._latents(params, self.pixels(batch["image"], "target" in batch), key)

    def _latents(self, params, x, key=None):
        """The same of pictures in [-1, 1]."""
        if self.vae is None:
            return x
        posterior = self.vae.apply({"params": jax.lax.stop_gradient(params["vae"])}, x, method="encode")
        return self._normal(params, posterior.mode() if key is None else posterior.sample(key))

    def _normal(self, params, z):
        z = self.vae.normalize(z)
        return z * params["latents"]["scale"] if self.scale_by_std else z

    def beside(self, params: Params, image, mask):
        """float [b, h, w, 1 + c], what networks made for inpainting see beside x: the mask, latents of what is kept.

        image: uint8 [b, height, width, 3].  mask: bool [b, height, width], True where it is made anew; a place has the
        mask of its first pixel.  It is the condition `beside` of Stable Diffusion's networks with nine channels.
        """
        mask = jnp.asarray(mask)
        z = self._latents(params, jnp.where(mask[..., None], 0.0, image_ops.to_float(image)))
        rows, columns = mask.shape[1] // z.shape[1], mask.shape[2] // z.shape[2]
        return jnp.concatenate([mask[:, ::rows, ::columns, None].astype(z.dtype), z], -1)

    def decode(self, params: Params, x0):
        """Pictures [b, h, w, 3] in [-1, 1] of x0."""
        if self.vae is not None:
            z = self.vae.denormalize(x0 / params["latents"]["scale"] if self.scale_by_std else x0)
            x0 = self.vae.apply({"params": params["vae"]}, z, method="decode")
        return jnp.clip(x0, -1, 1)

    feature_parts, features, empty_features = cached.feature_parts, cached.features, cached.empty_features  # methods

    # ------------------------------------------------------------------------------------------------------- losses

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: the weighted error of the prediction, with the bound of the variance where it is learned."""
        latent_key, time_key, noise_key, drop_key, dropout_key = jax.random.split(key, 5)
        x0 = self._x0(params, batch, latent_key)
        updates = {}
        if self.scale_by_std:
            factor = jnp.where(ctx.step == 0, 1 / jnp.std(x0), 1.0)
            x0, updates = x0 * factor, {"latents/scale": params["latents"]["scale"] * factor}
        b = x0.shape[0]
        t = times.sample_times(time_key, b, self.schedule, **self.draw)
        noised = objectives.diffuse(noise_key, x0, self.schedule, t, offset=self.offset)
        keep = jax.random.uniform(drop_key, (b,)) >= self.drop
        cond = self.condition(params, batch, keep, ctx.train, dropout_key)
        rngs = {"dropout": jax.random.fold_in(dropout_key, 1)}
        each, metrics = self._errors(params, noised, cond, train=ctx.train, rngs=rngs)
        return {"main": Loss(each.mean(), {name: value.mean() for name, value in metrics.items()}, updates)}

    def _errors(self, params, noised: objectives.Noised, cond, **kwargs):
        """(loss [b], its parts {name: [b]})."""
        kind = predictions.kind_of(self.prediction)
        x, t = kind.inputs(noised.x, noised.step)
        raw = self._network(params, x.astype(noised.x.dtype), t * self.time_scale, cond, **kwargs)
        raw = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
        weight = objectives.weight_of(**self.weight)
        if self.variance is None:
            each = objectives.loss(raw, noised, kind, weight)
            return each, {}
        return objectives.hybrid_loss(
            raw, noised, self.schedule, kind, variance=self.variance, factor=self.bound, weight=weight
        )

    # ----------------------------------------------------------------------------------------------------- sampling

    def sample(
        self, params: Params, key, conds: Mapping[str, Any], *, guidance_scale=3.0, steps=50, strength=0.6,
        classifier_scale=0.0, edit: Edit | None = None, shape: tuple[int, int] | None = None, start=None,
        batch_size: int | None = None, states: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """{"image_out": uint8 [b, h, w, 3], "latents": x0}; guidance_scale, steps, strength and classifier_scale may
        be traced.

        conds: label [b]; text, text_mask [b, l]; optional negative, negative_mask (in the place of no text); what else
        `condition` reads.  Optional image uint8 [b, h, w, 3] to edit, and mask bool [b, h, w], True where it is made
        anew, for `image_edit`: by default with a mask RePaint's replacement, without one SDEdit from `strength` of the
        way up.
        guidance_scale: s of uncond + s (cond - uncond); 1 is the condition alone.  steps: at most max_steps.
        edit: further Edit around the loop.  shape: pixels (height, width) of the pictures, `picture` by default.
        start: the noise to begin from, of variance 1.  batch_size: the number of pictures, where no condition tells it.
        states: also return "states", what the hooks of the edits end with, for `edit.maps.average`.
        """
        b = len(next(iter(conds.values()))) if conds else batch_size or 1
        shape = shape or self.picture
        if shape is not None:
            told = jnp.broadcast_to(jnp.asarray(shape, float), (b, 2))
            conds = {"original": told, "target": told, **conds}
        edits = [self._edit(params, conds, strength)] if "image" in conds else []
        method = self.method(conds, steps) if callable(self.method) else self.method
        edit = compose.compose(*edits, *(each for each in (edit, method) if each is not None))
        denoise = self._guided(params, conds, b, guidance_scale, edit.control)
        guide = self._classifier(params, conds, classifier_scale)
        knobs = dict(self.solver_knobs)
        if self.threshold != "none":
            denoise = guidance.clip(denoise) if self.threshold == "clip" else guidance.dynamic_threshold(denoise)
        if guide is not None and self.solver == "ddpm":
            knobs["guide"] = guide
        elif guide is not None:  # behind the threshold, as in openai/guided-diffusion (ddim_sample)
            denoise = guidance.steer(denoise, guide)
        sampler, grid = solvers.solver(
            self.solver, self.schedule, steps, self.max_steps, knobs, edit.times, **self.grid_knobs
        )
        start_key, key = jax.random.split(key)
        if start is None:
            start = jax.random.normal(start_key, (b, *self.latent_shape(shape)))
        if self.pure_start:
            start = grid.sigma[0] * start
        elif self.schedule.length is None:
            start = jnp.hypot(grid.alpha[0], grid.sigma[0]) * start
        edit = dataclasses.replace(edit, times=None)
        x0, ended = compose.run(edit, denoise, sampler, grid, key, start, states=True)
        out = {"image_out": image_ops.to_uint8(self.decode(params, x0)), "latents": x0}
        return out | {"states": ended} if states else out

    def _guided(self, params, conds, b, scale, control):
        """The denoiser under classifier-free guidance: condition and its absence in one batched call."""
        apply = self.denoiser(params, control)
        cond = self.condition(params, conds, jnp.ones(b, bool))
        if not self.conditional or not self.drop:
            return lambda x, step: apply(x, step, cond)
        if "negative" in conds:
            other = {**conds, "text": conds["negative"], "text_mask": conds["negative_mask"]}
            null = self.condition(params, other, jnp.ones(b, bool))
        else:
            null = self.condition(params, conds, jnp.zeros(b, bool))
        return guidance.mix(apply, [cond, null], guidance.cfg(scale), self.rescale or None, self.prediction)

    def _classifier(self, params, conds, scale):
        """Gradient of the classifier's log-probability of the labels, or None."""
        if self.classifier is None:
            return None

        def log_prob(x, step):
            t = jnp.broadcast_to(step.t * self.time_scale, x.shape[:1])
            logits = self.classifier.apply({"params": params["classifier"]}, x, t)
            return jnp.take_along_axis(jax.nn.log_softmax(logits), conds["label"][:, None], 1)[:, 0]

        return guidance.classifier(log_prob, scale)

    def _edit(self, params, conds, strength) -> Edit:
        image = self.encode(params, conds["image"])
        known = 1 - _shrunk(conds["mask"], image.shape[1:3]) if "mask" in conds else None
        return self.image_edit(image, known, strength, self.schedule)

    # -------------------------------------------------------------------------------------------------- measurement

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """The loss on held-out data, with the condition and without.

        Protocol: times evenly spread, one per example, noise the same for every call, latents the mode.
        """

        def measure(params, batch, key):
            x0 = self._x0(params, batch)
            b = x0.shape[0]
            t = times.place((jnp.arange(b) + 0.5) / b, self.schedule)
            noised = objectives.diffuse(key, x0, self.schedule, t)
            scores, kinds = {}, {"": True}
            if self.conditional and self.drop:
                kinds["_no_condition"] = False
            for name, keep in kinds.items():
                each, parts = self._errors(params, noised, self.condition(params, batch, jnp.full(b, keep)))
                scores[f"loss{name}"] = each.mean()
                scores |= {f"{part}{name}": value.mean() for part, value in parts.items()}
            return scores

        run, rows = jax.jit(measure), []
        wanted = ("image", "text", "text_mask", "label", "original", "corner", "target", "beside")
        wanted += (*cached.LATENTS, *cached.TEXT)
        for i, batch in enumerate(batches):
            rows.append(run(params, {k: batch[k] for k in wanted if k in batch}, jax.random.fold_in(key, i)))
        if not rows:
            raise ValueError("Diffuse.evaluate: no batches; the evaluation data is empty")
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _shrunk(mask, shape):
    """bool [b, h, w] -> float [b, height, width, 1]: 1 where any pixel of a place is masked."""
    b, (rows, columns) = mask.shape[0], shape
    mask = mask.reshape(b, rows, mask.shape[1] // rows, columns, mask.shape[2] // columns)
    return mask.any((2, 4))[..., None].astype(jnp.float32)
