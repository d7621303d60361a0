"""The table of program sizes: it counts inner programs, and every case builds."""

import jax
import jax.numpy as jnp
import pytest

from vgen.bench import compile as compiling
from vgen.bench.__main__ import main

TINY = compiling.Case(
    "tiny T5", "vgen.models.t5:T5Encoder", "", dict(vocab=40, depth=2, width=16, heads=2, head_dim=8, mlp_dim=24),
    dict(tokens=((2, 8), jnp.int32), mask=((2, 8), bool)),
)  # fmt: skip


def test_equations_of_inner_programs_count():
    inner = jax.jit(lambda x: jnp.sin(x) + 1)
    assert compiling.equations(jax.make_jaxpr(lambda x: inner(x) * 2)(1.0).jaxpr) == 4  # the call, its two, the product
    body = lambda c, _: (jnp.sin(c) * 2, None)
    assert compiling.equations(jax.make_jaxpr(lambda x: jax.lax.scan(body, x, None, 5)[0])(1.0).jaxpr) == 3


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "CASES", (TINY,))
    assert main(["compile"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["network", "parameters", "equations"]
    parameters, equations, lines, trace, seconds = (float(x.replace(",", "")) for x in row.split()[2:])
    assert parameters == 40 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 24 + 2 * 16) + 32 * 2 + 16
    assert equations > 20 and lines > 20 and trace > 0 and seconds > 0
    assert main(["compile", "--only=GPT9"]) == 2 and "tiny T5" in capsys.readouterr().err


@pytest.mark.parametrize("case", compiling.CASES, ids=lambda case: case.name)
def test_every_case_can_be_called(case):
    """The arguments fit the networks; nothing is lowered."""
    module, run, params, inputs = compiling.program(case)
    assert jax.eval_shape(run, params, inputs)
