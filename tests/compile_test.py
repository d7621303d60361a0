"""What is traced stays traced: other prompts, seeds, guidance and steps never compile anything new."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.toy import Linear, settings, train
from vgen.config import UserError
from vgen.system import System


@contextlib.contextmanager
def compilations():
    """A list that grows by one with every program compiled or read from the cache."""
    found = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_the_count_counts():
    with compilations() as found:
        f = jax.jit(lambda x: x * 3 + 1)
        f(jnp.float32(1))
        once = len(found)
        f(jnp.float32(2))
        assert once >= 1 and len(found) == once
        f(jnp.int32(1))
        assert len(found) > once


@pytest.fixture(scope="module")
def system(tiny_run):
    """A compiled system and what it draws with its defaults."""
    system = System(tiny_run)
    with quick_compilation():
        first = system(["a red circle"])
        system(["a red circle"])
    return system, first


@pytest.mark.parametrize(
    "prompts, knobs",
    [
        (["a blue star left of a red square"], {}),
        (["", "x" * 500, "ein roter Kreis \N{LARGE RED CIRCLE}"] * 4, {}),  # two calls
        (["a red circle"], dict(seed=7)),
        (["a red circle"], dict(seed=2**32 - 1)),
        (["a red circle"], dict(guidance_scale=2.5)),
        (["a red circle"], dict(guidance_scale=9)),  # an int
        (["a red circle"], dict(guidance_scale=0.0)),
        (["a red circle"], dict(steps=1)),
        (["a red circle"], dict(steps=12)),
        (["a red circle"], dict(steps={"base": 3, "superres": 5})),
        (["a red circle"], dict(temperature=0.5, choice_temperature=1)),
    ],
)
def test_sampling_never_compiles_again(system, prompts, knobs):
    system, _ = system
    with compilations() as found:
        pictures = system(prompts, **knobs)
    assert not found
    sizes = {"base": 16, "superres": 32}
    assert {name: x.shape for name, x in pictures.items()} == {k: (len(prompts), s, s, 3) for k, s in sizes.items()}
    assert all(f._cache_size() == 1 for f in system._functions.values())


def test_what_a_result_depends_on(system):
    system, first = system
    same = system(["a red circle", "something else"])
    for name in first:  # not on the prompts beside it
        np.testing.assert_array_equal(same[name][0], first[name][0])
    assert any((system(["a red circle"], seed=1)[name] != first[name]).any() for name in first)
    only = system(["a red circle"], stages=["base"])
    assert list(only) == ["base"]
    np.testing.assert_array_equal(only["base"], first["base"])


def test_knobs_out_of_range(system):
    for steps in (0, 13, {"superres": 13}):
        with pytest.raises(UserError, match=r"steps of stage (base|superres): expected 1 to 12, got (0|13)"):
            system[0](["x"], steps=steps)
    with pytest.raises(UserError, match="no stage has the knob 'guidance'; .* has choice_temperature, guidance_scale"):
        system[0](["x"], guidance=3.0)


def test_a_training_run_compiles_its_step_once():
    counts = []
    for steps in (1, 5):
        with compilations() as found:
            train(Linear(), settings(steps, ema_decay=0.5))
        counts.append(len(found))
    assert 0 < counts[1] <= counts[0]
