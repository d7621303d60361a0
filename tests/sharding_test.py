"""Meshes and partition specs; nothing runs, so an abstract mesh of any size will do."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from vgen.config import UserError
from vgen.sharding import AXES, constrain, make_mesh, rows, spec_for

MESH = AbstractMesh((2, 4, 1, 2), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    "sizes, want",
    [
        ({}, (8, 1, 1, 1)),
        (dict(fsdp=4), (2, 4, 1, 1)),
        (dict(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
        (dict(data=1, fsdp=8, tensor=-1), (1, 8, 1, 1)),
        (dict(sequence=4, tensor=2), (1, 1, 4, 2)),
    ],
)
def test_minus_one_takes_the_rest(sizes, want):
    mesh = make_mesh(**sizes, devices=[object() for _ in range(8)])
    assert tuple(mesh.shape.values()) == want and mesh.axis_names == ("data", "fsdp", "sequence", "tensor")


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=3), r"does not cover 8 devices: the sizes must multiply to 8"),
        (dict(fsdp=3), r"does not cover 8 devices"),
        (dict(fsdp=16), r"does not cover 8 devices"),
        (dict(data=-1, fsdp=-1), r"at most one -1"),
        (dict(data=0), r"must be positive"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes, devices=[object() for _ in range(8)])


@pytest.mark.parametrize(
    "shape, want",
    [
        ((64, 32), P("fsdp", None)),
        ((32, 64), P(None, "fsdp")),
        ((64, 64), P(None, "fsdp")),  # a tie: the last
        ((3, 3, 30, 20), P(None, None, None, "fsdp")),  # 30 is larger, but 4 does not divide it
        ((9, 7), P()),
        ((), P()),
    ],
)
def test_default_is_the_largest_divisible_axis(shape, want):
    assert spec_for("w", shape, MESH, (), 0) == want


def test_small_arrays_and_meshes_without_fsdp_are_replicated():
    assert spec_for("w", (64, 64), MESH, (), 64 * 64 + 1) == P()
    assert spec_for("w", (64, 64), MESH, (), 64 * 64) != P()
    assert spec_for("w", (64, 64), make_mesh(devices=[object()] * 2), (), 0) == P()


def test_rules_first_full_match_right_aligned():
    rules = [("a/kernel", ("fsdp", "tensor")), (".*kernel", (None, ("fsdp", "tensor"))), ("b", ())]
    spec = lambda path, shape: spec_for(path, shape, MESH, rules, 0)
    assert spec("a/kernel", (8, 8)) == P("fsdp", "tensor")
    assert spec("a/kernel", (6, 8, 8)) == P(None, "fsdp", "tensor")  # stacked layers
    assert spec("xa/kernel", (5, 16)) == P(None, ("fsdp", "tensor"))
    assert spec("b", (64, 64)) == P(None, None)
    assert spec("c", (64, 64)) == P(None, "fsdp")


@pytest.mark.parametrize(
    "entries, message",
    [
        ((None, None, "fsdp"), r"'w' has 3 entries, w has shape \(6, 8\)"),
        (("fsdp", None), r"w \(6, 8\) is not divisible by 4 \(fsdp\)"),
        (("model",), r"no mesh axis 'model'; there are data, fsdp, sequence, tensor"),
    ],
)
def test_rules_that_do_not_fit(entries, message):
    with pytest.raises(UserError, match=message):
        spec_for("w", (6, 8), MESH, [("w", entries)], 0)


def test_constrain_is_the_identity_without_a_mesh_and_a_constraint_under_one():
    x = jnp.ones((8, 3))
    assert constrain(x) is x
    odd = jax.make_jaxpr(constrain)(x)
    assert not odd.eqns
    with jax.sharding.use_abstract_mesh(MESH):
        pinned = jax.make_jaxpr(constrain)(x)
        less = jax.make_jaxpr(constrain)(x[:6])  # 8 ways do not divide 6
        free = jax.make_jaxpr(constrain)(x[:5])
    assert [eqn.primitive.name for eqn in pinned.eqns] == ["sharding_constraint"]
    assert pinned.eqns[0].params["sharding"].spec == P(("data", "fsdp"), None)
    assert less.eqns[0].params["sharding"].spec == P("data", None)
    assert not free.eqns


def test_examples_are_split_over_as_many_devices_as_divide_them():
    mesh, whole = (AbstractMesh((data, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4) for data in (2, 1))
    for count, axes in ((8, ("data", "fsdp")), (4, ("data",)), (6, ("data",)), (3, ()), (1, ())):
        assert rows(mesh, count) == axes
    assert rows(whole, 6) == () and rows(whole, 8) == ("data", "fsdp")


@pytest.mark.parametrize(
    "path, shape, want",
    [
        ("layers/attn/q/kernel", (24, 64, 32), P(None, "fsdp", "tensor")),
        ("attn_1/q/kernel", (64, 32), P("fsdp", "tensor")),
        ("layers/cross/k_style/kernel", (64, 32), P("fsdp", "tensor")),
        ("layers/mlp/gate/kernel", (64, 32), P("fsdp", "tensor")),
        ("layers/attn/out/kernel", (64, 32), P("tensor", "fsdp")),
        ("layers/mlp/fc2/kernel", (64, 30), P("tensor", None)),  # 4 does not divide 30
        ("layers/attn/q/kernel", (66, 33), P(None, None)),
        ("down_1/conv1/kernel", (3, 3, 64, 32), P(None, None, "fsdp", None)),
        ("layers/mlp/fc1/bias", (24, 64), P(None, "tensor")),
        ("layers/mlp/fc2/bias", (64,), P("fsdp")),
        ("heads/projection/fc2/kernel", (64, 32), P("fsdp", None)),  # of a transformer's layers alone
    ],
)
def test_layers_are_split_inside_where_there_is_a_tensor_axis(path, shape, want):
    """Heads and hidden units by columns, what brings them back together by rows."""
    assert spec_for(path, shape, MESH, (), 0) == want
    flat = make_mesh(data=2, fsdp=4, devices=[object()] * 8)
    assert "tensor" not in spec_for(path, shape, flat, (), 0)
    assert spec_for(path, shape, MESH, [(".*", ())], 0) == P(*(None,) * len(shape)), "a rule of the config comes first"


def test_tokens_and_rows_are_split_over_the_sequence_axis():
    mesh = AbstractMesh((2, 1, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    batch = ("data", "fsdp")
    for shape, want in (((4, 16, 8), P(batch, "sequence", None)), ((4, 8, 8, 3), P(batch, "sequence", None, None)),
                        ((4, 6, 8), P(batch, None, None)), ((4, 16), P(batch, None)), ((4,), P(batch))):  # fmt: skip
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(constrain)(jnp.zeros(shape))
        assert jaxpr.eqns[0].params["sharding"].spec == want
