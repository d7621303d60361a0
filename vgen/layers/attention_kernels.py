"""How large attention is computed: by chunks of queries on CPUs, by JAX's Pallas kernel on TPUs.

Both give what the formula of `vgen.layers.attention` gives, to rounding, and neither ever holds a matrix of all queries
by all keys, forward or backward.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from vgen import platform
from vgen.sharding import AXES

LARGE = 2**18  # logits per head; from here on chunks are faster on a CPU, and below it all is cheap
TILE = 2**21  # logits that a chunk holds at most, 8 MiB of float32
OLD = ("TPU v2", "TPU v3")  # Pallas knows no products of bfloat16 on these
LANES = 128  # of a TPU: what lengths and head sizes are filled up to


def wants_chunks(q: Array, k: Array) -> bool:
    """Whether q [b, n, h, d] and k [b, m, h, d] are large, and on a CPU."""
    return platform.backend() == "cpu" and q.shape[1] * k.shape[1] >= LARGE


def chunked(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    *,
    scale: float,
    causal: bool = False,
    tile: int = TILE,
) -> Float[Array, "b n h d"]:
    """Attention of one head and some queries at a time; the backward pass computes the logits of a chunk anew.

    A chunk has all keys, so its softmax is the plain one; that is faster than chunks of keys with a running maximum
    (Rabe & Staats 2021), and a head's chunk of at most `tile` logits stays in the cache.
    mask, bias, scale, causal: as of `attention`; the arithmetic is float32 at least.
    """

    def run(q, k, v, mask, bias):
        n, m, dtype = q.shape[1], k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
        chunks = -(-n * m // tile)
        size = -(-n // chunks)
        q, bias, mask = (a if a is None else _split(a, chunks, size) for a in (_heads(q, dtype) * scale, bias, mask))
        starts = jnp.arange(chunks) * size
        look = jax.checkpoint(functools.partial(_look, causal=causal), prevent_cse=False)

        def head(q, k, v, mask, bias):
            return _each(lambda q, mask, bias, start: look(q, k, v, mask, bias, start), q, mask, bias, starts)

        arrays = (q, _heads(k, dtype).swapaxes(2, 3), _heads(v, dtype), mask, bias)
        out = _each(lambda *some: _each(head, *some), *arrays)  # [b, h, chunks, size, d]
        out = out.reshape(*out.shape[:2], chunks * size, -1)[:, :, :n]
        return out.swapaxes(1, 2).astype(v.dtype)

    return _per_device(run, q, k, v, mask, bias, whole=causal)


def _heads(x, dtype):
    return x.swapaxes(1, 2).astype(dtype)  # [b, h, n, d]


def _split(x, chunks, size):
    """The axis of queries [.., n, ..] in chunks [.., chunks, size, ..]; one that is broadcast stays so, in both."""
    if x.shape[2] == 1 and chunks * size > 1:
        return x[:, :, None]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - x.shape[2]), (0, 0)))
    return x.reshape(*x.shape[:2], chunks, size, x.shape[3])


def _each(f, *arrays):
    """f of each entry along the first axis of the arrays, in a loop; where it has one entry, or is None, all see it."""
    length = max(a.shape[0] for a in arrays if a is not None)
    moving = [a is not None and a.shape[0] == length for a in arrays]

    def body(_, entries):
        entries = iter(entries)
        return None, f(*(next(entries) if moves else a if a is None else a[0] for a, moves in zip(arrays, moving)))

    return jax.lax.scan(body, None, [a for a, moves in zip(arrays, moving) if moves])[1]


def _look(q, k, v, mask, bias, start, causal):
    """q [size, d] of queries start, start + 1, ..., k [d, m], v [m, d]; mask and bias [size or 1, m] or None."""
    logits = jnp.matmul(q, k)  # [size, m]
    logits = logits if bias is None else logits + bias
    if causal:
        seen = jnp.arange(k.shape[1]) <= start + jnp.arange(q.shape[0])[:, None]
        mask = seen if mask is None else mask & seen
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    weights = weights if mask is None else jnp.where(mask, weights, 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.matmul(weights, v) / (total if mask is None else jnp.where(total == 0, 1, total))


def has_flash(q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None) -> bool:
    """Whether `flash` takes these arrays, on a TPU, and they are large enough for it to be worth while."""
    able = platform.backend() == "tpu" and platform.device_kind() not in OLD
    kind = q.dtype in (jnp.bfloat16, jnp.float32) and q.dtype == k.dtype == v.dtype
    if not (able and kind) or bias is not None or q.shape[1] * k.shape[1] < 4 * LARGE:
        return False
    if mask is not None and mask.shape[1:3] != (1, 1):
        return False  # the kernel knows which keys count, and no mask that differs between queries
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty  # XLA cannot split the kernel itself


def flash(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "b 1 1 m"] | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> Float[Array, "b n h d"]:
    """Attention by the flash kernel of jax.experimental.pallas.ops.tpu (Dao et al. 2022).

    mask: of keys.  Samples without a visible key get zeros.  scale, causal: as of `attention`.
    Lengths and head size are filled up to multiples of 128, the keys added being masked.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    def run(q, k, v, mask):
        (b, n, _, d), m = q.shape, k.shape[1]
        rows, columns = (-(-length // LANES) * LANES for length in (n, m))

        def fill(x, length):
            x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, -d % LANES)))
            return x.swapaxes(1, 2)  # [b, h, length, d]

        ids = None
        if mask is not None or columns != m:  # a query attends to the keys that have its number
            keys = jnp.ones((b, m), bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], (b, m))
            keys = jnp.pad(keys, ((0, 0), (0, columns - m))).astype(jnp.int32)
            ids = kernel.SegmentIds(q=jnp.ones((b, rows), jnp.int32), kv=keys)
        filled = fill(q, rows), fill(k, columns), fill(v, columns)
        sizes = _block_sizes(kernel, rows, columns)
        out = kernel.flash_attention(*filled, segment_ids=ids, causal=causal, sm_scale=scale, block_sizes=sizes)
        return out.swapaxes(1, 2)[:, :n, :, :d]

    return _per_device(run, q, k, v, mask, whole=causal)


def _block_sizes(kernel, rows: int, columns: int):
    """The largest blocks of 512, 256 or 128 that the lengths are multiples of."""
    block_q, block_k = (math.gcd(length, 512) for length in (rows, columns))
    names = [f.name for f in kernel.BlockSizes.__dataclass_fields__.values()]
    sizes = {name: block_k if "_k" in name else block_q for name in names}
    return kernel.BlockSizes(**(sizes | dict(block_b=1)))


def _per_device(f: Callable, q: Array, *others: Array | None, whole: bool) -> Array:
    """f(q, *others) where every device has its own samples, heads and queries, under the current mesh if there is one.

    q and the arrays with four axes of which the third is heads come first; masks and biases [b, h, n, m] last.
    whole: f needs all queries, because it counts them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_names) != set(AXES) or set(mesh.axis_types) != {AxisType.Auto}:
        return f(q, *others)
    divides = lambda axis, size: size % mesh.shape[axis] == 0
    batch = ("data", "fsdp") if q.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None
    heads = "tensor" if divides("tensor", q.shape[2]) else None
    queries = "sequence" if divides("sequence", q.shape[1]) and not whole else None

    def spec(a, *axes):  # an axis of length one is the same for all devices
        names = zip(axes, (batch, heads, queries))
        found = {axis: name for axis, name in names if a.shape[axis] > 1}
        return P(*(found.get(i) for i in range(4)))

    given = [q, *(a for a in others if a is not None)]
    specs = [spec(q, 0, 2, 1), *(spec(a, 0, 2) if i < 2 else spec(a, 0, 1, 2) for i, a in enumerate(given[1:]))]

    def local(*given):
        rest = iter(given[1:])
        return f(given[0], *(None if a is None else next(rest) for a in others))

    return jax.shard_map(local, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*given)
