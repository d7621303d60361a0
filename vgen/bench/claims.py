"""What papers say that their method saves, measured again: ratios of operations at the papers' sizes and of times here.

Operations are XLA's count of programs of the published sizes, from shapes alone.  Times are those of the same programs
at a scale that runs on the machine at hand, of random parameters, the fastest of a few runs.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgen import guidance
from vgen.bench import flops
from vgen.config import UserError
from vgen.models.clip import CLIP, ImageTower, TextTower, clip_vit, unit
from vgen.models.gpt import GPT
from vgen.models.mae import MAE, random_masking, reconstruction_loss
from vgen.models.maskgit import MaskGIT
from vgen.models.projector import Projector
from vgen.models.sam import SAM
from vgen.sample import sample
from vgen.tasks.a_clip import AttentiveContrastive, simclr_loss
from vgen.tasks.contrastive import Contrastive, info_nce
from vgen.tokens import parallel, raster
from vgen.types import Prediction


class Side(NamedTuple):
    """A program and the shapes of its arguments."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...]


class Ratio(NamedTuple):
    """A claim: side `over` divided by side `under`.  time, operations: the paper's ratio of them, in words, or ""."""

    name: str
    over: str
    under: str
    time: str = ""
    operations: str = ""


class Study(NamedTuple):
    """Claims that share their sides.

    sides: sizes -> {name: Side}.  sizes: {scale: arguments of `sides`}: "paper" is the published networks.
    """

    sides: Callable[..., dict[str, Side]]
    sizes: Mapping[str, Mapping[str, Any]]
    ratios: tuple[Ratio, ...]


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


KEY = jax.eval_shape(lambda: jax.random.key(0))


# -------------------------------------------------------------------------------------------------------------- MAE


def mask_tokens_inside(net: MAE, images, noise):
    """The loss of an MAE whose encoder sees all places, the hidden ones without their pixels (He et al., table 1c)."""
    b, height, width, _ = images.shape
    rows, columns = height // net.patch_size, width // net.patch_size
    mask = random_masking(noise, net.mask_ratio).mask
    seen = (1 - mask).reshape(b, rows, columns, 1).repeat(net.patch_size, 1).repeat(net.patch_size, 2)
    tokens = net.encoder(images * seen).tokens
    places = jnp.broadcast_to(jnp.arange(rows * columns), mask.shape)
    return reconstruction_loss(net.decoder(tokens, places, (rows, columns)), images, mask, net.patch_size)


def mae(batch: int, size: int, **sizes) -> dict[str, Side]:
    """Loss and gradients with mask tokens in the encoder, without, and without and with a decoder of one block."""
    images, noise = floats(batch, size, size, 3), floats(batch, (size // sizes["patch_size"]) ** 2)

    def side(net, loss):
        params = jax.eval_shape(net.init, KEY, images, noise)["params"]
        run = lambda params, *given: loss(functools.partial(net.apply, {"params": params}), *given)
        return Side(jax.value_and_grad(run), (params, images, noise))

    net = MAE(image_size=size, **sizes)
    visible = lambda apply, *given: apply(*given).loss
    return {
        "mask tokens": side(net, lambda apply, *given: apply(*given, method=mask_tokens_inside)),
        "visible": side(net, visible),
        "one block": side(net.clone(decoder_depth=1), visible),
    }


# ------------------------------------------------------------------------------------------------------------- CLIP


def clip(size: int, features: int, length: int, vocab: int, image: Mapping[str, int], text: Mapping[str, int]) -> CLIP:
    visual = ImageTower(clip_vit(image_size=size, **image), features)
    return CLIP(visual, TextTower(vocab=vocab, length=length, features=features, **text))


def pairs(batch: int, size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of pictures and their captions."""
    words = dict(text=ints(batch, length), text_mask=jax.ShapeDtypeStruct((batch, length), bool))
    return dict(image=jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)) | words


def flip(batch: int, **sizes) -> dict[str, Side]:
    """Loss and gradients of CLIP with all patches, half of them and a quarter."""
    size, network = sizes["size"], clip(**sizes)
    given = pairs(batch, size, sizes["length"])
    shares = {"all": 0.0, "half": 0.5, "quarter": 0.75}
    return {
        name: Side(*flops.gradients(Contrastive(network, size, mask_ratio=ratio), given))
        for name, ratio in shares.items()
    }


def a_clip(batch: int, hidden: int, **sizes) -> dict[str, Side]:
    """Loss and gradients of CLIP, of SLIP and of A-CLIP, in which views are given or cut, and not distorted."""
    size, network = sizes["size"], clip(**sizes)
    given = pairs(batch, size, sizes["length"])
    attentive = AttentiveContrastive(network, size, hidden=hidden)
    return {
        "CLIP": Side(*flops.gradients(Contrastive(network, size), given)),
        "SLIP": slip(network, hidden, given),
        "A-CLIP": Side(*flops.gradients(attentive, given)),
    }


def slip(network: CLIP, hidden: int, given: Mapping[str, jax.ShapeDtypeStruct]) -> Side:
    """CLIP on one view of a picture and SimCLR on two more, all whole (Mu et al. 2021, arXiv:2112.12750)."""
    head = Projector(hidden, layers=2, bias=True)
    b, size = given["image"].shape[:2]
    views = floats(3 * b, size, size, 3)
    params = {
        "network": jax.eval_shape(network.init, KEY, floats(1, size, size, 3), ints(1, given["text"].shape[1])),
        "head": jax.eval_shape(head.init, KEY, floats(2, network.visual.vit.width)),
    }

    def loss(params, views, text):
        image = network.apply(params["network"], views, method="encode_image")
        words = unit(network.apply(params["network"], text, method="encode_text").features)
        logits = jnp.exp(params["network"]["params"]["logit_scale"]) * unit(image.features[:b]) @ words.T
        projected = head.apply(params["head"], image.pooled[b:])
        return info_nce(logits) + simclr_loss(*jnp.split(projected, 2), 0.1)

    return Side(jax.value_and_grad(loss), (params, views, given["text"]))


# ----------------------------------------------------------------------------------------------------------- tokens


def decoding(batch: int, side: int, codes: int, classes: int, steps: tuple[int, ...], **sizes) -> dict[str, Side]:
    """All tokens of pictures of a class: one by one with a cache, and in parallel in so many steps; equal layers."""
    n, label = side**2, ints(batch)
    together = MaskGIT(codes, classes, n + 1, **sizes)
    single = GPT(vocab=codes, grid=(side, side), classes=classes, **sizes)

    def in_parallel(steps, params, label, key):
        apply = lambda x, step: Prediction(together.apply({"params": params}, x, label, method="image_logits"))
        start = jnp.full((batch, n), together.mask_id, jnp.int32)
        return sample(apply, parallel.maskgit_sampler(together.mask_id), parallel.grid(steps), key, start)

    def one_by_one(params, label, key):
        run = functools.partial(single.apply, mutable=["cache"], label=label)
        _, made = run({"params": params}, method="prefill")

        def advance(previous, i, cache):
            logits, kept = run({"params": params, "cache": cache}, previous, i, method="advance")
            return logits, kept["cache"]

        start = raster.Drawn(jnp.full((batch, n), raster.UNKNOWN, jnp.int32), made["cache"])
        denoise = raster.cached(advance, guidance.single)
        return sample(denoise, raster.raster_sampler(), raster.grid(n), key, start).ids

    params = jax.eval_shape(together.init, KEY, ints(1, n + 1))["params"]
    found = {f"{k} steps": Side(functools.partial(in_parallel, k), (params, label, KEY)) for k in steps}
    params = jax.eval_shape(single.init, KEY, ints(1, n), label=ints(1))["params"]
    return found | {"one by one": Side(one_by_one, (params, label, KEY))}


# -------------------------------------------------------------------------------------------------------------- SAM


def sam(**sizes) -> dict[str, Side]:
    """The image encoder, and prompt encoder and mask decoder for one click."""
    net = SAM(**sizes)
    size, grid = net.image_size, net.image_size // net.patch
    click = (floats(1, 1, 1, 2), ints(1, 1, 1))
    params = jax.eval_shape(net.init, KEY, floats(1, size, size, 3), *click)["params"]

    def side(method, *given):
        return Side(lambda params, *given: net.apply({"params": params}, *given, method=method), (params, *given))

    return {
        "encoder": side("encode", floats(1, size, size, 3)),
        "decoder": side("decode", floats(1, grid, grid, net.channels), *click),
    }


# ----------------------------------------------------------------------------------------------------------- claims


def _tower(width: int, depth: int, heads: int, **more: int) -> dict[str, int]:
    return dict(width=width, depth=depth, heads=heads, mlp_dim=4 * width, **more)


def _decoder(width: int, depth: int, heads: int) -> dict[str, int]:
    return {f"decoder_{name}": value for name, value in _tower(width, depth, heads).items()}


def _clip(image: dict[str, int], text: dict[str, int], features: int, length: int, vocab: int, size: int = 224, **more):
    return dict(image=image, text=text, features=features, length=length, vocab=vocab, size=size, **more)


_SMALL = _clip(_tower(384, 12, 6, patch_size=16), _tower(256, 12, 4), 256, 32, 30_523, batch=8)
_TINY = _clip(_tower(16, 2, 2, patch_size=4), _tower(16, 1, 2), 8, 8, 50, size=16, batch=4)
STUDIES = (
    Study(mae, dict(
        paper=_tower(1024, 24, 16, patch_size=16) | _decoder(512, 8, 16) | dict(size=224, batch=1),
        mini=_tower(384, 12, 6, patch_size=16) | _decoder(192, 4, 6) | dict(size=224, batch=8),
        tiny=_tower(16, 2, 2, patch_size=4) | _decoder(8, 2, 2) | dict(size=16, batch=2),
    ), (
        Ratio("MAE: mask tokens in the encoder / visible patches", "mask tokens", "visible", "2.8 (H 3.5)", "3.3"),
        Ratio("MAE: the same, the latter with a decoder of 1 block", "mask tokens", "one block", "3.7 (H 4.1)"),
    )),
    Study(flip, dict(
        paper=_clip(_tower(1024, 24, 16, patch_size=16), _tower(768, 12, 12), 768, 32, 30_523, batch=2),
        mini=_SMALL, tiny=_TINY,
    ), (
        Ratio("FLIP: 50 % of the patches left out / CLIP", "half", "all", "0.50", "0.52"),
        Ratio("FLIP: 75 % of the patches left out / CLIP", "quarter", "all", "0.33", "0.28"),
    )),
    Study(a_clip, dict(
        paper=_clip(_tower(768, 12, 12, patch_size=16), _tower(512, 12, 8), 512, 77, 49_408, hidden=4096, batch=2),
        mini=_SMALL | dict(length=77, hidden=1024), tiny=_TINY | dict(hidden=8),
    ), (
        Ratio("A-CLIP / CLIP", "A-CLIP", "CLIP", "1.16"),
        Ratio("SLIP / CLIP", "SLIP", "CLIP", "2.67"),
    )),
    Study(decoding, dict(
        paper=_tower(768, 24, 16) | dict(batch=1, side=16, codes=1024, classes=1000, steps=(8, 12)),
        mini=_tower(512, 12, 8) | dict(batch=1, side=16, codes=1024, classes=1000, steps=(8, 12)),
        tiny=_tower(16, 2, 2) | dict(batch=2, side=4, codes=10, classes=3, steps=(8, 12)),
    ), (
        Ratio("VQ-GAN one by one, cached / MaskGIT in 8 steps", "one by one", "8 steps", "32 x the steps; up to 64"),
        Ratio("VQ-GAN one by one, cached / MaskGIT in 12 steps", "one by one", "12 steps", "21 x the steps"),
    )),
    Study(sam, dict(
        paper=_tower(1280, 32, 16, global_layers=(7, 15, 23, 31)),
        mini=_tower(768, 12, 12, global_layers=(2, 5, 8, 11)),
        tiny=_tower(16, 2, 2, global_layers=(1,), image_size=64, patch=8, window=3, channels=16, decoder_mlp_dim=32,
                    iou_dim=16),
    ), (Ratio("SAM: prompt encoder and mask decoder / image encoder", "decoder", "encoder", "", "< 0.01"),)),
)  # fmt: skip
SCALES = tuple(STUDIES[0].sizes)


class Row(NamedTuple):
    """operations, seconds: of `over` and `under`."""

    claim: Ratio
    operations: tuple[float, float]
    seconds: tuple[float, float]

    def told(self) -> dict[str, Any]:
        """As it is written to a file."""
        pair = lambda kind, values: {kind: {"over": values[0], "under": values[1], "ratio": values[0] / values[1]}}
        paper = {"time": self.claim.time, "operations": self.claim.operations}
        told = dict(claim=self.claim.name, over=self.claim.over, under=self.claim.under, paper=paper)
        return told | pair("operations", self.operations) | pair("seconds", self.seconds)


def rows(study: Study, scale: str, runs: int, published: str = "paper") -> Iterator[Row]:
    """A row for each claim of a study.

    scale: of the times.  published: scale of the operations.  runs: of each side, in turn, so that whatever else the
    machine does falls on all of them.
    """
    operations = {name: flops.count(*side) for name, side in _flat(study, published)}
    ready = {}
    for name, side in _flat(study, scale):
        ready[name] = jax.jit(side[0]).lower(*side[1:]).compile(), jax.tree.map(some, side[1:])
    best = dict.fromkeys(ready, float("inf"))
    for k in range(runs + 1):
        for name, (run, arguments) in ready.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            if k:  # the first one touches its memory for the first time
                best[name] = min(best[name], time.perf_counter() - start)
    for claim in study.ratios:
        sides = claim.over, claim.under
        yield Row(claim, tuple(operations[name] for name in sides), tuple(best[name] for name in sides))


def _flat(study: Study, scale: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name, (function, shapes of its arguments)) of the sides that the study's claims look at."""
    needed = {name for claim in study.ratios for name in (claim.over, claim.under)}
    for name, side in study.sides(**study.sizes[scale]).items():
        if name in needed:
            yield name, (side.run, *side.arguments)


def some(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of that shape: small random numbers, tokens of 0, a key."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if not jnp.issubdtype(shape.dtype, jnp.floating):
        return jnp.ones(shape.shape, shape.dtype)
    rng = np.random.default_rng(0)
    return jnp.asarray(0.02 * rng.standard_normal(shape.shape, np.float32), shape.dtype)


def table(only: str = "", runs: int = 3, scale: str = "mini", out: str = "", published: str = "paper") -> Iterator[str]:
    """The lines of the table, each as soon as it is measured; with `out` all numbers are written there as JSON.

    only: regular expression of the claims' names.  UserError if it matches none, or `out` cannot be written.
    """
    studies = []
    for study in STUDIES:
        if chosen := tuple(ratio for ratio in study.ratios if re.search(only, ratio.name)):
            studies.append(study._replace(ratios=chosen))
    if not studies:
        names = ", ".join(ratio.name for study in STUDIES for ratio in study.ratios)
        raise UserError(f"no claim matches {only!r}; there are {names}")
    if runs < 1:
        raise UserError(f"--runs={runs}: must be at least 1")
    if out and not Path(out).parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {Path(out).parent}")
    yield f"{'ratio':<56} {'time, paper':>24} {'here':>7} {'operations, paper':>18} {'here':>7}"
    found = []
    for study in studies:
        for row in rows(study, scale, runs, published):
            told = row.told()
            found.append(told)
            time, operations = (told[kind]["ratio"] for kind in ("seconds", "operations"))
            claim = row.claim
            yield f"{claim.name:<56} {claim.time:>24} {time:7.3f} {claim.operations:>18} {operations:7.4f}"
    if out:
        device = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        whole = dict(scale=scale, operations_at=published, runs=runs, device=device, rows=found)
        Path(out).write_text(json.dumps(whole, indent=1))
