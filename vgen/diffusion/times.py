"""Which times a batch is trained at."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vgen.diffusion.schedules import Schedule

DRAWS = ("uniform", "antithetic", "stratified", "logit_normal")


def draw(key, size: int, how: str = "uniform", mean: float = 0.0, std: float = 1.0) -> Float[Array, "b"]:
    """Numbers in [0, 1): places in the range of times.

    "uniform"; "antithetic", pairs u and 1 - u (DDIM's training); "stratified", one in each of `size` equal parts, with
    one shift for all (Kingma et al. 2021, appendix I); "logit_normal", sigmoid(N(mean, std^2)) (Esser et al. 2024).
    Raises ValueError for another name.
    """
    if how not in DRAWS:
        raise ValueError(f"times: how must be one of {', '.join(DRAWS)}, got {how!r}")
    below_one = lambda u: jnp.clip(u, 0, 1 - jnp.finfo(u.dtype).epsneg)
    if how == "uniform":
        return jax.random.uniform(key, (size,))
    if how == "antithetic":
        u = jax.random.uniform(key, ((size + 1) // 2,))
        return below_one(jnp.concatenate([u, 1 - u])[:size])
    if how == "stratified":
        return below_one((jax.random.uniform(key) + jnp.arange(size) / size) % 1)
    return below_one(jax.nn.sigmoid(mean + std * jax.random.normal(key, (size,))))


def place(u: Float[Array, "b"], schedule: Schedule) -> Float[Array, "b"]:
    """The times at places u in [0, 1) of a schedule's range: whole numbers of a table, or between t_min and t_max."""
    if schedule.length is None:
        return schedule.t_min + u * (schedule.t_max - schedule.t_min)
    return jnp.minimum(jnp.floor(u * schedule.length), schedule.length - 1)


def sample_times(key, size: int, schedule: Schedule, how: str = "uniform", **knobs) -> Float[Array, "b"]:
    """`size` times of a schedule; see `draw` and `place`."""
    return place(draw(key, size, how, **knobs), schedule)


def log_normal_times(key, size: int, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Float[Array, "b"]:
    """Times at which log(sigma / alpha) is N(mean, std^2): EDM's training times (Karras et al. 2022, table 1)."""
    return schedule.time(jnp.exp(mean + std * jax.random.normal(key, (size,))))


class Importance(NamedTuple):
    """The last losses of every time, float32 [T, history], and how many there have been, int32 [T]."""

    losses: Float[Array, "t history"]
    count: Int[Array, "t"]


def importance(length: int, history: int = 10) -> Importance:
    """Nothing known yet; see `importance_times` (Nichol & Dhariwal 2021, section 3.3)."""
    return Importance(jnp.zeros((length, history)), jnp.zeros((length,), jnp.int32))


def importance_weights(state: Importance, uniform: float = 1e-3) -> Float[Array, "t"]:
    """The probability of each time: root of the mean squared loss, mixed with `uniform` of all times.

    Equal for all until every time has its full history.
    """
    length, history = state.losses.shape
    root = jnp.sqrt((state.losses**2).mean(axis=1))
    p = root / jnp.maximum(root.sum(), 1e-20) * (1 - uniform) + uniform / length
    return jnp.where((state.count >= history).all(), p, 1 / length)


def importance_times(key, size: int, state: Importance) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """(times, weights): a loss times its weight, 1 / (T p), has the mean of uniform times."""
    p = importance_weights(state)
    t = jax.random.choice(key, len(p), (size,), p=p)
    return t.astype(float), 1 / (len(p) * p[t])


def importance_update(state: Importance, t: Float[Array, "b"], losses: Float[Array, "b"]) -> Importance:
    """The state after the losses [b] of times t [b], unweighted; the oldest of a time give way."""
    history = state.losses.shape[1]

    def add(state, pair):
        t, value = pair
        full = state.count[t] >= history
        row = jnp.where(full, jnp.roll(state.losses[t], -1), state.losses[t])
        row = row.at[jnp.where(full, history - 1, state.count[t])].set(value)
        return Importance(
            state.losses.at[t].set(row), state.count.at[t].set(jnp.minimum(state.count[t] + 1, history))
        ), None

    return jax.lax.scan(add, state, (t.astype(jnp.int32), losses.astype(state.losses.dtype)))[0]
