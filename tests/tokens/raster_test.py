"""Token by token: what may be drawn, the exact distribution of a small chain, caches and windows change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen import guidance
from vgen.sample import sample
from vgen.tokens import raster

pytestmark = pytest.mark.usefixtures("quick")

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
VOCAB, TOKENS = 3, 12
WEIGHTS = jnp.asarray(RNG.standard_normal((TOKENS, VOCAB, VOCAB)), jnp.float32) * 2  # of the token before, by place
FIRST = jnp.asarray(RNG.standard_normal(VOCAB), jnp.float32)


def forward(ids, shift=0.0):
    """Logits of a network in which every token depends on all before it."""
    said = jnp.take_along_axis(WEIGHTS[None, : ids.shape[1]], ids[:, :, None, None], axis=2)[:, :, 0]  # [b, n, vocab]
    so_far = jnp.cumsum(said, axis=1)[:, :-1]
    return FIRST + shift + jnp.pad(so_far, ((0, 0), (1, 0), (0, 0)))


def advance(previous, i, so_far):
    """The same with what was said so far as the cache."""
    said = jnp.where(i > 0, WEIGHTS[i - 1, previous], 0)
    return FIRST + so_far + said, so_far + said


def draw(denoise, b=4, key=KEY, cache=(), start=None, count=TOKENS, **knobs):
    start = jnp.full((b, count), raster.UNKNOWN) if start is None else start
    x = raster.Drawn(start, cache)
    return sample(denoise, raster.raster_sampler(**knobs), raster.grid(start.shape[1]), key, x).ids


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.5), (1, 1.0), (0, 1e-4), (400, 0.95)])
def test_what_may_be_drawn_against_transformers(temperature, top_k, top_p):
    transformers = pytest.importorskip("transformers")
    import torch

    logits = RNG.standard_normal((7, 40)).astype(np.float32) * 2
    want = transformers.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    if top_k:
        want = transformers.TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = transformers.TopPLogitsWarper(top_p)(None, want)
    got = jax.jit(raster.narrowed)(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want.numpy()))
    probs = jax.nn.softmax(got / temperature)
    np.testing.assert_allclose(probs, torch.softmax(want, -1).numpy(), atol=1e-6)


def test_equal_likelihoods_and_none_ruled_out():
    logits = jnp.zeros((2, 5))
    np.testing.assert_array_equal(raster.keep_top_p(logits, 0.6) == 0, [[True] * 3 + [False] * 2] * 2)
    np.testing.assert_array_equal(raster.keep_top_p(jnp.asarray([0.0, -200.0]), 1.0), [0.0, -200.0])
    np.testing.assert_array_equal(raster.narrowed(logits), logits)


def test_the_grid_goes_through_all_tokens():
    steps = raster.grid(4)
    np.testing.assert_array_equal(steps.i, range(4))
    np.testing.assert_allclose(steps.t, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(steps.sigma_next, [0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(steps.alpha + steps.sigma, 1)


def test_tokens_have_the_distribution_of_the_chain():
    """All 27 rows of three tokens: their shares among 30,000 against the product of the conditional probabilities."""
    b = 30_000
    ids = jax.jit(lambda key: draw(raster.whole(forward, guidance.single), b, key, count=3))(KEY)
    rows = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 3, indexing="ij"), -1).reshape(27, 3)
    log_p = jax.nn.log_softmax(forward(rows))
    want = np.exp(jnp.take_along_axis(log_p, rows[..., None], -1)[..., 0].sum(1))
    got = np.bincount(np.asarray(ids) @ [9, 3, 1], minlength=27) / b
    assert abs(want.sum() - 1) < 1e-5
    assert (np.abs(got - want) < 4.5 * np.sqrt(want * (1 - want) / b) + 1e-4).all()


def test_a_cache_changes_nothing():
    whole = jax.jit(lambda key: draw(raster.whole(forward, guidance.single), key=key))
    cached = jax.jit(lambda key: draw(raster.cached(advance, guidance.single), key=key, cache=jnp.zeros((4, VOCAB))))
    for seed in range(3):
        key = jax.random.key(seed)
        np.testing.assert_array_equal(whole(key), cached(key))
    assert len(np.unique(np.asarray(whole(KEY)))) == VOCAB


def test_known_tokens_stay_and_are_seen():
    start = jnp.full((4, TOKENS), raster.UNKNOWN).at[:, 5].set(2).at[:, 0].set(1)
    greedy = jax.jit(lambda start: draw(raster.whole(forward, guidance.single), start=start, temperature=0.0))
    ids = greedy(start)
    assert (ids[:, 5] == 2).all() and (ids[:, 0] == 1).all() and (ids >= 0).all()
    np.testing.assert_array_equal(ids[:, 1], forward(ids)[:, 1].argmax(-1))
    np.testing.assert_array_equal(ids[:, 6:], forward(ids)[:, 6:].argmax(-1))


def test_guidance_mixes_the_logits_under_both_conditions():
    shift = jnp.repeat(jnp.asarray([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]]), 4, axis=0)[:, None]
    both = raster.whole(lambda ids: forward(ids, shift), guidance.cfg(2.0), 2)
    step = jax.tree.map(lambda a: a[3], raster.grid(TOKENS))
    ids = jnp.asarray(RNG.integers(0, VOCAB, (4, TOKENS)))
    want = 2 * forward(ids, shift[:4])[:, 3] - forward(ids, shift[4:])[:, 3]
    np.testing.assert_allclose(both(raster.Drawn(ids), step).x0, want, atol=1e-5)
    doubled = lambda previous, i, cache: tuple(x + d for x, d in zip(advance(previous, i, cache), (shift[:, 0], 0)))
    so_far = jnp.concatenate([(forward(ids)[:, 2] - FIRST)] * 2)
    pred = raster.cached(doubled, guidance.cfg(2.0), 2)(raster.Drawn(ids, so_far), step)
    np.testing.assert_allclose(pred.x0, want, atol=1e-5)
    assert pred.aux.shape == (8, VOCAB)


def test_knobs_are_traced():
    traces = []

    def run(key, temperature, top_k, top_p, scale):
        traces.append(1)
        denoise = raster.whole(lambda ids: forward(ids), guidance.cfg(scale), 2)
        return draw(denoise, key=key, temperature=temperature, top_k=top_k, top_p=top_p)

    run = jax.jit(run)
    a = run(KEY, 1.0, 0, 1.0, 1.0)
    greedy = run(KEY, 0.0, 0, 1.0, 1.0)
    for knobs in ((1.0, 1, 1.0, 1.0), (1.0, 0, 1e-6, 1.0), (0.0, 2, 0.9, 3.0)):
        np.testing.assert_array_equal(run(KEY, *knobs), greedy)
    assert len(traces) == 1 and (a != greedy).any()


# ---------------------------------------------------------------------------------------------------------- windows


def local(ids):
    """Logits of a 3 x 4 grid by which each token repeats the one above it, in the first row that to its left."""
    grid = ids.reshape(-1, 3, 4)
    above = jnp.concatenate([jnp.pad(grid[:, :1, :-1], ((0, 0), (0, 0), (1, 0))), grid[:, :-1]], axis=1)
    return jax.nn.one_hot(above.reshape(-1, 12), 9) * 5


def test_a_window_of_the_whole_grid_is_plain_sampling():
    whole = jax.jit(lambda key: draw(raster.whole(forward, guidance.single), key=key))
    window = jax.jit(lambda key: draw(raster.sliding(forward, (3, 4), (3, 4), guidance.single), key=key))
    np.testing.assert_array_equal(whole(KEY), window(KEY))


@pytest.mark.parametrize("length", [16, 17, 23, 24, 40])
def test_windows_lie_as_in_the_authors_notebook(length):
    """CompVis/taming-transformers, scripts/taming-transformers.ipynb: a window of 16, the token at 8 of it inside."""

    def place(i):
        if i <= 8:
            return i
        return 16 - (length - i) if length - i < 8 else 8

    starts = [int(raster.window_start(jnp.asarray(i), length, 16)) for i in range(length)]
    assert starts == [i - place(i) for i in range(length)]


def test_tokens_of_a_larger_picture_see_their_window():
    start = jnp.full((2, 30), raster.UNKNOWN).at[:, 0].set(jnp.asarray([4, 7]))
    denoise = raster.sliding(local, (5, 6), (3, 4), guidance.single)
    ids = jax.jit(lambda start: draw(denoise, start=start, temperature=0.0))(start)
    np.testing.assert_array_equal(ids, np.repeat([[4], [7]], 30, axis=1))  # passed on through all windows
    seen = []

    def spy(ids):
        jax.debug.callback(lambda ids: seen.append(np.asarray(ids)), ids)
        return jnp.zeros((*ids.shape, 9))

    x = raster.Drawn(jnp.arange(30)[None])
    step = jax.tree.map(lambda a: a[20], raster.grid(30))  # row 3, column 2 of 5 x 6
    raster.sliding(spy, (5, 6), (3, 4), guidance.single)(x, step)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], np.arange(30).reshape(5, 6)[2:5, 0:4].reshape(1, 12))


def test_a_canvas_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="must hold the window"):
        raster.sliding(local, (3, 3), (3, 4), guidance.single)
