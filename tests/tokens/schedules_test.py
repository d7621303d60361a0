"""Mask schedules and training masks: closed forms, exact counts, distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vgen.tokens.schedules import SCHEDULES, mask_fraction, mask_tokens, random_mask, sample_fraction


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_falls_from_one_to_zero(schedule):
    gamma = np.asarray(mask_fraction(jnp.linspace(0, 1, 101), schedule))
    assert gamma[0] == 1 and gamma[-1] < 1e-6 and (np.diff(gamma) < 0).all() and gamma.min() >= 0


def test_closed_forms():
    t = jnp.asarray([1 / 3, 2 / 3])
    for schedule, want in {
        "cosine": [3**0.5 / 2, 0.5],
        "arccos": [np.arccos(1 / 3) * 2 / np.pi, np.arccos(2 / 3) * 2 / np.pi],
        "linear": [2 / 3, 1 / 3],
        "sqrt": [1 - 3**-0.5, 1 - (2 / 3) ** 0.5],
        "square": [8 / 9, 5 / 9],
        "cubic": [26 / 27, 19 / 27],
    }.items():
        np.testing.assert_allclose(mask_fraction(t, schedule), want, rtol=1e-6)
    with pytest.raises(ValueError, match="cosine, arccos.*got 'cos'"):
        mask_fraction(t, "cos")


def test_training_fraction_has_muse_density():
    """r has density 2 / (pi sqrt(1 - r^2)), so its distribution function is (2 / pi) arcsin r."""
    r = np.asarray(sample_fraction(jax.random.key(0), (20_000,)))
    assert abs(r.mean() - 2 / np.pi) < 0.01
    assert scipy.stats.kstest(r, lambda r: 2 / np.pi * np.arcsin(r)).pvalue > 1e-3


def test_masks_have_exact_counts_and_are_uniform():
    count = jnp.asarray([0, 1, 5, 16] * 500)
    mask = np.asarray(random_mask(jax.random.key(0), (2000, 16), count))
    np.testing.assert_array_equal(mask.sum(1), count)
    where = mask[2::4].mean(0)  # 500 rows with 5 of 16
    assert np.abs(where - 5 / 16).max() < 5 * (5 / 16 * 11 / 16 / 500) ** 0.5


def test_mask_tokens_rounds_up_and_masks_at_least_one():
    tokens = jnp.arange(40).reshape(4, 10)
    masked, mask = mask_tokens(jax.random.key(1), tokens, jnp.asarray([0.0, 0.05, 0.41, 1.0]), 99)
    np.testing.assert_array_equal(mask.sum(1), [1, 1, 5, 10])
    np.testing.assert_array_equal(masked, np.where(mask, 99, tokens))
