"""Train CLIP's towers on the patches that a slow copy of the image tower attends to (A-CLIP).

Source: Yang et al. 2022, Attentive Mask CLIP, arXiv:2212.08653, and the authors' code (microsoft/A-CLIP).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vgen import trees
from vgen.data import views
from vgen.layers.attention import kept
from vgen.models.clip import unit
from vgen.models.projector import Projector
from vgen.models.vit import ViT
from vgen.tasks.contrastive import Contrastive
from vgen.types import AttentionControl, Batch, Context, Loss, Params

TO_PATCHES = AttentionControl(keep={"to_patches": lambda probs, site, step: probs[:, :, 0, 1:].mean(1)})


def class_attention(vit: ViT, params: Params, x: Float[Array, "b h w 3"]):
    """(class token [b, width] behind the final norm, [b, patches] how much it attends to each patch).

    The attention is the mean over all layers and heads; what the class token pays itself is left out.
    """
    out, collections = vit.apply({"params": params}, x, control=TO_PATCHES, mutable=["kept"])
    maps = [array for arrays in kept(collections)["to_patches"].values() for array in arrays]
    return out.pooled, jnp.concatenate(maps, 1).mean(1)


def most_attended(attention: Float[Array, "b n"], grid: tuple[int, int], count: int) -> Int[Array, "b k"]:
    """The patches of the `count` cells with most attention, k = 4 count; a cell is 2 x 2 patches of the grid."""
    rows, columns = grid
    cells = attention.reshape(-1, rows // 2, 2, columns // 2, 2).mean((2, 4)).reshape(len(attention), -1)
    _, best = jax.lax.top_k(cells, count)
    first = best // (columns // 2) * 2 * columns + best % (columns // 2) * 2
    offsets = jnp.asarray((0, 1, columns, columns + 1))
    return (first[..., None] + offsets).reshape(len(attention), -1)


def simclr_loss(a: Float[Array, "b d"], b: Float[Array, "b d"], temperature: float) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, of a view's other one among all other views of the batch (SimCLR's NT-Xent)."""
    both = jnp.concatenate([unit(a), unit(b)])
    wide = jnp.promote_types(both.dtype, jnp.float32)
    logits = jnp.dot(both, both.T, preferred_element_type=wide) / temperature
    logits = jnp.where(jnp.eye(len(both), dtype=bool), -jnp.inf, logits)
    other = jnp.roll(jnp.arange(len(both)), len(a))
    return (jax.nn.logsumexp(logits, 1) - jnp.take_along_axis(logits, other[:, None], 1)[:, 0]).mean()


def byol_loss(predicted: Float[Array, "n d"], target: Float[Array, "n d"]) -> Float[Array, ""]:
    """Mean squared distance of the unit vectors, 2 - 2 cos."""
    return (2 - 2 * (unit(predicted) * unit(target)).sum(-1)).mean()


@dataclasses.dataclass(frozen=True)
class AttentiveContrastive(Contrastive):
    """Two views of a picture, in each the patches that a teacher attends to, both matched to the caption and to each
    other (SimCLR), and what the teacher makes of the whole predicted from each (BYOL).

    What differs from Contrastive: `mask_ratio` of the cells of 2 x 2 patches are left out, those with least attention,
    but for one that stays (the authors' rounding); 0 keeps all, and there are no random masks.
    The teacher is an average of the image tower and of BYOL's projection, moved ahead of each step's losses, with a
    momentum that rises from `momentum` to 1 along a cosine over `momentum_steps`.  It sees a third, wider view, in
    which the first two lie.  Text is the student's; the authors average that tower too, and nothing reads it.
    Differs from the authors' code: SimCLR compares the two views, not the first one with itself; attention is read
    where a view's patches lie, not over a map resized to pixels; the third view always holds the first two.
    area: of the first two views' crops.  distort: changes them, (key, pictures in [0, 1]) -> the same; None: nothing.
    simclr, byol: weights of their losses.  temperature: of SimCLR.  hidden, projected: widths of the projections.
    freeze_patches: the projection of patches stays as it is drawn (MoCo v3).

    Pictures may be larger than `size`, views are made at `size`.  Parameters: network; heads {simclr, projection,
    predictor}; teacher {vit, projection}, which no gradient trains.
    Raises ValueError for a tower that is no ViT with a class token, and an odd number of patches a side.
    """

    mask_ratio: float = 0.5
    area: tuple[float, float] = (0.5, 1.0)
    distort: views.Distort | None = None
    simclr: float = 1.0
    byol: float = 2.0
    temperature: float = 0.1
    hidden: int = 4096
    projected: int = 256
    momentum: float = 0.996
    momentum_steps: int = 100_000
    freeze_patches: bool = True

    groups = {"main": r"(network|heads)/.*"}

    def __post_init__(self):
        super().__post_init__()
        vit = getattr(self.network.visual, "vit", None)
        if vit is None or not vit.cls_token or vit.pool != "cls" or vit.num_registers:
            raise ValueError("AttentiveContrastive: the image tower must be a ViT pooled at its class token")
        if any(side % 2 for side in self._grid):
            raise ValueError(f"AttentiveContrastive: the grid of patches must be even, got {self._grid}")

    @property
    def buffers(self) -> str:
        return r"teacher/.*" + (r"|network/visual/vit/patch_embed/.*" if self.freeze_patches else "")

    @property
    def _grid(self) -> tuple[int, int]:
        return tuple(self.size // side for side in self.network.visual.vit.patch)

    def _kept(self) -> int:
        # QUIRK: one cell more than the share (get_att_mask in the authors' models.py): 25 of 49 at a half
        return 4 * (int(self._patches() // 4 * (1 - self.mask_ratio)) + 1)

    @property
    def _heads(self) -> dict[str, Projector]:
        sizes = dict(hidden=self.hidden, features=self.projected, dtype=self.network.visual.vit.dtype)
        simclr = Projector(layers=2, bias=True, **sizes)
        return {"simclr": simclr, "projection": Projector(**sizes), "predictor": Projector(**sizes)}

    def init(self, key, batch: Batch) -> Params:
        image = jnp.zeros((1, self.size, self.size, 3), batch["image"].dtype)
        params = super().init(key, {"image": image, "text": batch["text"]})
        widths = {"predictor": self.projected}
        heads = {}
        for i, (name, head) in enumerate(self._heads.items()):
            x = jnp.zeros((1, widths.get(name, self.network.visual.vit.width)))
            heads[name] = head.init(jax.random.fold_in(key, i + 1), x)["params"]
        student = {"vit": params["network"]["visual"]["vit"], "projection": heads["projection"]}
        return params | {"heads": heads, "teacher": jax.tree.map(jnp.copy, student)}

    # ------------------------------------------------------------------------------------------------------- losses

    def momentum_at(self, step) -> Float[Array, ""]:
        """Of the teacher, at a step."""
        done = jnp.minimum(step / self.momentum_steps, 1.0)
        return 1 - (1 - self.momentum) * (1 + jnp.cos(math.pi * done)) / 2

    def teacher(self, params: Params, step) -> Params:
        """The teacher of this step, a little nearer to the student than params["teacher"]."""
        student = {"vit": params["network"]["visual"]["vit"], "projection": params["heads"]["projection"]}
        m = self.momentum_at(step)
        moved = lambda old, new: (old * m + new * (1 - m)).astype(old.dtype)
        return jax.lax.stop_gradient(jax.tree.map(moved, dict(params["teacher"]), student))

    def cut(self, key, image):
        """Two views and the wider one, [b, size, size, 3] as the network takes them, and the places of the first two in
        the third, [b, 4].  image: uint8 [b, h, w, 3].
        """
        *box_keys, frame_key, first_key, second_key = jax.random.split(key, 5)
        boxes = [views.random_boxes(each, len(image), self.area) for each in box_keys]
        frame = views.around(frame_key, *boxes)
        x = jnp.asarray(image, jnp.float32) / 255
        seen = [views.crop(x, box, self.size) for box in (*boxes, frame)]
        if self.distort is not None:
            seen[:2] = [self.distort(each, view) for each, view in zip((first_key, second_key), seen)]
        normal = [(view - jnp.asarray(self.mean)) / jnp.asarray(self.std) for view in seen]
        return *normal, *(views.inside(box, frame) for box in boxes)

    def keep(self, attention: Float[Array, "b n"], box: Float[Array, "b 4"]) -> Int[Array, "b k"]:
        """Which patches of a view are looked at.  attention: to the patches of the wider one.  box: the view in it."""
        rows, columns = self._grid
        seen = views.crop(attention.reshape(-1, rows, columns, 1), box, rows)
        return most_attended(seen.reshape(len(attention), -1), self._grid, self._kept() // 4)

    def losses(self, params: Params, ctx: Context, batch: Batch, key) -> dict[str, Loss]:
        """{"main"}: half of InfoNCE of either view, SimCLR's and BYOL's losses; metrics: all of them, those of
        Contrastive, and the momentum.  Updates: the teacher.  Out of training: as of Contrastive.
        """
        if not ctx.train:
            return super().losses(params, ctx, batch, key)
        view_key, image_key, text_key = jax.random.split(key, 3)
        first, second, wide, *boxes = self.cut(view_key, batch["image"])
        teacher, apply = self.teacher(params, ctx.step), self._head(params["heads"])
        target, attention = class_attention(self.network.visual.vit, teacher["vit"], wide)
        target = self._heads["projection"].apply({"params": teacher["projection"]}, target)
        target, attention = jax.lax.stop_gradient((target, attention))
        kept = {"keep": jnp.concatenate([self.keep(attention, box) for box in boxes])} if self.mask_ratio else {}
        train = lambda key: dict(train=True, rngs={"dropout": key})
        both = jnp.concatenate([first, second])
        image = self._apply(params, both, method="encode_image", **kept, **train(image_key))
        text = self.encode_text(params, batch["text"], batch["text_mask"], **train(text_key))
        pairs = [self.match(params, unit(half), text) for half in jnp.split(image.features, 2)]
        predicted = apply("predictor", apply("projection", image.pooled))
        terms = {
            "clip": (pairs[0].value + pairs[1].value) / 2,
            "simclr": simclr_loss(*jnp.split(apply("simclr", image.pooled), 2), self.temperature),
            "byol": byol_loss(predicted, jnp.concatenate([target, target])),
        }
        value = terms["clip"] + self.simclr * terms["simclr"] + self.byol * terms["byol"]
        found = terms | pairs[0].metrics | {"momentum": self.momentum_at(ctx.step)}
        return {"main": Loss(value, found, trees.add_prefix(trees.flatten(teacher), "teacher"))}

    def _head(self, params):
        heads = self._heads
        return lambda name, x: heads[name].apply({"params": params[name]}, x)
