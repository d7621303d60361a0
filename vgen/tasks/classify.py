"""Train a network to tell the class of a picture, clean or, for guidance of a diffusion model, at any of its noises.

Sources: Dhariwal & Nichol 2021 (ADM, arXiv:2105.05233), section 4, for noised pictures; Szegedy et al. 2016
(arXiv:1512.00567), section 7, for smoothed labels; Zhang et al. 2017 (arXiv:1710.09412) for Mixup; Steiner et al. 2021
(AugReg, arXiv:2106.10270) and Dosovitskiy et al. 2020 (ViT, arXiv:2010.11929) for what ViT is trained with.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vgen.data import images as image_ops
from vgen.diffusion import losses as objectives
from vgen.diffusion import times
from vgen.diffusion.schedules import Schedule
from vgen.types import Batch, Context, Loss, Params


@dataclasses.dataclass(frozen=True)
class Classify:
    """Pictures in, their classes out, by cross-entropy.

    network: called as (x) or, with a schedule, (x, t); gives logits [b, classes], or an object that holds `logits`.
    classes: of the labels.  smoothing: share of the target that is spread evenly over all classes.
    loss: "softmax", or "sigmoid": every class for itself, the sum over them, as ViT has it on ImageNet-21k and JFT.
    mixup: alpha of Beta(alpha, alpha), from which a training batch's share of its own picture and label is drawn; the
      rest is the batch's next one (0: none).
    schedule: the pictures are noised by it, at times of `draw`, and the network is told `time_scale` times the time;
      all three as of the `Diffuse` that it is to guide.  draw: arguments of `times.sample_times`.

    Parameters: network; with the stage's `part="network"`, they are what Diffuse has below `classifier`.
    Raises ValueError for settings that contradict each other.
    """

    network: nn.Module
    classes: int
    smoothing: float = 0.0
    loss: str = "softmax"
    mixup: float = 0.0
    schedule: Schedule | None = None
    time_scale: float = 1.0
    draw: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    groups = {"main": r"network/.*"}
    buffers = ""

    def __post_init__(self):
        if self.classes < 2:
            raise ValueError(f"Classify: classes must be at least 2, got {self.classes}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Classify: smoothing must be in [0, 1), got {self.smoothing}")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"Classify: loss must be 'softmax' or 'sigmoid', got {self.loss!r}")
        if self.mixup < 0:
            raise ValueError(f"Classify: mixup must be at least 0, got {self.mixup}")
        if self.schedule is None and (self.draw or self.time_scale != 1):
            raise ValueError("Classify: draw and time_scale are of noised pictures; they need a schedule")

    def init(self, key, batch: Batch) -> Params:
        t = () if self.schedule is None else (jnp.zeros(1),)
        return {"network": self.network.init(key, image_ops.to_float(batch["image"][:1]), *t)["params"]}

    def logits(self, params: Params, x, t=None, **kwargs):
        """[b, classes], float32 or wider, of pictures x in [-1, 1] at times t [b] of the schedule.

        kwargs: further arguments of the network.  Raises ValueError where the network has other classes.
        """
        told = () if self.schedule is None else (t * self.time_scale,)
        out = self.network.apply({"params": params["network"]}, x, *told, **kwargs)
        out = getattr(out, "logits", out)
        if out is None or out.shape != (x.shape[0], self.classes):
            got = "none" if out is None else out.shape
            raise ValueError(f"Classify: the network must give logits {(x.shape[0], self.classes)}, got {got}")
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))

    def score(self, params: Params, conds: Mapping[str, Any]):
        """Log probabilities [b] of conds["label"] on conds["image_out"], uint8 of the size that the network takes."""
        x = image_ops.to_float(conds["image_out"])
        t = None if self.schedule is None else times.place(jnp.zeros(len(x)), self.schedule)
        return -cross_entropy(self.logits(params, x, t), conds["label"])

    def _noised(self, key, x, t):
        """(x, t) as `logits` takes them: x at times t, or as it is."""
        return (x,) if self.schedule is None else (objectives.diffuse(key, x, self.schedule, t).x, t)

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: the cross-entropy; its metrics are accuracy and, of more than five classes, accuracy_5, both of the
        batch's own labels.
        """
        time_key, noise_key, dropout_key, mixup_key = jax.random.split(key, 4)
        x, label, share = image_ops.to_float(batch["image"]), batch["label"], None
        if self.mixup and ctx.train:
            share = jax.random.beta(mixup_key, self.mixup, self.mixup, dtype=x.dtype)
            share = jnp.maximum(share, 1 - share)
            x = share * x + (1 - share) * jnp.roll(x, -1, axis=0)
        t = None
        if self.schedule is not None:
            t = times.sample_times(time_key, x.shape[0], self.schedule, **self.draw)
        x = self._noised(noise_key, x, t)
        logits = self.logits(params, *x, train=ctx.train, rngs={"dropout": dropout_key})
        right = {name: hit.mean() for name, hit in hits(logits, label).items()}
        each = cross_entropy(logits, label, self.smoothing, self.loss)
        if share is not None:
            other = cross_entropy(logits, jnp.roll(label, -1, axis=0), self.smoothing, self.loss)
            each = share * each + (1 - share) * other
        return {"main": Loss(each.mean(), right)}

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Cross-entropy, without smoothing, and accuracies on held-out data.

        Protocol of noised pictures: times evenly spread, one per example, noise the same for every call; beside the
        means over all times, accuracy_quarter_1 .. 4 are of those in each quarter of the times, the clean one first.
        """

        def measure(params, batch, key):
            x, label = image_ops.to_float(batch["image"]), batch["label"]
            places = (np.arange(x.shape[0]) + 0.5) / x.shape[0]
            t = None if self.schedule is None else times.place(jnp.asarray(places), self.schedule)
            logits = self.logits(params, *self._noised(key, x, t))
            each = hits(logits, label)
            scores = {"cross_entropy": cross_entropy(logits, label, kind=self.loss)} | each
            for i in range(4 if self.schedule is not None else 0):
                if (inside := np.floor(places * 4) == i).any():
                    scores[f"accuracy_quarter_{i + 1}"] = each["accuracy"][inside]
            return {name: value.mean() for name, value in scores.items()}

        run = jax.jit(measure)
        rows = [
            run(params, {name: batch[name] for name in ("image", "label")}, jax.random.fold_in(key, i))
            for i, batch in enumerate(batches)
        ]
        if not rows:
            raise ValueError("Classify.evaluate: no batches; the evaluation data is empty")
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def cross_entropy(logits, label, smoothing: float = 0.0, kind: str = "softmax"):
    """[b], in nats: of the labels' distribution, a share `smoothing` of which is spread evenly over all classes.

    logits: [b, classes].  label: int [b]; NaN for one that is no class, which ends a training.
    kind: "softmax": -sum of target log p; "sigmoid": the sum over classes of the binary cross-entropies.
    """
    classes = logits.shape[1]
    known = (label >= 0) & (label < classes)
    target = (1 - smoothing) * jax.nn.one_hot(label, classes, dtype=logits.dtype) + smoothing / classes
    if kind == "sigmoid":
        each = -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits)).sum(1)
    else:
        each = -(target * jax.nn.log_softmax(logits)).sum(1)
    return jnp.where(known, each, jnp.nan)


def hits(logits, label) -> dict[str, Any]:
    """{"accuracy": bool [b]} and, of more than five classes, "accuracy_5": whether the label is among the first five.

    Of equal logits the classes with the smaller numbers come first.
    """
    counts = {"accuracy": 1} | ({"accuracy_5": 5} if logits.shape[1] > 5 else {})
    return {name: (jax.lax.top_k(logits, k)[1] == label[:, None]).any(1) for name, k in counts.items()}
