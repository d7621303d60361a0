"""Parallel decoding in the sampling loop: counts, known tokens, exactness, aMUSEd's scheduler, recompilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vgen.sample import sample
from vgen.tokens import parallel
from vgen.tokens.parallel import annealed, grid, keep_top_k, maskgit_sampler, sample_tokens
from vgen.types import Intervention, Prediction, Step

MASK, VOCAB = 7, 7


def oracle(truth, certainty=5.0):
    return lambda x, step: Prediction(certainty * jax.nn.one_hot(truth, VOCAB))


def counter():
    """A hook that notes the numbers of masked tokens after every step, and the list they go to."""
    found = []

    def after(key, x_next, x, pred, step, state):
        jax.debug.callback(lambda n: found.append(np.asarray(n)), (x_next == MASK).sum(1), ordered=True)
        return x_next, state

    return Intervention(after=after), found


@pytest.mark.parametrize("steps, n", [(1, 256), (3, 256), (8, 100), (24, 100)])
def test_counts_follow_the_cosine(steps, n):
    truth = jax.random.randint(jax.random.key(0), (2, n), 0, VOCAB)
    hook, found = counter()
    x = sample(oracle(truth), maskgit_sampler(MASK), grid(steps), jax.random.key(1), jnp.full((2, n), MASK), hook)
    jax.effects_barrier()
    want = [n]
    for i in range(1, steps):  # exact arithmetic: 2/3 of the way half of the tokens are left, not one fewer
        want.append(max(1, min(want[-1] - 1, int(np.floor(n * np.cos(np.pi * i / (2 * steps)) + 1e-9)))))
    np.testing.assert_array_equal(np.stack(found), np.repeat(np.array(want[1:] + [0])[:, None], 2, 1))
    assert not (x == MASK).any()


def test_known_tokens_never_change_and_counts_start_from_the_unknown():
    truth = jax.random.randint(jax.random.key(0), (3, 64), 0, VOCAB)
    known = jax.random.uniform(jax.random.key(1), truth.shape) < jnp.asarray([[0.25], [0.9], [1.0]])
    start = jnp.where(known, (truth + 1) % VOCAB, MASK)  # wrong on purpose: the network disagrees
    hook, found = counter()
    x = sample(oracle(truth, 50.0), maskgit_sampler(MASK), grid(4), jax.random.key(2), start, hook)
    jax.effects_barrier()
    np.testing.assert_array_equal(x, jnp.where(known, start, truth))
    unknown = np.asarray((~known).sum(1))
    np.testing.assert_array_equal(found[0], np.floor(unknown * np.cos(np.pi / 8)))
    assert found[0][2] == 0 and (found[-1] == 0).all()


def test_the_least_certain_are_masked_again():
    certainty = jnp.linspace(1.0, 9.0, 16)
    logits = jnp.broadcast_to(certainty[:, None] * jax.nn.one_hot(3, VOCAB), (1, 16, VOCAB))
    sampler = maskgit_sampler(MASK, choice_temperature=0.0, temperature=0.0)
    x = jnp.full((1, 16), MASK)
    step = jax.tree.map(lambda a: a[1], grid(3))  # half are left at 2/3
    x, _ = sampler.step(jax.random.key(0), x, Prediction(logits), step, sampler.init(x))
    np.testing.assert_array_equal(x[0], [MASK] * 8 + [3] * 8)


def test_choice_temperature_makes_the_choice_random():
    """With noise far above the differences of log p, every token is kept equally often."""
    logits = jnp.broadcast_to(jnp.linspace(1.0, 3.0, 8)[:, None] * jax.nn.one_hot(3, VOCAB), (4000, 8, VOCAB))
    step = jax.tree.map(lambda a: a[0], grid(2))
    masked = {}
    for choice in (0.0, 1e4):
        sampler = maskgit_sampler(MASK, choice_temperature=choice, temperature=0.0)
        x = jnp.full((4000, 8), MASK)
        x, _ = sampler.step(jax.random.key(0), x, Prediction(logits), step, sampler.init(x))
        masked[choice] = np.asarray((x == MASK).mean(0))  # floor(8 cos(pi / 4)) = 5 of 8
    np.testing.assert_array_equal(masked[0.0], [1] * 5 + [0] * 3)
    assert np.abs(masked[1e4] - 5 / 8).max() < 5 * (5 / 8 * 3 / 8 / 4000) ** 0.5


def test_tokens_follow_the_softmax():
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0])

    def draw(**kwargs):
        tokens = sample_tokens(jax.random.key(0), jnp.broadcast_to(logits, (100, 200, 4)), **kwargs)
        return np.bincount(np.asarray(tokens).ravel(), minlength=4)

    def chi(seen, logits):
        p = scipy.special.softmax(np.asarray(logits, np.float64))
        return scipy.stats.chisquare(seen[p > 0], 20_000 * p[p > 0]).pvalue

    assert chi(draw(), logits) > 1e-3
    assert chi(draw(temperature=2.0), logits / 2) > 1e-3
    np.testing.assert_array_equal(draw(temperature=0.0), [0, 0, 0, 20_000])
    for k in (2, jnp.int32(2)):  # static and traced
        seen = draw(top_k=k)
        assert seen[1] == seen[2] == 0
        assert chi(seen, [1.0, -np.inf, -np.inf, 2.0]) > 1e-3
    np.testing.assert_array_equal(keep_top_k(logits, 99), logits)


def test_matches_the_scheduler_of_amused(monkeypatch):
    """Step for step on the same noise: diffusers' AmusedScheduler (an independent reading of the same algorithm)."""
    import torch
    from diffusers.schedulers import scheduling_amused

    steps, n, choice = 7, 50, 4.5  # no step of 7 is at cos(pi / 3), see `masks_left`
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((steps, 2, n, VOCAB)).astype(np.float32) * 2
    token_noise, choice_noise = (rng.gumbel(size=s).astype(np.float32) for s in ((steps, 2, n, VOCAB), (steps, 2, n)))
    now = 0

    def gumbel(key, shape, dtype):
        return jnp.asarray((token_noise if len(shape) == 3 else choice_noise)[now], dtype)

    def multinomial(probs, count, generator=None):
        return (probs.log() + torch.from_numpy(token_noise[now]).reshape(-1, VOCAB)).argmax(-1, keepdim=True)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda t, generator: torch.from_numpy(choice_noise[now]))

    reference = scheduling_amused.AmusedScheduler(mask_token_id=MASK)
    reference.set_timesteps(steps, temperature=(choice * (1 - 1 / steps), 0))
    want = torch.full((2, n), MASK)
    sampler, rows = maskgit_sampler(MASK, choice_temperature=choice), grid(steps)
    x = jnp.full((2, n), MASK)
    state = sampler.init(x)
    for now in range(steps):
        want = reference.step(torch.from_numpy(logits[now]), reference.timesteps[now], want).prev_sample
        row = jax.tree.map(lambda a: a[now], rows)  # noqa: B023
        x, state = sampler.step(jax.random.key(0), x, Prediction(jnp.asarray(logits[now])), row, state)
        np.testing.assert_array_equal(x, want.numpy())


def test_grid_is_padded_and_ends_at_one():
    for steps in (1, 3, 49):
        rows, short = grid(steps, 64), grid(steps)
        for field in Step._fields:
            np.testing.assert_array_equal(getattr(rows, field)[:steps], getattr(short, field))
        assert short.t[0] == 0 and short.t_next[-1] == 1 and short.sigma[0] == 1 and short.sigma_next[-1] < 1e-6
        np.testing.assert_allclose(short.t_next[:-1], short.t[1:])
        np.testing.assert_allclose(short.alpha + short.sigma, 1)
    with pytest.raises(ValueError, match="1..max_steps = 4, got 5"):
        grid(5, 4)
    with pytest.raises(ValueError, match="traced num_steps needs max_steps"):
        jax.jit(grid)(3)


def test_one_program_for_all_knobs():
    truth, traces = jax.random.randint(jax.random.key(0), (2, 16), 0, VOCAB), []

    @jax.jit
    def run(num_steps, temperature, choice, top_k, key):
        traces.append(1)
        sampler = maskgit_sampler(MASK, choice_temperature=choice, temperature=temperature, top_k=top_k)
        return sample(oracle(truth), sampler, grid(num_steps, 12), key, jnp.full((2, 16), MASK), num_steps=num_steps)

    for steps, temperature, choice, k in ((1, 0.0, 0.0, 1), (5, 0.0, 4.5, 7), (12, 0.0, 9.0, 3), (7, 1.0, 1.0, 1)):
        np.testing.assert_array_equal(run(steps, temperature, choice, k, jax.random.key(steps)), truth)
    assert not jnp.array_equal(run(3, 100.0, 1.0, 7, jax.random.key(0)), truth)  # and temperature does something
    assert len(traces) == 1


def test_renoise_masks_sigma():
    x0, rows = jnp.zeros((3, 20), jnp.int32), grid(4)
    row = jax.tree.map(lambda a: a[2], rows)
    x = maskgit_sampler(MASK).renoise(jax.random.key(0), x0, row)
    np.testing.assert_array_equal((x == MASK).sum(1), [np.ceil(20 * np.cos(np.pi / 4))] * 3)


def test_masks_left_at_the_edges():
    def left(unknown, masked, fraction):
        return parallel.masks_left(jnp.asarray([unknown]), jnp.asarray([masked]), jnp.float32(fraction)).item()

    assert left(256, 256, np.cos(np.pi / 3)) == 128
    assert left(10, 3, 0.9) == 2  # always one fewer than before
    assert left(10, 5, 0.01) == 1 and left(10, 1, 0.5) == 1  # and at least one
    third = grid(12).sigma_next[7]  # two thirds of the way, where float32 falls short of 1/2
    for slack, count in ((1e-6, 128), (0.0, 127)):
        assert parallel.masks_left(jnp.asarray([256]), jnp.asarray([256]), third, slack).item() == count


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_annealed_goes_from_start_to_end(steps):
    rows = grid(steps)
    got = [annealed(2.0, 0.5, steps)(jax.tree.map(lambda a: a[i], rows)) for i in range(steps)]
    np.testing.assert_allclose(got, np.linspace(2.0, 0.5, steps), rtol=1e-6)


def test_a_function_of_the_step_is_the_factor_of_the_noise():
    """MaskGIT's own temperature, written as a function, chooses the same tokens; another one does not."""
    logits = jax.random.normal(jax.random.key(0), (2, 40, VOCAB))
    step = jax.tree.map(lambda a: a[2], grid(6))
    own = lambda step: 4.5 * (1 - step.t_next)

    def masked(choice):
        sampler, x = maskgit_sampler(MASK, choice_temperature=choice), jnp.full((2, 40), MASK)
        return sampler.step(jax.random.key(1), x, Prediction(logits), step, sampler.init(x))[0] == MASK

    np.testing.assert_array_equal(masked(own), masked(4.5))
    assert not np.array_equal(masked(annealed(2.0, 0.0, 6)), masked(4.5))


def test_second_thoughts_mend_what_was_found_at_once():
    """Pairs of equal tokens, all found in one step and so independently: 1/7 match.  Behind it half of them are found
    again in each row: of a pair one (1/2), which makes it match, both (1/4), which is as at first, or none (1/4).
    """

    def denoise(x, step):
        partner = x.reshape(-1, 32, 2)[..., ::-1].reshape(x.shape)
        return Prediction(20.0 * jax.nn.one_hot(jnp.where(partner == MASK, -1, partner), VOCAB))

    known = jnp.arange(64) < 8
    start = jnp.where(known, jnp.arange(64) % 2, MASK)[None].repeat(64, 0)  # four pairs that do not match, and stay
    matching = {}
    for rows in (1, 2, 12):
        hook = parallel.second_thoughts(MASK)
        x = sample(denoise, maskgit_sampler(MASK), grid(1, 12), jax.random.key(0), start, hook, num_steps=rows)
        np.testing.assert_array_equal(x[:, :8], start[:, :8])
        assert not (x == MASK).any()
        matching[rows] = float((x[:, 8::2] == x[:, 9::2]).mean())
    plain = sample(denoise, maskgit_sampler(MASK), grid(1), jax.random.key(0), start)
    one = sample(denoise, maskgit_sampler(MASK), grid(1, 12), jax.random.key(0), start, hook, num_steps=1)
    np.testing.assert_array_equal(one, plain)  # of what is decoded nothing changes
    assert matching == pytest.approx({1: 1 / 7, 2: 4 / 7, 12: 5 / 7}, abs=0.04)


def test_random_places_are_free_and_as_many_as_asked():
    free = jax.random.uniform(jax.random.key(0), (5, 40)) < 0.4
    count = jnp.asarray([0, 1, 3, 5, 100])
    chosen = np.stack([parallel.random_places(jax.random.key(i), free, count) for i in range(200)])
    np.testing.assert_array_equal(chosen.sum(2), np.minimum(count, free.sum(1))[None].repeat(200, 0))
    often = chosen.mean(0)
    assert not often[~np.asarray(free)].any() and often[3][np.asarray(free[3])].min() > 0.1
