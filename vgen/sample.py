"""The only sampling loop: denoise, step, repeat; every method is a function handed to it."""

import jax
import jax.numpy as jnp

from vgen.types import Denoiser, Intervention, Sampler, Step


def sample(
    denoise: Denoiser,
    sampler: Sampler,
    grid: Step,
    key,
    x,
    hook: Intervention | None = None,
    num_steps=None,
    differentiable: bool = False,
    states: bool = False,
):
    """Run `sampler` from `x` along `grid` and return the last x; with `states` (x, the last state of the hook).

    denoise: (x, step) -> Prediction.  grid: a Step whose fields are arrays [length].  key: a typed PRNG key; step i
    uses fold_in(key, i), so that a result depends on the seed and the grid alone.  x: any array or tree.
    hook: an Intervention called around every step.
    num_steps: int or traced int32 <= length, how many rows to run (all by default).  With a traced number the loop is
    one compiled program for every step count: pad the grid to the longest and pass the count.
    differentiable: a form that gradients can be taken through, also with a traced num_steps: a scan over all rows in
    which those beyond num_steps do nothing.  It keeps what every step needs for its gradient; `jax.checkpoint(denoise)`
    keeps less.
    Raises ValueError if the fields of the grid differ in length.
    """
    lengths = {jnp.shape(field)[0] for field in grid}
    if len(lengths) != 1:
        raise ValueError(f"sample: the fields of grid must have one length, got {sorted(lengths)}")
    hook = hook or Intervention()
    length = lengths.pop()
    num_steps = length if num_steps is None else num_steps

    def body(i, carry):
        x, state, hook_state = carry
        step = jax.tree.map(lambda field: jnp.asarray(field)[i], grid)
        before_key, step_key, after_key = jax.random.split(jax.random.fold_in(key, i), 3)
        if hook.before is not None:
            x, hook_state = hook.before(before_key, x, step, hook_state)
        pred = denoise(x, step)
        x_next, state = sampler.step(step_key, x, pred, step, state)
        if hook.after is not None:
            x_next, hook_state = hook.after(after_key, x_next, x, pred, step, hook_state)
        return x_next, state, hook_state

    carry = (x, sampler.init(x), hook.init(x) if hook.init is not None else ())
    if not differentiable:
        x, _, hook_state = jax.lax.fori_loop(0, num_steps, body, carry)
        return (x, hook_state) if states else x

    def row(carry, i):
        return jax.lax.cond(i < num_steps, body, lambda i, carry: carry, i, carry), None

    (x, _, hook_state), _ = jax.lax.scan(row, carry, jnp.arange(length, dtype=jnp.int32))
    return (x, hook_state) if states else x
