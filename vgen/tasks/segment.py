"""Train a promptable network for masks by interaction: clicks where it is wrong (Kirillov et al. 2023, SAM,
arXiv:2304.02643, section 3 and appendix A).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vgen.automatic_masks import Predictor, predictor
from vgen.data import images as image_ops
from vgen.data.preprocess import CLIP as CLIP_PREPROCESS
from vgen.data.preprocess import IMAGENET, Preprocess
from vgen.hosts import whole
from vgen.metrics import segment_eval
from vgen.models import sam_prompt
from vgen.models.clip import CLIP, unit
from vgen.models.sam import SAM
from vgen.models.sam_decoder import Masks
from vgen.types import Batch, Context, Loss, Params


def focal_loss(
    logits: Float[Array, "*b h w"], truth: Float[Array, "*c h w"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*b"]:
    """Cross-entropy of each pixel times (1 - p)^gamma, p being the probability of what is true; the mean of a mask.

    alpha: weight of the object's pixels, 1 - alpha that of the others (Lin et al. 2017, eq. 5).  truth: 0 or 1.
    """
    log_p = jax.nn.log_sigmoid(jnp.where(truth > 0.5, logits, -logits))
    weight = jnp.where(truth > 0.5, alpha, 1 - alpha)
    return (-weight * (1 - jnp.exp(log_p)) ** gamma * log_p).mean((-2, -1))


def dice_loss(logits: Float[Array, "*b h w"], truth: Float[Array, "*c h w"]) -> Float[Array, "*b"]:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) of each mask (Milletari et al. 2016, smoothed as in MaskFormer)."""
    p = jax.nn.sigmoid(logits)
    both, each = (p * truth).sum((-2, -1)), p.sum((-2, -1)) + truth.sum((-2, -1))
    return 1 - (2 * both + 1) / (each + 1)


class Truth(NamedTuple):
    """masks: bool [b, p, m, m], of the side of the network's.  boxes: [b, p, 4] in pixels of the picture.  valid: bool
    [b, p], False where there is no mask to learn.
    """

    masks: jax.Array
    boxes: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class Segment:
    """A mask for each prompt: first a point or a box, then clicks on what is wrong, with the last mask fed back.

    A batch holds "masks", bool [b, n, size, size]: the objects' visible parts, empty ones for none (see
    `vgen.data.scenes.Scenes`); they may be smaller than the picture.  The image encoder runs once for each picture, the
    decoder once a round.

    network: a SAM.  masks: how many of a picture's masks are looked at in a step, drawn among those that are there.
    points: rounds with a new click behind the first one.  refinements: rounds without: the last one, and any others at
      random places before it.  8 and 2 in the paper.
    focal, dice, iou: weights of the losses; "mask" is focal + dice, of the best of three masks in the first round and
      of the one for clear prompts in the others, "iou" the squared error of what the network says of its masks' IoU,
      all of that round.  Rounds weigh the same, and no gradient leads from one to those before.
    alpha, gamma: of the focal loss, which the paper leaves open.
    boxes: how often the first prompt is a box.  largest: masks of a larger share of the picture are left out.
    remat: compute a round's activations again in the backward pass: memory of one round in the place of all.
    mean, std: of the pictures' channels in [0, 1], which the network gets normalised.
    clip: a CLIP, frozen, whose unit vector of a picture of the object takes the place of the first prompt for a share
      `told` of the objects (appendix D.5); a text by the same CLIP can stand there afterwards.  The network has its
      number of features as text_dim.  clip_size: pixels of what it sees, the square about the object's box, widened by
      1 to 2, and half of the time without what is outside of the mask.  Objects of less than a share `least` of the
      picture are told by none.  Unlike the paper's, the CLIP looks at all of its picture.
    clip_mean, clip_std: as mean and std.

    Parameters: network; clip where there is one.  Raises ValueError for masks that do not shrink to the network's, and
    for a network whose text_dim is not that of the CLIP.
    """

    network: SAM
    masks: int = 4
    points: int = 8
    refinements: int = 2
    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0
    boxes: float = 0.5
    largest: float = 0.9
    remat: bool = False
    mean: tuple[float, float, float] = IMAGENET["mean"]
    std: tuple[float, float, float] = IMAGENET["std"]
    clip: CLIP | None = None
    clip_size: int = 224
    told: float = 0.5
    least: float = 0.0
    clip_mean: tuple[float, float, float] = CLIP_PREPROCESS.mean
    clip_std: tuple[float, float, float] = CLIP_PREPROCESS.std

    groups = {"main": r"network/.*"}
    buffers = r"network/prompt_encoder/gaussian"  # drawn once

    def __post_init__(self):
        if self.masks < 1 or self.points < 0 or self.refinements < 0 or not 0 <= self.boxes <= 1:
            raise ValueError(
                f"Segment: masks must be at least 1, points and refinements 0 or more, boxes in [0, 1], got "
                f"masks={self.masks}, points={self.points}, refinements={self.refinements}, boxes={self.boxes}"
            )
        features = self.clip.text.features if self.clip is not None else 0
        if self.network.text_dim != features or not 0 <= self.told <= 1:
            raise ValueError(
                f"Segment: the network's text_dim must be the CLIP's number of features (0 without one) and told in "
                f"[0, 1], got text_dim={self.network.text_dim}, features={features}, told={self.told}"
            )

    @property
    def size(self) -> int:
        return self.network.image_size

    @property
    def side(self) -> int:
        """Of the network's masks, in pixels."""
        return 4 * (self.network.image_size // self.network.patch)

    def pixels(self, image) -> Float[Array, "b h w 3"]:
        """uint8 pictures as the network takes them."""
        return image_ops.standardise(image, self.mean, self.std)

    def init(self, key, batch: Batch) -> Params:
        prompt = sam_prompt.no_prompt((1, 1), 1)
        params = {"network": self.network.init(key, self.pixels(batch["image"][:1]), *prompt, slots=True)["params"]}
        if self.clip is not None:
            size, length = self.clip_size, self.clip.text.length
            seen = jnp.zeros((1, size, size, 3)), jnp.zeros((1, length), jnp.int32)
            params["clip"] = self.clip.init(jax.random.fold_in(key, 1), *seen)["params"]
        return params

    def encode(self, params: Params, image) -> Float[Array, "b h w c"]:
        """Embeddings of uint8 pictures, good for any number of prompts."""
        return self._apply(params, self.pixels(image), method="encode")

    def decode(self, params: Params, embedding, prompt: sam_prompt.Slots, logits=None, **kwargs) -> Masks:
        """Masks for prompts [b, p] on embeddings [b, ...]; logits: of the masks before.  kwargs: of `SAM.decode`."""
        points, labels = prompt
        return self._apply(params, embedding, points, labels, None, logits, method="decode", slots=True, **kwargs)

    def predictor(self, params: Params) -> Predictor:
        """What finds all masks of a picture: see `vgen.automatic_masks.generate`."""
        how = Preprocess(self.size, "long", "bilinear", pad=self.size, mean=self.mean, std=self.std)
        return predictor(self.network, params["network"], how)

    def _apply(self, params, *args, **kwargs):
        return self.network.apply({"params": params["network"]}, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------------- training

    def truth(self, masks, key) -> Truth:
        """What is learned from masks [b, n, size, size] in a step: `self.masks` of each picture, drawn at random."""
        masks = jnp.asarray(masks, bool)
        small = sam_prompt.shrunk(masks, self.side)
        area = small.mean((-2, -1), dtype=jnp.float32)
        valid = (area > 0) & (area <= self.largest)
        scale = self.size / masks.shape[-1]  # masks may be smaller than the picture
        boxes = sam_prompt.boxes_of(masks) * scale + jnp.array([0, 0, scale - 1, scale - 1], jnp.float32)
        if self.masks >= masks.shape[1]:
            return Truth(small, boxes, valid)
        chosen = jax.lax.top_k(valid + jax.random.uniform(key, valid.shape), self.masks)[1]
        take = lambda x: jnp.take_along_axis(x, chosen.reshape(chosen.shape + (1,) * (x.ndim - 2)), 1)
        return Truth(take(small), take(boxes), take(valid))

    def first_prompt(self, truth: Truth, key) -> sam_prompt.Slots:
        """A point inside of each object, or its box with noise."""
        keys = jax.random.split(key, 3)
        shape = truth.valid.shape
        boxed = jax.random.uniform(keys[0], shape) < self.boxes
        prompt = sam_prompt.no_prompt(shape, 1 + self.points)
        prompt = sam_prompt.with_boxes(prompt, sam_prompt.jittered(keys[1], truth.boxes, self.size), boxed)
        place = self.to_picture(sam_prompt.drawn_place(keys[2], truth.masks))
        return sam_prompt.with_click(prompt, place, jnp.ones(shape, bool), ~boxed)

    def words_of(self, params: Params, text, text_mask=None) -> Float[Array, "t d"]:
        """Unit vectors of tokens int [t, n]: prompts, as `decode` takes them by `text`."""
        return unit(self.clip.apply({"params": params["clip"]}, text, text_mask, method="encode_text").features)

    def sight_of(self, params: Params, image, truth: Truth, key) -> Float[Array, "b p d"]:
        """Unit vectors of the objects' pictures: see `clip`."""
        wide_key, alone_key = jax.random.split(key)
        wider = jax.random.uniform(wide_key, truth.valid.shape, minval=1.0, maxval=2.0)
        alone = jax.random.bernoulli(alone_key, 0.5, truth.valid.shape)
        pixels = image_ops.standardise(image, self.clip_mean, self.clip_std)
        seen = sam_prompt.crops(pixels, truth.masks, truth.boxes, wider, alone, self.clip_size)
        seen = seen.reshape(-1, *seen.shape[2:])
        features = self.clip.apply({"params": params["clip"]}, seen, method="encode_image").features
        return jax.lax.stop_gradient(unit(features)).reshape(*wider.shape, -1)

    def _say(self, params, image, truth: Truth, prompt: sam_prompt.Slots, key):
        """(the first prompts, without those that the CLIP takes the place of; what `decode` is told besides)."""
        if self.clip is None:
            return prompt, {}
        choose, key = jax.random.split(key)
        told = truth.masks.mean((-2, -1), dtype=jnp.float32) >= self.least
        told &= jax.random.bernoulli(choose, self.told, told.shape)
        none = sam_prompt.no_prompt(told.shape, prompt.labels.shape[-1] - sam_prompt.BOX_SLOTS)
        prompt = sam_prompt.Slots(
            jnp.where(told[..., None, None], none.points, prompt.points),
            jnp.where(told[..., None], none.labels, prompt.labels),
        )
        return prompt, dict(text=self.sight_of(params, image, truth, key), told=told)

    def to_picture(self, xy):
        """Places in the network's masks in pixels of the picture."""
        return (xy + 0.5) * (self.size / self.side) - 0.5

    def loss_of(self, out: Masks, truth: Truth) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """One round: (loss, logits [b, p, m, m] of the mask that the network likes best, metrics)."""
        target = truth.masks[:, :, None].astype(out.logits.dtype)
        focal, dice = focal_loss(out.logits, target, self.alpha, self.gamma), dice_loss(out.logits, target)
        mask = (self.focal * focal + self.dice * dice).min(-1)  # [b, p]: of the best
        found = sam_prompt.iou(out.logits > 0, truth.masks[:, :, None])
        error = jnp.square(out.iou - found).mean(-1)
        liked = out.iou.argmax(-1)[..., None]
        take = lambda x: jnp.take_along_axis(x, liked.reshape(liked.shape + (1,) * (x.ndim - 3)), 2)[:, :, 0]
        mean = lambda x: (x * truth.valid).sum() / jnp.maximum(truth.valid.sum(), 1)
        metrics = dict(mask=mean(mask), iou_error=mean(error), iou=mean(take(found)))
        loss = metrics["mask"] + self.iou * metrics["iou_error"]
        return loss, jax.lax.stop_gradient(take(out.logits)), metrics

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: mean over the rounds; metrics: parts of the loss, and the first and the last round's IoU."""
        if "masks" not in batch:
            raise ValueError(f"Segment: the batch needs masks, it has {', '.join(batch)}; open the data with masks")
        choose, begin, quiet, click = jax.random.split(key, 4)
        truth, embedding = self.truth(batch["masks"], choose), self.encode(params, batch["image"])
        prompt = self.first_prompt(truth, begin)
        prompt, said = self._say(params, batch["image"], truth, prompt, jax.random.fold_in(begin, 1))
        loss, logits, first = self.loss_of(self.decode(params, embedding, prompt, **said), truth)
        rounds = self.points + self.refinements
        if not rounds:
            return {"main": Loss(loss, self._told(first, first, first))}

        def step(carry, row):
            prompt, logits = carry
            fresh, key = row
            xy, inside, wrong = sam_prompt.correction(truth.masks, logits > 0, key)
            prompt = sam_prompt.with_click(prompt, self.to_picture(xy), inside, fresh & wrong)
            out = self.decode(params, embedding, prompt, logits, multimask=False, **said)
            loss, logits, metrics = self.loss_of(out, truth)
            return (prompt, logits), (loss, metrics)

        step = jax.checkpoint(step) if self.remat else step
        rows = self.fresh(quiet, truth.valid.shape), jax.random.split(click, rounds)
        _, (each, later) = jax.lax.scan(step, (prompt, logits), rows)
        last = jax.tree.map(lambda x: x[-1], later)
        mean = jax.tree.map(lambda a, x: (a + x.sum()) / (1 + rounds), first, later)
        return {"main": Loss((loss + each.sum()) / (1 + rounds), self._told(mean, first, last))}

    def fresh(self, key, shape: tuple[int, ...]) -> jax.Array:
        """bool [rounds, *shape]: in which of the rounds behind the first one there is a new click."""
        rounds = self.points + self.refinements
        if not self.refinements:
            return jnp.ones((rounds, *shape), bool)
        order = jax.random.uniform(key, (rounds - 1, *shape)).argsort(0).argsort(0)
        return jnp.concatenate([order >= self.refinements - 1, jnp.zeros((1, *shape), bool)])

    @staticmethod
    def _told(mean, first, last):
        return {
            "mask_loss": mean["mask"], "iou_error": mean["iou_error"], "iou_first": first["iou"],
            "iou_last": last["iou"],
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ measuring

    def evaluate(self, params: Params, batches: Iterable[Batch], key) -> dict[str, float]:
        """Mean IoU after one click, three clicks, and a box: see `metrics.segment_eval.interactive`."""
        rows = [segment_eval.interactive(self, params, batch["image"], batch["masks"])[0] for batch in batches]
        if not rows:
            raise ValueError("Segment.evaluate: no batches; the evaluation data is empty")
        return segment_eval.means(rows)

    def show(self, params: Params, batch: Batch, key) -> dict[str, np.ndarray]:
        """{"masks"}: for eight pictures their objects, and masks after one click and three, each object in a colour."""
        row, found = segment_eval.interactive(self, params, batch["image"], batch["masks"])
        there = row["valid"][..., None, None]  # a place without an object has a mask, too, of something
        views: list[Any] = [batch["masks"], found["one"] & there, found["three"] & there]
        image, *views = (whole(x[:8]) for x in (batch["image"], *views))
        pictures = np.stack([segment_eval.painted(image, masks) for masks in views], 1)
        return {"masks": image_ops.grid(pictures.reshape(-1, *pictures.shape[2:]), columns=6)}
