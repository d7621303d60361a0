"""LoRA as data: what it adds, to which kernels, at a strength that is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen import trees
from vgen.adapt.lora import count, factors, lora, merge, product, scaled
from vgen.adapt.stack import stack
from vgen.config import ConfigError

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def network():
    return {
        "layers": {"attn": {"q": {"kernel": array(3, 6, 8), "bias": array(3, 8)}, "k": {"kernel": array(3, 6, 8)}}},
        "conv": {"kernel": array(3, 2, 4, 5)},
        "head": {"kernel": array(6, 7)},
        "embed": {"embedding": array(9, 6)},
    }


ALL = r"(layers/attn/q|conv|head)/kernel"


def drawn(adapter, params, seed=0):
    """A delta with nothing zero in it."""
    delta = trees.flatten(adapter.init(jax.random.key(seed), params))
    keys = jax.random.split(jax.random.key(seed + 1), len(delta))
    return trees.unflatten(
        {
            path: jax.random.normal(k, x.shape) if path.endswith("/up") else x
            for k, (path, x) in zip(keys, delta.items())
        }
    )


def error(got, want):
    return np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(np.asarray(want)).max()


def test_it_starts_as_nothing_and_of_the_right_size():
    params, adapter = network(), lora(ALL, 2)
    delta = adapter.init(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, adapter.merge(params, delta), params)
    assert set(factors(delta)) == {"layers/attn/q/kernel", "conv/kernel", "head/kernel"}
    assert count(delta) == 3 * 2 * (6 + 8) + 2 * (3 * 2 * 4 + 5) + 2 * (6 + 7)
    assert trees.flatten(delta)["layers/attn/q/kernel/scale"].shape == (3,)
    shapes = jax.eval_shape(lambda: network())
    assert jax.tree.map(jnp.shape, adapter.init(jax.random.key(0), shapes)) == jax.tree.map(jnp.shape, delta)


@pytest.mark.parametrize("init, spread", [("uniform", 1 / np.sqrt(3 * 40**2)), ("normal", 1 / 5)])
def test_how_down_is_drawn(init, spread):
    delta = lora(".*", 5, init=init).init(jax.random.key(0), {"kernel": jnp.zeros((1600, 30))})
    assert np.std(delta["kernel"]["down"]) == pytest.approx(spread, rel=0.05)


def test_what_is_added():
    params, adapter = network(), lora(ALL, 2, alpha=5)
    delta = drawn(adapter, params)
    merged, was, by = trees.flatten(adapter.merge(params, delta)), trees.flatten(params), factors(delta)
    q, head, conv = (by[f"{name}/kernel"] for name in ("layers/attn/q", "head", "conv"))
    want = was["layers/attn/q/kernel"] + 2.5 * np.einsum("dir,dro->dio", q["down"], q["up"])
    assert error(merged["layers/attn/q/kernel"], want) < 1e-6
    assert error(merged["head/kernel"], was["head/kernel"] + 2.5 * (head["down"] @ head["up"])) < 1e-6
    untouched = [path for path in was if path not in by]
    assert len(untouched) == 3 and all(merged[path] is was[path] for path in untouched)

    def run(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x = array(2, 6, 7, 4)
    want = run(x, was["conv/kernel"]) + 2.5 * run(run(x, conv["down"]), conv["up"])
    assert error(run(x, merged["conv/kernel"]), want) < 1e-5


def test_dtypes():
    params = {"a": {"kernel": array(4, 4).astype(jnp.bfloat16)}}
    delta = drawn(lora(".*", 1), params)
    exact = np.asarray(params["a"]["kernel"], np.float32) + np.asarray(product(**delta["a"]["kernel"]))
    merged = merge(params, delta)["a"]["kernel"]
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))  # rounded once
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), delta)
    assert merge({"a": {"kernel": array(4, 4)}}, small)["a"]["kernel"].dtype == jnp.float32


def test_strength_is_traced_and_adapters_add_up():
    params = network()
    both = stack({"style": lora(ALL, 2), "subject": lora(r"layers/.*/kernel", 3, init="normal")})
    delta = both.init(jax.random.key(0), params)
    assert set(delta) == {"style", "subject"}
    delta = {"style": drawn(lora(ALL, 2), params), "subject": drawn(lora(r"layers/.*/kernel", 3), params, 5)}
    traces = []

    @jax.jit
    def merged(style, subject):
        traces.append(None)
        return both.merge(
            params, {"style": scaled(delta["style"], style), "subject": scaled(delta["subject"], subject)}
        )

    jax.tree.map(np.testing.assert_array_equal, merged(0.0, 0.0), params)
    full = trees.flatten(merged(1.0, -0.5))
    assert len(traces) == 1
    for path, was in trees.flatten(params).items():
        parts = [(strength, factors(delta[name])) for name, strength in (("style", 1.0), ("subject", -0.5))]
        want = was + sum(strength * product(**by[path]) for strength, by in parts if path in by)
        assert error(full[path], want) < 1e-6, path
    assert error(full["layers/attn/q/kernel"], params["layers"]["attn"]["q"]["kernel"]) > 0.1
    alone = both.merge(params, {"style": delta["style"]})
    jax.tree.map(np.testing.assert_array_equal, alone, merge(params, delta["style"]))


def test_it_learns():
    """Descent on both factors finds a change of low rank."""
    params = {"kernel": array(6, 5)}
    x, target = array(64, 6), params["kernel"] + array(6, 1) @ array(1, 5)
    delta = lora("kernel", 1).init(jax.random.key(3), params)

    def loss(trained):
        return jnp.square(x @ merge(params, {"kernel": delta["kernel"] | trained})["kernel"] - x @ target).mean()

    trained = {name: delta["kernel"][name] for name in ("down", "up")}
    start = loss(trained)
    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 0.05 * g, t, jax.grad(loss)(t)))
    for _ in range(300):
        trained = step(trained)
    assert loss(trained) < 1e-3 * start


def test_mistakes_are_named():
    params = network()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora(".*", 0)
    with pytest.raises(ValueError, match="init must be 'uniform' or 'normal', got 'zeros'"):
        lora(".*", 1, init="zeros")
    with pytest.raises(ConfigError, match=r"'attn' matches no parameter; there are e.g. \['conv/kernel'"):
        lora("attn", 1).init(jax.random.key(0), params)
    with pytest.raises(ConfigError, match="matches embed/embedding, expected kernels"):
        lora("(head|embed)/.*", 1).init(jax.random.key(0), params)
    delta = lora("head/kernel", 1).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="have no head/kernel"):
        merge({"tail": params["head"]}, delta)
    with pytest.raises(ValueError, match=r"head/kernel is \(6, 8\), the delta makes \(6, 7\)"):
        merge({"head": {"kernel": jnp.zeros((6, 8))}}, delta)
    with pytest.raises(ValueError, match="expected down, up, scale"):
        merge(params, {"head": {"kernel": {"down": 1}}})
    with pytest.raises(ValueError, match="a delta of other, expected style"):
        stack({"style": lora(".*", 1)}).merge(params, {"other": delta})
