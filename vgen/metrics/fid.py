"""Frechet distance of two sets of pictures (Heusel et al. 2017, arXiv:1706.08500): FID, by the published Inception.

    python -m vgen.metrics.fid --reference A --samples B --weights pt_inception-2015-12-05-6726825d.pth

A and B are folders of pictures, or files of statistics that `--write FILE.npz` made of a reference.  A distance means
something only under one protocol: extractor, weights, resizing, size and number of the pictures.  Statistics carry
theirs, and two of different ones are not compared.  Every mistake of the caller ends as one sentence on stderr and exit
code 2.
"""

import argparse
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vgen import trees
from vgen.config import UserError, brief
from vgen.data import images as image_ops
from vgen.models.inception import SIZE, InceptionV3

STAND_IN = "scene_frechet: stand-in"  # what the distance is called that no published network was asked for
Matrix = Float[np.ndarray, "_ _"]
Vector = Float[np.ndarray, "_"]


# ------------------------------------------------------------------------------------------------------- statistics


class Moments(NamedTuple):
    """count, mean [d] and scatter [d, d], the sum of products of deviations, of rows seen so far, in float64."""

    count: int
    mean: Vector
    scatter: Matrix

    def add(self, rows: Float[np.ndarray, "n d"]) -> "Moments":
        """With further rows, without keeping any (Chan, Golub, LeVeque 1983)."""
        rows = np.asarray(rows, np.float64)
        n, total = len(rows), self.count + len(rows)
        if not n:
            return self
        mean = rows.mean(0)
        off, rows = mean - self.mean, rows - mean
        scatter = self.scatter + rows.T @ rows + np.outer(off, off) * (self.count * n / total)
        return Moments(total, self.mean + off * (n / total), scatter)


def no_moments(d: int) -> Moments:
    """Of no rows, of d numbers each."""
    return Moments(0, np.zeros(d), np.zeros((d, d)))


def frechet(mean: Vector, covariance: Matrix, other_mean: Vector, other_covariance: Matrix) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians.

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2), which exists for singular covariances,
    too, and is real: no root of a product that is not symmetric, and nothing added to the diagonals.
    Raises ValueError for shapes that do not fit and for values that are not finite.
    """
    mean, covariance, other_mean, other_covariance = (
        np.asarray(x, np.float64) for x in (mean, covariance, other_mean, other_covariance)
    )
    d = mean.size
    shapes = [mean.shape, covariance.shape, other_mean.shape, other_covariance.shape]
    if shapes != [(d,), (d, d)] * 2:
        raise ValueError(f"frechet: expected mean [d], covariance [d, d] of both with one d, got {shapes}")
    if not all(np.isfinite(x).all() for x in (mean, covariance, other_mean, other_covariance)):
        raise ValueError("frechet: means and covariances must be finite; features of some picture were not")
    root = np.linalg.svd(_root(covariance) @ _root(other_covariance), compute_uv=False).sum()
    return float(np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance) - 2 * root)


def _root(covariance: Matrix) -> Matrix:
    """The symmetric root; eigenvalues that are rounding errors count as 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    least = max(values.max(initial=0), 0) * len(values) * np.finfo(np.float64).eps
    return (vectors * np.sqrt(np.where(values > least, values, 0))) @ vectors.T


# -------------------------------------------------------------------------------------------------------- extractors


class Extractor(NamedTuple):
    """What makes numbers of pictures.

    metric: what the distance is called.  name, weights, resize: of its protocol; weights is a hash of the parameters.
    features: uint8 [b, h, w, 3] -> float [b, width].
    """

    metric: str
    name: str
    weights: str
    resize: str
    width: int
    features: Callable[[UInt8[Any, "b h w 3"]], Float[Any, "b d"]]


def inception(where: str | Path) -> Extractor:
    """FID's own: the 2048 means of the last maps of Inception-v3, in float32.

    where: the published weights, pt_inception-2015-12-05-6726825d.pth, or what `vgen.load` reads as these.
    Raises UserError for weights of another network.
    """
    from vgen.convert import load

    module, params = load.load(where, dtype=np.float32)
    if not isinstance(module, InceptionV3):
        raise UserError(f"{where}: these are weights of {type(module).__name__}, FID needs those of its Inception-v3")
    params = {name: value for name, value in params.items() if name != "fc"}
    module = module.clone(classes=None)

    @jax.jit
    def features(params, images):
        with jax.default_matmul_precision("highest"):
            return module.apply({"params": params}, image_ops.to_float(images)).pool

    resize = f"bilinear to {SIZE} between pixel centres, not antialiased (pytorch_fid)"
    return Extractor("FID", "Inception-v3 of 2015-12-05, pool", _digest(params), resize, 2048,
                     lambda images: features(params, images))  # fmt: skip


def stand_in(width: int = 24, layers: int = 3, seed: int = 0) -> Extractor:
    """For the embedded world, without weights to fetch: means of the maps of random convolutions, 3 x 3, ReLU, stride
    2.  Its distance orders worse and better pictures of scenes; it is not FID.
    """
    rng, kernels, channels = np.random.default_rng(seed), {}, 3
    for i in range(layers):
        kernels[f"{i}"] = np.float32(rng.standard_normal((3, 3, channels, width)) * (2 / (9 * channels)) ** 0.5)
        channels = width

    @jax.jit
    def features(images):
        x, found = image_ops.to_float(images), []
        for kernel in kernels.values():
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=jax.lax.Precision.HIGHEST,
                )
            )  # fmt: skip
            found.append(x.mean((1, 2)))
        return jnp.concatenate(found, axis=-1)

    name = f"{layers} random convolutions of {width}, seed {seed}"
    return Extractor(STAND_IN, name, _digest(kernels), "none", width * layers, features)


def _digest(params: Any) -> str:
    """The first 16 hexadecimal digits of a SHA-256 of all parameters, in the order of their names."""
    found = hashlib.sha256()
    for path, value in sorted(trees.flatten(params).items()):
        found.update(path.encode())
        found.update(np.ascontiguousarray(value, np.float32).tobytes())
    return found.hexdigest()[:16]


# ------------------------------------------------------------------------------------------ statistics with a protocol


class Statistics(NamedTuple):
    """Of a set of pictures.

    mean, covariance: of the features, the latter over count - 1.  protocol: {"metric", "extractor", "weights",
      "resize", "size", "count"}.  pictures: a hash of the set, whatever its order.
    """

    mean: Vector
    covariance: Matrix
    protocol: dict[str, Any]
    pictures: str


def statistics(extractor: Extractor, pictures: Iterable[UInt8[np.ndarray, "h w 3"]], batch: int = 64) -> Statistics:
    """Of pictures of one size, of which no more than `batch` are held at a time.

    Raises UserError for fewer than two pictures and for pictures of different sizes.
    """
    moments, digests, size = no_moments(extractor.width), [], None
    for group in _groups(pictures, batch):
        for picture in group:
            size = size or picture.shape[:2]
            if picture.shape[:2] != size:
                raise UserError(
                    f"pictures differ in size: {size[1]} x {size[0]} and {picture.shape[1]} x {picture.shape[0]}; a "
                    "distance is of pictures of one size, resize them first"
                )
            digests.append(hashlib.sha256(np.ascontiguousarray(picture).tobytes()).digest())
        rows = np.stack([group[min(i, len(group) - 1)] for i in range(batch)])  # one shape, compiled once
        moments = moments.add(np.asarray(extractor.features(rows))[: len(group)])
    if moments.count < 2:
        raise UserError(f"a covariance needs two pictures or more, got {moments.count}")
    protocol = dict(
        metric=extractor.metric, extractor=extractor.name, weights=extractor.weights, resize=extractor.resize,
        size=f"{size[1]} x {size[0]}", count=moments.count,
    )  # fmt: skip
    whole = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Statistics(moments.mean, moments.scatter / (moments.count - 1), protocol, whole)


def _groups(items: Iterable[Any], n: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == n:
            yield group
            group = []
    if group:
        yield group


def distance(reference: Statistics, samples: Statistics, different_counts: bool = False) -> dict[str, float]:
    """{name of the metric: Frechet distance}, where both were made under one protocol.

    different_counts: let the sets differ in their number of pictures; the distance falls with it, so that numbers of
      other counts cannot be set beside this one.
    Raises UserError naming the first entry of the protocols that differs.
    """
    for name, value in reference.protocol.items():
        other = samples.protocol.get(name)
        if value != other and not (name == "count" and different_counts):
            hint = "; --different_counts compares them all the same" if name == "count" else ""
            raise UserError(
                f"these statistics cannot be compared, their protocols differ: {name} is {value} in the reference and "
                f"{other} in the samples{hint}"
            )
    value = frechet(reference.mean, reference.covariance, samples.mean, samples.covariance)
    return {reference.protocol["metric"]: value}


def save(path: str | Path, found: Statistics) -> None:
    """Write statistics as .npz: mean, covariance, protocol (JSON) and pictures, the hash; UserError where it cannot."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: statistics are written to a file that ends in .npz")
    try:
        np.savez(path, **found._replace(protocol=json.dumps(found.protocol))._asdict())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def load_statistics(path: str | Path) -> Statistics:
    """Read what `save` wrote; UserError for a file that is missing, damaged or does not say its protocol."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read statistics from {path}: {brief(error)}") from None
    if missing := [name for name in Statistics._fields if name not in arrays]:
        raise UserError(
            f"{path} has no {', '.join(missing)}: it does not say under which protocol it was made, so nothing can be "
            "compared with it; make it again from the pictures, with --write"
        )
    try:
        protocol = dict(json.loads(str(arrays["protocol"])))
        protocol["metric"], protocol["count"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: its protocol cannot be read ({error!r})") from None
    return Statistics(arrays["mean"], arrays["covariance"], protocol, str(arrays["pictures"]))


# ------------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after a mistake of the caller."""
    try:
        for line in _lines(_parser().parse_args(argv)):
            print(line, flush=True)
    except UserError as error:
        print(f"vgen.metrics.fid: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vgen.metrics.fid", description="Frechet distance of two sets of pictures.")
    parser.add_argument("--reference", required=True, help="a folder of pictures, or statistics in a .npz file")
    parser.add_argument("--samples", help="the same")
    parser.add_argument("--weights", help="Inception's: pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("--stand_in", action="store_true", help="random convolutions, no weights; it is not FID")
    parser.add_argument("--write", help="a .npz file for the statistics of the reference")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time (default: %(default)s)")
    parser.add_argument("--different_counts", action="store_true", help="compare sets of different numbers of pictures")
    return parser


def _lines(options) -> Iterator[str]:
    if not (options.samples or options.write):
        raise UserError("needs --samples, to compare with the reference, or --write, for the reference's statistics")
    if options.batch < 1:
        raise UserError(f"--batch={options.batch}: must be at least 1")
    if options.weights and options.stand_in:
        raise UserError("--weights and --stand_in are two extractors; give one of them")
    sets = {name: Path(value) for name in ("reference", "samples") if (value := getattr(options, name))}
    for path in sets.values():
        if not path.exists():
            raise UserError(f"there is no folder or file {path}")
    extractor = None
    if any(path.is_dir() for path in sets.values()):
        if not (options.weights or options.stand_in):
            raise UserError("pictures need --weights=FILE, Inception's, or --stand_in, which is not FID")
        extractor = stand_in() if options.stand_in else inception(options.weights)
    found = {name: _of(path, extractor, options.batch) for name, path in sets.items()}
    if options.write:
        save(options.write, found["reference"])
    if "samples" in found:
        for metric, value in distance(*found.values(), options.different_counts).items():
            yield f"{metric} {value:.6f}"
    for name, each in found.items():
        yield f"{name}: {each.protocol['count']} pictures, sha256 {each.pictures[:16]}"
    yield "protocol: " + ", ".join(
        f"{key} {value}" for key, value in found["reference"].protocol.items() if key != "count"
    )
    least, width = min(each.protocol["count"] for each in found.values()), found["reference"].mean.size
    if least <= width:
        yield f"note: {least} pictures do not determine a covariance of {width} features; papers use 10,000 or more"


def _of(path: Path, extractor: Extractor | None, batch: int) -> Statistics:
    """Of a folder of pictures, or read from a file."""
    if not path.is_dir():
        return load_statistics(path)
    from vgen.data.sources import Folder

    source = Folder(path)
    return statistics(extractor, (image_ops.decode(source[i]["image"]) for i in range(len(source))), batch)


if __name__ == "__main__":
    sys.exit(main())
