"""Vector quantisation: nearest code with a straight-through gradient, trained by gradient or by moving averages.

The codebook and its averages are ordinary parameters (`codebook`, `ema_count`, `ema_sum`). With `ema=True` no gradient
reaches them; the pure function `ema_update` computes their next values, which a task returns as buffer updates.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

HIGHEST = jax.lax.Precision.HIGHEST  # an accelerator's default matmul precision would pick wrong neighbours


class Quantized(NamedTuple):
    """What quantisation gives.

    z_q: [..., d] codes in the place of z, in float32 or wider; their gradient passes straight to z.
    indices: int32 [...] in [0, K).
    losses: scalar terms, already weighted, to be summed: "codebook" (gradient mode), "commitment", "entropy".
    stats: "usage" and "perplexity" of this batch's indices.
    """

    z_q: Array
    indices: Array
    losses: Mapping[str, Array]
    stats: Mapping[str, Array]


def l2_normalize(x: Float[Array, "*b d"], eps: float = 1e-12) -> Float[Array, "*b d"]:
    """x / |x| over the last axis; the gradient is finite at zero (rows shorter than sqrt(eps) are scaled by it)."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), eps))


def squared_distances(z: Float[Array, "n d"], codes: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """|z - e|^2 of every pair, by expanding the square (one matrix product)."""
    cross = jnp.matmul(z, codes.T, precision=HIGHEST)
    return jnp.square(z).sum(-1, keepdims=True) - 2 * cross + jnp.square(codes).sum(-1)


def nearest_code(z: Float[Array, "n d"], codes: Float[Array, "k d"], *, chunk: int = 2048) -> Int[Array, "n"]:
    """Index of the code with the smallest squared distance to each row; of equal ones, the lowest index.

    |z|^2 is left out, being the same for all codes. The codebook is walked in chunks, so the memory is n * chunk and
    not n * K (65,536 latents against 8,192 codes would be 2 GiB), and the latents stay sharded as they are.
    Rows are compared in float32, or wider where the arguments are.
    """
    dtype = jnp.promote_types(jnp.promote_types(z.dtype, codes.dtype), jnp.float32)
    z, codes = jax.lax.stop_gradient((z.astype(dtype), codes.astype(dtype)))
    k, d = codes.shape

    def scores(codes, norms):
        return norms - 2 * jnp.matmul(z, codes.T, precision=HIGHEST)  # [n, chunk]

    norms = jnp.square(codes).sum(-1)
    if k <= chunk:
        return scores(codes, norms).argmin(-1).astype(jnp.int32)
    chunks = -(-k // chunk)
    pad = chunks * chunk - k
    codes = jnp.pad(codes, ((0, pad), (0, 0))).reshape(chunks, chunk, d)
    norms = jnp.pad(norms, (0, pad), constant_values=jnp.inf).reshape(chunks, chunk)

    def closer(best, part):
        i, codes, norms = part
        s = scores(codes, norms)
        low, index = s.min(-1), s.argmin(-1).astype(jnp.int32) + i * chunk
        return (jnp.minimum(best[0], low), jnp.where(low < best[0], index, best[1])), None

    start = scores(codes[0], norms[0])
    best = start.min(-1), start.argmin(-1).astype(jnp.int32)
    parts = jnp.arange(1, chunks, dtype=jnp.int32), codes[1:], norms[1:]
    return jax.lax.scan(closer, best, parts)[0][1]


def entropy_loss(
    distances: Float[Array, "n k"], *, temperature: float = 0.01, kind: str = "softmax"
) -> Float[Array, ""]:
    """Mean entropy of the soft assignments minus the entropy of their mean: sharp choices, evenly used codes.

    As released with MaskGIT (google-research/maskgit); kind "argmax" makes the assignments hard with a
    straight-through gradient. Needs the whole [n, K] matrix. Raises ValueError on another kind.
    """
    logits = -distances / temperature
    probs, log_probs = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
    if kind == "argmax":
        hard = jax.nn.one_hot(distances.argmin(-1), distances.shape[-1], dtype=probs.dtype)
        probs = hard + probs - jax.lax.stop_gradient(probs)
    elif kind != "softmax":
        raise ValueError(f"entropy_loss kind: got {kind!r}, accepted: 'softmax', 'argmax'")
    mean = probs.mean(0)
    each = -(probs * log_probs).sum(-1).mean()
    # QUIRK: the 1e-5 inside this logarithm, and in no other, is MaskGIT's. Held by the golden training vectors.
    return each + (mean * jnp.log(mean + 1e-5)).sum()


def code_counts(indices: Int[Array, "*b"], num_codes: int) -> Float[Array, "k"]:
    """How often each code occurs, float32 [K]; add these up over batches for usage on a whole data set."""
    return jnp.zeros(num_codes, jnp.float32).at[indices.reshape(-1)].add(1.0)


def usage_from_counts(counts: Float[Array, "k"]) -> dict[str, Float[Array, ""]]:
    """Codebook statistics: "usage", the share of codes that occur, and "perplexity", exp of the entropy in [1, K]."""
    p = counts / jnp.maximum(counts.sum(), 1)
    entropy = -(p * jnp.log(jnp.where(p > 0, p, 1))).sum()
    return {"usage": (counts > 0).astype(jnp.float32).mean(), "perplexity": jnp.exp(entropy)}


def ema_update(
    codebook_state: Mapping[str, Array],
    z_flat: Float[Array, "n d"],
    indices: Int[Array, "n"],
    key: Key[Array, ""],
    *,
    decay: float = 0.99,
    eps: float = 1e-5,
    revive_below: float | Float[Array, ""] = 0.0,
    normalize: bool = False,
) -> dict[str, Array]:
    """Moves the codebook to the running mean of the latents that chose each code (VQ-VAE, appendix A.1; VQ-VAE-2).

    codebook_state: "codebook" [K, d], "ema_count" [K], "ema_sum" [K, d], a quantizer's parameters. z_flat: the latents
    before quantisation, indices their codes. decay: of both averages. eps: Laplace smoothing of the counts.
    revive_below: a code whose average count falls under this fraction of the mean count is replaced by a latent of this
      batch and starts with the mean count. 0 revives none. (VQ-VAE-2 has no revival; Jukebox, section 3.1, restarts
      codes under a threshold.) Latents are drawn with `key`, without repetition while there are enough, with
      probabilities in proportion to the squared distance from their codes, as k-means++ seeds its centres (Arthur &
      Vassilvitskii 2007): drawn evenly, they would be one plain background most of the time, which then has many names.
    normalize: whether the quantizer compares directions only (`VectorQuantizer.normalize`).

    Returns the new state, same keys, shapes and dtypes. Carries no gradient.
    """
    codebook, count, total = (codebook_state[k] for k in ("codebook", "ema_count", "ema_sum"))
    dtype = jnp.promote_types(total.dtype, jnp.float32)
    z = jax.lax.stop_gradient(z_flat).astype(dtype)
    z = l2_normalize(z) if normalize else z
    k, n = codebook.shape[0], z.shape[0]
    hits = jnp.zeros(k, dtype).at[indices].add(1)
    sums = jnp.zeros(codebook.shape, dtype).at[indices].add(z)
    count = decay * count + (1 - decay) * hits
    total = decay * total + (1 - decay) * sums

    mean_count = count.mean()
    dead = count < revive_below * mean_count
    rank = jnp.cumsum(dead) - 1  # the i-th dead code takes the i-th latent of a random order
    distance = jnp.square(z - codebook[indices].astype(dtype)).sum(-1)
    order = (jax.random.gumbel(key, (n,)) + jnp.log(distance + 1e-30)).argsort(descending=True)
    fresh = z[order[rank % n]]  # [k, d]
    count = jnp.where(dead, mean_count, count)
    total = jnp.where(dead[:, None], fresh * mean_count, total)

    mass = count.sum()
    smoothed = (count + eps) / (mass + k * eps) * mass
    new = jnp.where(dead[:, None], fresh, total / smoothed[:, None])
    state = {"codebook": new, "ema_count": count, "ema_sum": total}
    return {name: jax.lax.stop_gradient(v).astype(codebook_state[name].dtype) for name, v in state.items()}


class VectorQuantizer(nn.Module):
    """Replaces each latent by its nearest code (van den Oord et al. 2017, eq. 1-3).

    num_codes, dim: codebook size K and width d. A projection to a narrower d belongs to the network around it
      (`VQGAN.code_dim`); losses and averages live in the code space either way.
    ema: the codebook follows `ema_update` instead of a gradient; the "codebook" loss is then absent.
    codebook_weight, commitment_weight: of |sg(z) - e|^2 and |z - sg(e)|^2, both means over all elements.
    legacy: exchange the two weights. entropy_weight, entropy_temperature, entropy_kind: see `entropy_loss`.
    normalize: compare and return unit vectors (ViT-VQGAN, Yu et al. 2022); keeps more codes in use.
    init_scale: codes start uniform in +-init_scale (None: 1 / K, as in VQ-VAE and taming), unless `normalize`, which
      starts them normal. In EMA mode dead-code revival soon places them among the latents.

    Parameters: codebook [K, d]; with ema, also ema_count [K] and ema_sum [K, d], consistent with the codebook.
    The arithmetic is float32 or wider whatever the compute dtype.
    """

    num_codes: int
    dim: int
    ema: bool = False
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    legacy: bool = False
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.01
    entropy_kind: str = "softmax"
    normalize: bool = False
    init_scale: float | None = None

    def setup(self):
        shape = (self.num_codes, self.dim)
        self.codebook = self.param("codebook", self._init_codebook, shape)
        if self.ema:
            # Ones, where VQ-VAE-2's code starts from zeros: a code that is never chosen then keeps its place.
            self.ema_count = self.param("ema_count", nn.initializers.ones_init(), (self.num_codes,))
            self.ema_sum = self.param("ema_sum", lambda _: jnp.array(self.codebook))

    def _init_codebook(self, key, shape):
        if self.normalize:
            return l2_normalize(jax.random.normal(key, shape))
        scale = 1 / self.num_codes if self.init_scale is None else self.init_scale
        return jax.random.uniform(key, shape, minval=-scale, maxval=scale)

    def codes(self) -> Float[Array, "k d"]:
        """The code vectors as the decoder sees them."""
        codes = self.codebook.astype(jnp.promote_types(self.codebook.dtype, jnp.float32))
        codes = jax.lax.stop_gradient(codes) if self.ema else codes
        return l2_normalize(codes) if self.normalize else codes

    def lookup(self, indices: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Code vectors of indices in [0, K)."""
        return self.codes()[indices]

    def __call__(self, z: Float[Array, "*b d"]) -> Quantized:
        if z.shape[-1] != self.dim:
            raise ValueError(f"VectorQuantizer: latents of shape {z.shape} do not end in the code width {self.dim}")
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        z = l2_normalize(z) if self.normalize else z
        codes, flat = self.codes(), z.reshape(-1, self.dim)
        indices = nearest_code(flat, codes)
        z_q = codes[indices].reshape(z.shape)
        indices = indices.reshape(z.shape[:-1])
        return Quantized(
            # z - sg(z) is exactly zero, so the value is the code itself and not a rounded sum.
            z_q=jax.lax.stop_gradient(z_q) + (z - jax.lax.stop_gradient(z)),
            indices=indices,
            losses=self._losses(z, z_q, codes),
            stats=usage_from_counts(code_counts(indices, self.num_codes)),
        )

    def _losses(self, z, z_q, codes):
        codebook_weight, commitment_weight = self.codebook_weight, self.commitment_weight
        if self.legacy:
            # QUIRK: the published taming models put beta on the codebook term (CompVis/taming-transformers,
            # modules/vqvae/quantize.py, VectorQuantizer2 with legacy=True). Held by the golden taming vectors.
            codebook_weight, commitment_weight = commitment_weight, codebook_weight
        losses = {"commitment": commitment_weight * jnp.square(z - jax.lax.stop_gradient(z_q)).mean()}
        if not self.ema:
            losses["codebook"] = codebook_weight * jnp.square(z_q - jax.lax.stop_gradient(z)).mean()
        if self.entropy_weight:
            distances = squared_distances(z.reshape(-1, self.dim), codes)
            losses["entropy"] = self.entropy_weight * entropy_loss(
                distances, temperature=self.entropy_temperature, kind=self.entropy_kind
            )
        return losses
