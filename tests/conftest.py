"""Shared test set-up: two emulated meshes' worth of CPU devices are not needed here; x64 is opt-in per test."""

import jax
import pytest


@pytest.fixture
def x64():
    """float64 arithmetic for the length of one test."""
    with jax.enable_x64(True):
        yield
