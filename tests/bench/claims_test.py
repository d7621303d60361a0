"""Papers' claims of speed: operations counted through loops, sides that compute what they say, the table at tiny."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import quick_compilation
from vgen import platform
from vgen.bench import claims, flops
from vgen.bench.__main__ import main
from vgen.config import UserError
from vgen.layers.attention import attention

SHAPE = claims.floats(16, 16)
ONE = 2 * 16**3  # of a product


@pytest.mark.parametrize("unroll", [1, 3, 7])
def test_loops_are_counted_as_often_as_they_run(unroll):
    def products(x):
        step = lambda x, _: (x @ x, None)
        twice = lambda x, _: (jax.lax.scan(step, x @ x, None, length=2)[0], None)
        x = jax.jit(lambda x: jax.lax.scan(step, x, None, length=7, unroll=unroll)[0])(x)
        return jax.lax.scan(twice, x, None, length=5)[0]

    assert flops.count(products, SHAPE) == pytest.approx((7 + 5 * 3) * ONE, rel=0.01)


def test_gradients_and_counted_steps():
    loss = lambda x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=4)[0].sum()
    assert flops.count(jax.grad(loss), SHAPE) == pytest.approx(4 * 3 * ONE, rel=0.08)
    power = lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)
    assert flops.count(lambda x: power(x, 8), SHAPE) == pytest.approx(8 * ONE, rel=0.01)
    with pytest.raises(ValueError, match="length is not in the program"):
        flops.count(power, SHAPE, claims.ints())
    assert flops.count(power, SHAPE, claims.ints(), steps=5) == pytest.approx(5 * ONE, rel=0.01)


def check(only, out):
    """The table of some claims at tiny, operations too: {claim: their ratio}."""
    with quick_compilation():
        _, *lines = claims.table(only, runs=1, scale="tiny", out=str(out), published="tiny")
    told = json.loads(out.read_text())
    names = [ratio.name for study in claims.STUDIES for ratio in study.ratios if re.search(only, ratio.name)]
    assert [row["claim"] for row in told["rows"]] == names == [line[:56].strip() for line in lines]
    for row in told["rows"]:
        for kind in ("operations", "seconds"):
            assert row[kind]["over"] > 0 and row[kind]["ratio"] == row[kind]["over"] / row[kind]["under"]
    assert told["runs"] == 1 and told["scale"] == told["operations_at"] == "tiny"
    return {row["claim"]: row["operations"]["ratio"] for row in told["rows"]}


def test_a_kernel_counts_as_its_formula():
    """What is planned for a TPU has attention as a kernel, of which XLA knows nothing, and the processor has none."""
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.bfloat16)
    here = flops.count(attention, q, q, q)
    attend = lambda q, k, v: attention(q, k, v)
    with platform.target("tpu", "TPU v4"):
        assert "pallas_call" in str(jax.make_jaxpr(attend)(q, q, q))
        assert flops.count(attend, q, q, q) == here >= 2 * 2 * 1024**2 * 2 * 64


def test_the_table_of_one_claim(tmp_path):
    assert len(check("SAM", tmp_path / "claims.json")) == 1


@pytest.mark.slow
def test_the_whole_table(tmp_path):
    found = check("", tmp_path / "claims.json")
    assert len(found) == 9
    least = {"MAE: mask": 1.5, "SLIP": 1.5, "FLIP: 50": 0.5, "A-CLIP": 1.0}
    for start, value in least.items():
        assert next(found[name] for name in found if name.startswith(start)) > value
    assert found["FLIP: 75 % of the patches left out / CLIP"] < found["FLIP: 50 % of the patches left out / CLIP"] < 0.8


def test_steps_cost_as_many_calls_as_they_are():
    """8 steps against 12 of one network; one by one, of equal layers, costs about as much as one look at all."""
    sides = claims.decoding(**claims.STUDIES[3].sizes["tiny"])
    found = {name: flops.count(side.run, *side.arguments) for name, side in sides.items()}
    assert found["12 steps"] / found["8 steps"] == pytest.approx(1.5, rel=0.01)
    assert 0.3 < found["one by one"] / (found["8 steps"] / 8) < 3


def test_published_sizes_give_the_papers_operations():
    """MAE's 3.3, from shapes alone."""
    sides = claims.mae(**claims.STUDIES[0].sizes["paper"])
    counted = {name: flops.count(sides[name].run, *sides[name].arguments) for name in ("mask tokens", "visible")}
    assert counted["mask tokens"] / counted["visible"] == pytest.approx(3.3, rel=0.05)


def test_hidden_pixels_do_not_enter_the_encoder():
    """They are in the target alone, which is normalised: their contrast changes nothing."""
    sizes = claims.STUDIES[0].sizes["tiny"]
    params, images, noise = jax.tree.map(claims.some, claims.mae(**sizes)["mask tokens"].arguments)
    net = claims.MAE(image_size=16, **{name: sizes[name] for name in sizes if name not in ("size", "batch")})
    params, noise = jax.tree.map(lambda x: 20 * x, params), jax.random.uniform(jax.random.key(0), noise.shape)
    mask = claims.random_masking(noise, net.mask_ratio).mask.reshape(-1, 4, 4, 1).repeat(4, 1).repeat(4, 2)
    loss = jax.jit(lambda x: net.apply({"params": params}, x, noise, method=claims.mask_tokens_inside))
    hidden, seen, whole = (float(loss(30 * images * (1 + 2 * where))) for where in (mask, 1 - mask, 0))
    assert mask.mean() == 0.75
    assert abs(hidden - whole) < 1e-5 < 5e-5 < abs(seen - whole)


def test_mistakes_end_in_one_sentence(capsys, tmp_path):
    assert main(["claims", "--only=nothing"]) == 2
    assert re.fullmatch(r"vgen.bench: no claim matches 'nothing'; there are MAE.*SAM.*\n", capsys.readouterr().err)
    for said, arguments in {"runs=0": dict(runs=0), "no folder": dict(out=str(tmp_path / "none" / "a.json"))}.items():
        with pytest.raises(UserError, match=said):
            next(claims.table(**arguments))
