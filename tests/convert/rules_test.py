"""The engine of the tables: both directions, and everything that does not fit named at once."""

import jax
import ml_dtypes
import numpy as np
import pytest

from vgen.convert import rules
from vgen.convert.rules import CONV, CONV_1X1, CONV_TRANSPOSE, COPY, LINEAR, QKV, QKV_BIAS, ConvertError, Rule, Table

RNG = np.random.default_rng(0)


def array(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def structs(flat):
    return {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in flat.items()}


def load(state, table, shapes):
    return rules.load(state.get, state, table, shapes)


BLOCKS = Table(
    (
        Rule("blocks.{i}.qkv.weight", tuple(f"layers/attn/{n}/kernel" for n in "qkv"), QKV),
        Rule("blocks.{i}.qkv.bias", tuple(f"layers/attn/{n}/bias" for n in "qkv"), QKV_BIAS),
        Rule("head.{i}.{j}.weight", "head_{i}_{j}/kernel", LINEAR),
        Rule(("a", "b"), "ab", rules.Op(lambda x: [np.stack(x)], lambda x: list(x[0]))),
        Rule("scale", "scale"),
        Rule("blocks.{i}.conv.weight", "layers/conv/kernel", CONV),
    ),
    ignore=(r".*\.counter",),
    rename=((r"^module\.", ""), (r"\.to_qkv\.", ".qkv.")),
    tied=(("tied", "scale"),),
)


def state():
    found = {f"blocks.{i}.qkv.weight": array(12, 5) for i in range(11)}  # 10 sorts before 2 as text
    found |= {f"blocks.{i}.qkv.bias": array(12, dtype=ml_dtypes.bfloat16) for i in range(11)}
    found |= {f"blocks.{i}.conv.weight": array(4, 3, 2, 1) for i in range(11)}
    found |= {f"head.{i}.{j}.weight": array(3, i + j + 1) for i in range(2) for j in range(2)}
    return found | {"a": array(2), "b": array(2), "scale": array()}


def test_there_and_back():
    want = state()
    stored = {"module." + name.replace(".qkv.", ".to_qkv."): a for name, a in want.items()}
    stored |= {"module.blocks.0.counter": np.int64(3), "module.tied": want["scale"]}
    shapes = {f"layers/attn/{n}/kernel": (11, 5, 4) for n in "qkv"} | {f"layers/attn/{n}/bias": (11, 4) for n in "qkv"}
    shapes |= {f"head_{i}_{j}/kernel": (i + j + 1, 3) for i in range(2) for j in range(2)}
    shapes |= {"ab": (2, 2), "scale": (), "layers/conv/kernel": (11, 2, 1, 3, 4)}
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    flat = load(stored, BLOCKS, shapes)
    np.testing.assert_array_equal(flat["layers/attn/k/kernel"][10], want["blocks.10.qkv.weight"][4:8].T)
    assert flat["layers/attn/k/bias"].dtype == ml_dtypes.bfloat16
    back = rules.export(flat, BLOCKS)
    assert set(back) == set(want)
    for name, a in want.items():
        assert back[name].shape == a.shape and back[name].dtype == a.dtype and back[name].tobytes() == a.tobytes(), name
    assert rules.exported_shapes(shapes, BLOCKS) == {name: a.shape for name, a in want.items()}
    # the names in which it is stored do not matter, nor does which of the tied ones is there
    del stored["module.scale"]
    np.testing.assert_array_equal(load(stored, BLOCKS, shapes)["scale"], want["scale"])


@pytest.mark.parametrize(
    "op, shape", [(COPY, (2, 3)), (LINEAR, (2, 3)), (CONV, (2, 3, 4, 5)), (CONV_1X1, (2, 3, 1, 1)),
                  (CONV_TRANSPOSE, (2, 3, 4, 5)), (QKV, (6, 5)), (QKV_BIAS, (6,)),
                  (rules.reshape((6,), (2, 3)), (2, 3)),
                  (rules.chain(rules.transpose(2, 0, 1), rules.reshape((4, 6), (4, 2, 3))), (2, 3, 4))],
)  # fmt: skip
def test_operations_have_inverses(op, shape):
    a = array(*shape)
    inside = op.forward([a])
    (back,) = op.backward(inside)
    np.testing.assert_array_equal(back, a)
    assert len(inside) == (3 if op in (QKV, QKV_BIAS) else 1)


def test_kernels_do_what_torch_does():
    torch = pytest.importorskip("torch")
    from flax import linen as nn

    x = array(2, 7, 6, 3)
    image = torch.from_numpy(x).permute(0, 3, 1, 2)
    for make, op, ours in (
        (lambda: torch.nn.Conv2d(3, 4, (3, 2)), CONV, nn.Conv(4, (3, 2), padding="VALID")),
        (lambda: torch.nn.ConvTranspose2d(3, 4, (3, 2), 2), CONV_TRANSPOSE,
         nn.ConvTranspose(4, (3, 2), (2, 2), padding="VALID")),
        (lambda: torch.nn.Conv2d(3, 4, 1), CONV_1X1, nn.Dense(4)),
    ):  # fmt: skip
        theirs = make()
        kernel = op.forward([theirs.weight.detach().numpy()])[0]
        got = ours.apply({"params": dict(kernel=kernel, bias=theirs.bias.detach().numpy())}, x)
        want = theirs(image).permute(0, 2, 3, 1).detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-6)


def wrong(change, table=BLOCKS):
    """The message about a checkpoint whose state and shapes were changed."""
    stored = state()
    shapes = structs(load(stored, BLOCKS, _shapes(stored)))
    change(stored, shapes)
    with pytest.raises(ConvertError) as caught:
        rules.prepare(stored, table, shapes)
    return str(caught.value)


def _shapes(stored):
    known = rules.renamed(stored, BLOCKS)
    flat = {}
    paths = [f"layers/attn/{n}/{k}" for n in "qkv" for k in ("kernel", "bias")]
    paths += [f"head_{i}_{j}/kernel" for i in range(2) for j in range(2)] + ["ab", "scale", "layers/conv/kernel"]
    for match in rules.plan(known, paths, BLOCKS):
        flat |= rules.convert(match, stored.get)
    return structs(flat)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, p: s.update(new=array(1)), "unread new"),
        (lambda s, p: p.update(new=p["ab"]), "unfilled new"),
        (lambda s, p: s.pop("blocks.4.qkv.bias"), "blocks.{i}.qkv.bias: numbers [4] are missing below 10"),
        (lambda s, p: s.pop("b"), "missing b (beside a)"),
        (lambda s, p: p.pop("layers/attn/k/bias"), "layers/attn/k/bias: the network has no such parameter"),
        (lambda s, p: s.update({"blocks.4.qkv.bias": array(15)}), "blocks.4.qkv.bias (15,): not of the shape that"),
        (lambda s, p: s.update({"blocks.4.conv.weight": array(1, 3, 2, 1)}), "(1, 3, 2, 1): not of"),
        (lambda s, p: s.update({"blocks.0.conv.weight": array(4, 3)}), "blocks.0.conv.weight (4, 3): axes"),
        (lambda s, p: s.update({"blocks.0.qkv.weight": array(13, 5)}), "blocks.0.qkv.weight (13, 5): array split"),
        (lambda s, p: s.update({"scale": array(1)}), "scale: got (1,), expected ()"),
        (lambda s, p: s.update({"scale": np.array(3)}), "scale: got int64, expected float32"),
        (lambda s, p: s.update({"scale": np.array(True)}), "scale: got bool, expected float32"),
        (lambda s, p: s.update({"blocks.01.conv.weight": s["blocks.1.conv.weight"]}), "unread blocks.01.conv.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message):
    assert message in wrong(change)


def test_all_of_it_is_named_at_once():
    def change(stored, shapes):
        stored.update(new=array(1), scale=array(7))
        stored.pop("head.1.1.weight")
        stored["a"] = array(3)

    assert len(wrong(change).splitlines()) == 1 + 4
    many = wrong(lambda stored, shapes: stored.update({f"new{i}": array(1) for i in range(100)}))
    assert "(and 60 more)" in many


def test_two_names_for_one_array_and_two_rules_for_one_parameter():
    with pytest.raises(ConvertError, match="'module.a' and 'a' both mean 'a'"):
        rules.renamed(["module.a", "a"], BLOCKS)
    double = Table((Rule("x", "p"), Rule("y", "p")))
    with pytest.raises(ConvertError, match="p: filled by x and by y"):
        rules.plan(["x", "y"], ["p"], double)


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="one placeholder at most may be stacked"):
        rules.plan(["a.0.1"], ["p"], Table((Rule("a.{i}.{j}", "p"),)))
    with pytest.raises(ConvertError, match="no rule writes these parameters:\n  lost"):
        rules.export({"p": array(1), "lost": array(1)}, Table((Rule("x", "p"),)))


def test_a_part_that_the_network_lacks_is_unread():
    table = Table((Rule("x", "p"), Rule("decoder.{i}", "decoder/p")))
    with pytest.raises(ConvertError, match="unread decoder.0"):
        rules.plan(["x", "decoder.0"], ["p"], table)
    table = table._replace(ignore=(r"decoder\..*",))
    assert len(rules.plan(rules.renamed(["x", "decoder.0"], table), ["p"], table)) == 1


def test_an_operation_may_look_at_values():
    """It says what is wrong with them when they are read; ahead of that there are only shapes."""

    def forward(arrays):
        if not (arrays[0] == 7).all():
            raise ConvertError("scale: expected sevens")
        return arrays

    table = Table((Rule("s", "scale", rules.Op(forward, lambda x: x)),))
    sevens, shapes = np.full(3, 7, np.float32), {"scale": jax.ShapeDtypeStruct((3,), np.float32)}
    assert len(rules.prepare({"s": sevens}, table, shapes)[0]) == 1
    np.testing.assert_array_equal(load({"s": sevens}, table, shapes)["scale"], sevens)
    with pytest.raises(ConvertError, match="expected sevens"):
        load({"s": sevens + 1}, table, shapes)
