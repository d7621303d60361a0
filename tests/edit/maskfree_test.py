"""Mask-free editing as an Edit of the one loop."""

import jax
import jax.numpy as jnp
import numpy as np

from vgen.edit.maskfree import maskfree
from vgen.sample import sample
from vgen.types import Intervention, Prediction

MASK, VOCAB = 9, 9


def run(edit, denoise, key=0, num_steps=None):
    return sample(denoise, edit.sampler, edit.times, jax.random.key(key), edit.start, edit.hook, num_steps)


def wants(target, certainty=50.0):
    return lambda x, step: Prediction(jnp.broadcast_to(certainty * jax.nn.one_hot(target, VOCAB), (*x.shape, VOCAB)))


def test_every_iteration_masks_eight_percent_and_fills_it():
    masked = []

    def denoise(x, step):
        jax.debug.callback(lambda m: masked.append(np.asarray(m)), x == MASK)
        return wants(3)(x, step)

    x = run(maskfree(jnp.zeros((4, 100), jnp.int32), MASK, num_steps=30), denoise)
    jax.effects_barrier()
    masked = np.stack(masked)  # [30, 4, 100]
    assert (masked.sum(-1) == 8).all() and not (x == MASK).any()
    assert set(np.unique(x)) == {0, 3}
    # a token stays unmasked 30 times with probability 0.92^30 = 0.082
    assert abs(np.mean(np.asarray(x) == 0) - 0.92**30) < 0.06
    assert masked.mean((0, 1)).std() > 0  # not the same places every time
    assert (masked[0] != masked[1]).any() and (masked[0, 0] != masked[0, 1]).any()


def test_converges_to_what_the_text_wants_and_leaves_the_rest():
    tokens = jax.random.randint(jax.random.key(0), (2, 36), 0, VOCAB)
    free = jnp.arange(36)[None] < jnp.asarray([[36], [10]])
    x = run(maskfree(tokens, MASK, num_steps=100, free=free, fraction=0.2), wants(3))
    np.testing.assert_array_equal(x, jnp.where(free, 3, tokens))


def test_only_the_top_three_are_drawn():
    flat = lambda x, step: Prediction(
        jnp.broadcast_to(jnp.asarray([0, 0, 0.2, 0.1, 0, 0.3, 0, 0, 0.0]), (*x.shape, VOCAB))
    )
    x = run(maskfree(jnp.full((8, 64), 5), MASK, num_steps=40), flat)
    assert set(np.unique(x)) == {2, 3, 5}


def test_one_program_for_all_knobs():
    traces = []

    @jax.jit
    def edit(num_steps, fraction, top_k, temperature):
        traces.append(1)
        method = maskfree(
            jnp.zeros((1, 50), jnp.int32),
            MASK,
            num_steps=num_steps,
            max_steps=60,
            fraction=fraction,
            top_k=top_k,
            temperature=temperature,
        )
        return run(method, wants(3), num_steps=num_steps)

    assert (edit(1, 0.08, 3, 1.0) == 3).sum() == 4
    assert (edit(1, 0.5, 1, 0.0) == 3).sum() == 25
    assert (edit(60, 0.5, 9, 1.0) == 3).all()
    assert len(traces) == 1


def test_hook_is_an_intervention():
    assert isinstance(maskfree(jnp.zeros((1, 4), jnp.int32), MASK).hook, Intervention)
