"""Words drawn one by one: what may come next as transformers has it, and that they are drawn from that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.convert.tables import quick  # noqa: F401  a fixture
from vgen.tokens.raster import narrowed
from vgen.tokens.words import adjusting, draw_words

pytestmark = pytest.mark.usefixtures("quick")
RNG = np.random.default_rng(0)


def test_what_may_come_next_against_transformers(x64):
    process = pytest.importorskip("transformers").generation.logits_process
    logits, ids = RNG.standard_normal((5, 12)) * 3, RNG.integers(0, 12, (5, 6))
    for place, temperature, top_k, top_p, repetition, least in (
        (3, 1.0, 0, 0.9, 1.1, 0), (6, 0.7, 5, 0.8, 1.0, 9), (1, 1.5, 3, 1.0, 2.0, 2), (4, 2.0, 0, 0.3, 0.5, 4),
    ):  # fmt: skip
        want, seen = torch.tensor(logits), torch.tensor(ids[:, :place])
        want = process.RepetitionPenaltyLogitsProcessor(repetition)(seen, want)
        want = process.MinLengthLogitsProcessor(least, 7)(seen, want)
        ours = adjusting(7, least=least, repetition=repetition)(jnp.asarray(logits), jnp.asarray(ids), place)
        np.testing.assert_allclose(ours, want.numpy(), rtol=1e-12)
        want = process.TemperatureLogitsWarper(temperature)(seen, want)
        want = process.TopKLogitsWarper(top_k)(seen, want) if top_k else want
        want = process.TopPLogitsWarper(top_p)(seen, want) if top_p < 1 else want
        got = narrowed(ours, temperature, top_k, top_p) / temperature
        np.testing.assert_allclose(jax.nn.softmax(got), torch.softmax(want, -1).numpy(), rtol=1e-12)


def test_words_are_drawn_from_the_nucleus_up_to_the_end():
    """From one word to the next by a table; 4000 texts side by side."""
    logits = jnp.log(jnp.asarray([[0.0, 0.0, 0.0, 1.0], [0.5, 0.3, 0.15, 0.05], [0.25] * 4, [0.1, 0.6, 0.3, 0.0]]))
    following = lambda ids, place: logits[jax.lax.dynamic_index_in_dim(ids, place - 1, 1, False)]
    start = jnp.full((4000, 1), 1)
    draw = jax.jit(lambda key, p: draw_words(key, following, start, 6, end=2, pad=0, top_p=p))
    ids = np.asarray(draw(jax.random.key(0), 0.9))
    assert ids.shape == (4000, 6) and (ids[:, 0] == 1).all()
    share = np.bincount(ids[:, 1], minlength=4) / 4000  # of 0.5, 0.3 and 0.15, the nucleus
    np.testing.assert_allclose(share, np.array([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03)
    for row in ids[:200]:
        ends = np.flatnonzero(row == 2)
        assert not len(ends) or not row[ends[0] + 1 :].any()
    assert set(np.asarray(draw(jax.random.key(1), 0.1))[:, 1].tolist()) == {0}  # the likeliest alone
    with pytest.raises(ValueError, match="a text of 1 tokens cannot begin with 1"):
        draw_words(jax.random.key(0), following, start, 1, end=2)
