"""Sampling grids: the rows (t, t_next) that a sampler walks, padded so that the number of steps may be traced.

Rows beyond the number of steps have i = -1; `rows(grid)` counts the others:

    sample(denoise, sampler, grid, key, x, num_steps=grids.rows(grid))

Every row stands for itself: a sampler that looks twice at a level (Heun, PNDM, correctors) gets rows with t == t_next,
and a row that begins above the level at which the one before it ended (RePaint, churn) is reached by adding noise: see
`samplers.climb`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgen.diffusion.schedules import Schedule
from vgen.types import Step

SPACINGS = ("leading", "trailing", "linspace", "quadratic", "karras", "exponential")


def rows(grid: Step):
    """The number of rows that are no padding, int32 (traced if the grid is)."""
    return (jnp.asarray(grid.i) >= 0).sum(dtype=jnp.int32)


def grid(
    schedule: Schedule,
    num_steps: Any,
    max_steps: int | None = None,
    spacing: str = "leading",
    *,
    offset: int = 0,
    final: str = "clean",
    spare: int = 0,
    rounded: bool | None = None,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    shift: Any = 1.0,
    stride: bool = False,
) -> Step:
    """`num_steps` rows from noise to data.

    num_steps: int or traced int32.  max_steps: the number of rows with the padding, num_steps by default.
    spacing: "leading", multiples of T // num_steps, plus `offset` (Stable Diffusion and CompVis: 1); never reaches the
    last time.  "trailing", whole steps down from the last time; in a continuous time equal steps from t_max to clean.
    "linspace", both ends of the trained times.  "quadratic", DDIM's floor(c i^2) up to 0.8 T; in a continuous time
    linear in sqrt(t).  "karras" and "exponential", sigma / alpha equally spaced in its power 1 / rho and its logarithm,
    from sigma_max to sigma_min, by default those of the schedule.  A single step starts at the last time (not leading).
    final: "clean", the last row ends in x0 (`set_alpha_to_one`, `final_sigmas_type="zero"`), or "first", it ends at
    t_min (Stable Diffusion's DDIM and PNDM; `final_sigmas_type="sigma_min"`).
    spare: further points, left out at the end: DPM-Solver lays num_steps + 1.  rounded: whole times, by default in
    leading, trailing, linspace and quadratic of a table.  shift: t -> shift t / (1 + (shift - 1) t), for a flow at high
    resolution (Esser et al. 2024).
    stride: QUIRK: a row ends at t - T // num_steps, even where this is no time of the grid (diffusers' DDIM).
    Raises ValueError where num_steps is traced and max_steps missing, num_steps is not in 1 .. max_steps, max_steps
    exceeds a table, a name is unknown, or the spacing needs a table.
    """
    max_steps = _check(schedule, num_steps, max_steps, spacing, offset, final, spare, stride)
    n, k = jnp.asarray(num_steps, jnp.int32), jnp.arange(max_steps + 1, dtype=jnp.int32)
    if spacing in ("karras", "exponential"):
        t, alpha, sigma = _levels(schedule, n, k, spacing, rho, sigma_min, sigma_max)
        t = jnp.round(t) if rounded else t
    else:
        t = _times(schedule, n, k, spacing, offset, spare, schedule.length is not None if rounded is None else rounded)
        t = jnp.asarray(t, float)
        t = shift * t / (1 + (shift - 1) * t) if isinstance(shift, jax.Array) or shift != 1 else t
        alpha, sigma = schedule.level(t)
    end = _end(schedule, final)
    past = k >= n
    t, alpha, sigma = (jnp.where(past, last, a) for a, last in zip((t, alpha, sigma), end))
    after = [a[1:] for a in (t, alpha, sigma)]
    if stride:
        t_next = t[:-1] - schedule.length // n
        below = t_next < 0
        after = [jnp.where(below, last, a) for a, last in zip((t_next, *schedule.level(t_next)), end)]
    i = jnp.where(k < n, k, -1)[:-1]
    return Step(i, t[:-1], after[0], alpha[:-1], sigma[:-1], after[1], after[2])


def free(schedule: Schedule, times: Any, final: str | None = "clean") -> Step:
    """The grid of a list of times, which may go up again: rows (times[k], times[k + 1]), those that go up left out.

    A row above the end of the one before it is reached by `samplers.climb`.  final: see `grid`; None ends at the last
    of the times.  Raises ValueError where fewer than one row goes down, or a time lies outside of the schedule.
    """
    times = np.asarray(times, np.float64)
    if (
        times.ndim != 1
        or not len(times)
        or times.min() < min(schedule.clean, 0.0)
        or times.max() > schedule.t_max * (1 + 1e-6)
    ):
        raise ValueError(f"free: times must be a list within {schedule.clean} .. {schedule.t_max}, got {times}")
    alpha, sigma = schedule.level(times)
    columns = [jnp.asarray(times, float), alpha, sigma]
    if final is not None:
        columns = [
            jnp.concatenate([a, jnp.asarray(last, a.dtype)[None]]) for a, last in zip(columns, _end(schedule, final))
        ]
        times = np.concatenate([times, [-np.inf]])
    down = np.flatnonzero(times[1:] <= times[:-1])
    if not len(down):
        raise ValueError("free: no row goes down; a grid that only goes up is `inverted`")
    (t, alpha, sigma), (t_next, alpha_next, sigma_next) = ([a[down + j] for a in columns] for j in (0, 1))
    return Step(jnp.arange(len(down), dtype=jnp.int32), t, t_next, alpha, sigma, alpha_next, sigma_next)


def sections(length: int, counts: Sequence[int]) -> list[int]:
    """Descending times: 0 .. length - 1 in len(counts) equal parts, counts[j] times in each, both ends of it included.

    ADM's respacing; (n,) are n times over the whole.  Raises ValueError where a part has fewer times than its count.
    """
    times, start = [], 0
    for j, count in enumerate(counts):
        size = length // len(counts) + (j < length % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"sections: each count must be in 1..{size}, the times of its part, got {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        times += [start + round(sum([stride] * i, 0.0)) for i in range(count)]  # added up, as theirs: halves may fall
        start += size
    return times[::-1]


# ---------------------------------------------------------------------------------------------- grids made of grids


def take(grid: Step, index, count) -> Step:
    """The rows grid[index] under new numbers 0 .. count - 1, the rest padding; count may be traced."""
    return _numbered(jax.tree.map(lambda field: jnp.asarray(field)[index], grid), count)


def tail(grid: Step, strength: Any) -> Step:
    """The last floor(strength * steps) rows of a grid: SDEdit's, and diffusers' img2img's.  strength: in [0, 1]."""
    n, length = rows(grid), grid.i.shape[0]
    count = jnp.clip(jnp.floor(n * jnp.asarray(strength, float) + 1e-4), 0, n).astype(jnp.int32)
    return take(grid, jnp.minimum(jnp.arange(length) + n - count, length - 1), count)


def resampled(grid: Step, jump_length: int = 10, repeats: int = 10) -> Step:
    """The rows of RePaint: at every jump_length-th level from the end, the jump_length rows above are walked again.

    repeats: how often they are walked in all (the authors' jump_n_sample), 1 for the grid itself.
    The authors' list of times holds the way up too; here it is one addition of noise, `samplers.climb`.
    Lugmayr et al. 2022, section 4.2 and appendix B.  Raises ValueError where jump_length or repeats is below 1.
    """
    if jump_length < 1 or repeats < 1:
        raise ValueError(f"resampled: jump_length and repeats must be at least 1, got {jump_length} and {repeats}")
    n, length = rows(grid), grid.i.shape[0]

    def layout(n):
        top = jump_length * ((n - jump_length - 1) // jump_length)  # the highest level at which rows are repeated
        head = n - 1 - top
        return top, head, head + repeats * top + (repeats - 1) * jump_length + 1

    longest = max(max(int(layout(m)[2]) if m > jump_length else m for m in range(1, length + 1)), length)
    top, head, count = layout(n)
    m = jnp.arange(longest)
    block, within = jnp.divmod(m - head, repeats * jump_length)
    again = within < (repeats - 1) * jump_length
    level = top - block * jump_length
    t = jnp.where(again, level + jump_length - within % jump_length, level - (within - (repeats - 1) * jump_length))
    index = jnp.where((m < head) | (n <= jump_length), m, n - 1 - t)
    return take(grid, jnp.clip(index, 0, length - 1), jnp.where(n > jump_length, count, n))


def heun(grid: Step) -> Step:
    """Each row but the last followed by one that looks again where it ended: 2 n - 1 rows for `multistep.heun`."""
    m = jnp.arange(2 * grid.i.shape[0] - 1)
    return _numbered(_corrected(m % 2 == 1, grid, m // 2), 2 * rows(grid) - 1)


def correctors(grid: Step, repeats: int = 1) -> Step:
    """Each row preceded by `repeats` that stay on its level: those of `samplers.predictor_corrector`."""
    each = repeats + 1
    m = jnp.arange(each * grid.i.shape[0])
    stay = grid._replace(t_next=grid.t, alpha_next=grid.alpha, sigma_next=grid.sigma)
    mixed = jax.tree.map(lambda a, b: jnp.where(m % each < repeats, a[m // each], b[m // each]), stay, grid)
    return _numbered(mixed, each * rows(grid))


def plms(grid: Step) -> Step:
    """PNDM without Runge-Kutta, as Stable Diffusion uses it: the first row is corrected at its end; n + 1 rows."""
    length = grid.i.shape[0]
    m = jnp.arange(length + 1)
    return _numbered(_corrected(m == 1, grid, jnp.maximum(m - 1, 0)), rows(grid) + 1)


def prk(schedule: Schedule, grid: Step) -> Step:
    """PNDM with three Runge-Kutta steps of four rows each at the start: n + 9 rows, n >= 4 (Liu et al. 2022).

    Half of a step is half of the spacing of the grid, rounded down in a table.
    Raises ValueError where the grid has fewer than 4 rows.
    """
    length = grid.i.shape[0]
    if length < 4:
        raise ValueError(f"prk: three Runge-Kutta steps need a grid of at least 4 rows, got {length}")
    m = jnp.arange(length + 9)
    base, phase = m // 4, m % 4
    row = jax.tree.map(lambda field: field[jnp.where(m < 12, base, m - 9)], grid)
    half = (row.t - row.t_next) / 2
    half = jnp.floor(half) if schedule.length is not None else half
    t = jnp.where(phase == 0, row.t, jnp.where(phase == 3, row.t_next, row.t_next + half))
    t_next = jnp.where(phase == 0, row.t - half, jnp.where(phase == 1, row.t_next + half, row.t_next))
    (alpha, sigma), (alpha_next, sigma_next) = schedule.level(t), schedule.level(t_next)
    early = Step(row.i, t, t_next, alpha, sigma, alpha_next, sigma_next)
    return _numbered(jax.tree.map(lambda a, b: jnp.where(m < 12, a, b), early, row), rows(grid) + 9)


def inverted(grid: Step, network: str = "next") -> Step:
    """A grid walked from data to noise: DDIM inversion is `samplers.ddim()` along it.

    network: which time the network is told: "next", that of the level a row leads to (diffusers' DDIMInverseScheduler),
    or "own", that of the level x is on; the first row, which would begin where the last of the grid ends, is then left
    out (ADM's ddim_reverse_sample).
    x0 says nothing of the noise in clean data: under "next" use a grid with final="first".
    Raises ValueError for another name.
    """
    if network not in ("next", "own"):
        raise ValueError(f"inverted: network must be next or own, got {network!r}")
    n, length = rows(grid), grid.i.shape[0]
    skip = int(network == "own")
    index = jnp.clip(n - 1 - skip - jnp.arange(length - skip), 0, length - 1)
    turned = Step(
        grid.i, grid.t_next if skip else grid.t, grid.t, grid.alpha_next, grid.sigma_next, grid.alpha, grid.sigma
    )
    return take(turned, index, n - skip)


def churned(grid: Step, churn: Any, low: Any = 0.0, high: Any = jnp.inf, schedule: Schedule | None = None) -> Step:
    """Rows that begin above where the one before ended: sigma is raised by 1 + min(churn / n, sqrt(2) - 1).

    Where low <= sigma / alpha <= high.  `samplers.climb(factor=S_noise)` adds the noise (EDM, Karras et al. 2022,
    algorithm 2).  schedule: gives the times and scales of the new levels; without it alpha stays and t = sigma.
    """
    ratio = grid.sigma / grid.alpha
    gamma = jnp.where((ratio >= low) & (ratio <= high), jnp.minimum(churn / rows(grid), 2**0.5 - 1), 0.0)
    raised = ratio * (1 + gamma)
    if schedule is None:
        return grid._replace(t=raised * grid.alpha, sigma=raised * grid.alpha)
    alpha, sigma = schedule.scale(raised)
    return grid._replace(t=schedule.time(raised), alpha=alpha, sigma=sigma)


# ------------------------------------------------------------------------------------------------------------ details


def _numbered(grid: Step, count) -> Step:
    k = jnp.arange(grid.t.shape[0], dtype=jnp.int32)
    return grid._replace(i=jnp.where(k < count, k, -1))


def _corrected(again, grid: Step, index) -> Step:
    """grid[index], or where `again` the row that stays on the level at which that one ends."""
    row = jax.tree.map(lambda field: jnp.asarray(field)[index], grid)
    stay = row._replace(t=row.t_next, alpha=row.alpha_next, sigma=row.sigma_next)
    return jax.tree.map(lambda a, b: jnp.where(again, a, b), stay, row)


def _check(schedule, num_steps, max_steps, spacing, offset, final, spare, stride) -> int:
    traced = isinstance(num_steps, jax.core.Tracer)
    if traced and max_steps is None:
        raise ValueError("grid: a traced num_steps needs max_steps, the number of rows")
    max_steps = int(num_steps) if max_steps is None else max_steps
    if not traced and not 1 <= num_steps <= max_steps:
        raise ValueError(f"grid: num_steps must be in 1..max_steps = {max_steps}, got {num_steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"grid: spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if final not in ("clean", "first"):
        raise ValueError(f"grid: final must be clean or first, got {final!r}")
    if spare and spacing in ("trailing", "karras", "exponential"):
        raise ValueError(f"grid: spare points are for leading, linspace and quadratic, got spacing {spacing!r}")
    if schedule.length is None:
        if spacing == "leading" or stride:
            raise ValueError("grid: leading and stride need a table of times, and this schedule is continuous")
    elif not 1 <= max_steps + spare <= schedule.length:
        raise ValueError(f"grid: steps must be in 1..{schedule.length - spare}, those of the schedule, got {max_steps}")
    elif spacing == "leading" and not traced:
        n = int(num_steps)
        if schedule.length // (n + spare) * (n + spare - 1) + offset >= schedule.length:
            raise ValueError(f"grid: offset {offset} with {n} steps leaves the {schedule.length} times of the schedule")
    return max_steps


def _times(schedule, n, k, spacing, offset, spare, rounded):
    """Time of point k, for k < n."""
    last = jnp.maximum(n + spare - 1, 1)  # of the points that are laid
    left = last - k
    if schedule.length is None:
        low, high, part = schedule.t_min, schedule.t_max, jnp.asarray(left, float) / last
        if spacing == "trailing":
            return high * jnp.asarray(n - k, float) / n
        t = low + (high - low) * part if spacing == "linspace" else (low**0.5 + (high**0.5 - low**0.5) * part) ** 2
        return jnp.round(t) if rounded else t
    size = schedule.length
    if spacing == "leading":
        return jnp.minimum(size // (n + spare) * (n + spare - 1 - k) + offset, size - 1)
    if spacing == "trailing":
        return (_half_even(size * (n - k), n) if rounded else size * jnp.asarray(n - k, float) / n) - 1
    if spacing == "linspace":
        return _half_even((size - 1) * left, last) if rounded else (size - 1) * jnp.asarray(left, float) / last
    t = 0.8 * size * (jnp.asarray(left, float) / last) ** 2
    return jnp.maximum(jnp.floor(t + 1e-3), left) if rounded else t  # DDIM repeats times where c (2 i + 1) < 1


def _half_even(a, b):
    """a / b rounded to the nearest whole number, a half to the even one, in whole arithmetic."""
    whole, rest = jnp.divmod(a, b)
    return whole + ((2 * rest > b) | ((2 * rest == b) & (whole % 2 == 1)))


def _levels(schedule, n, k, spacing, rho, sigma_min, sigma_max):
    """(t, alpha, sigma) of point k with sigma / alpha between sigma_max and sigma_min."""
    ends = []
    for t, given in ((schedule.t_max, sigma_max), (schedule.t_min, sigma_min)):
        alpha, sigma = schedule.level(t)
        ends.append(sigma / alpha if given is None else jnp.asarray(given, float))
    part = jnp.asarray(k, float) / jnp.maximum(n - 1, 1)
    if spacing == "karras":
        ratio = (ends[0] ** (1 / rho) + part * (ends[1] ** (1 / rho) - ends[0] ** (1 / rho))) ** rho
    else:
        ratio = jnp.exp(jnp.log(ends[0]) + part * (jnp.log(ends[1]) - jnp.log(ends[0])))
    return (schedule.time(ratio), *schedule.scale(ratio))


def _end(schedule, final):
    """(t, alpha, sigma) at which a grid ends."""
    if final == "clean":
        return schedule.clean, 1.0, 0.0
    return (schedule.t_min, *schedule.level(schedule.t_min))
