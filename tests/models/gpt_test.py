"""GPT against the authors' network, its cache against the whole forward pass, its patterns against their figure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.gpt import TAMING
from vgen.models.gpt import DALL_E, GPT, IMAGENET, IMAGENET_BIG, dall_e_patterns, visible

pytestmark = pytest.mark.usefixtures("quick")

RNG = np.random.default_rng(0)
SIZES = dict(vocab=11, grid=(3, 4), depth=3, width=16, heads=2)
NETS = dict(
    nothing=GPT(**SIZES),
    classes=GPT(**SIZES, classes=5, unroll=3),
    taming=GPT(**SIZES, classes=5, own_start=False, unmasked=1, length=20),
    text=GPT(**SIZES, text_vocab=7, text_length=6),
    dall_e=GPT(
        **SIZES, text_vocab=7, text_length=6, text_head=True, positions="axes", patterns=dall_e_patterns(3), kernel=3
    ),
)
IDS = jnp.asarray(RNG.integers(0, 11, (2, 12)), jnp.int32)
LABEL = dict(label=jnp.asarray([4, 1]))
TEXT = dict(
    text=jnp.asarray(RNG.integers(0, 7, (2, 6)), jnp.int32),
    text_mask=jnp.asarray([[True] * 6, [True] * 3 + [False] * 3]),
)


def told(name):
    return {"nothing": {}, "classes": LABEL, "taming": LABEL, "text": TEXT, "dall_e": TEXT}[name]


def params(net, **condition):
    """Drawn by numpy and not too small, float64."""
    return jax.tree.map(lambda a: np.asarray(3 * a, np.float64), draw(net, IDS, **condition))


def test_against_the_authors_network(x64):
    gold = golden.load("mingpt")
    net, p = tables.load(TAMING, gold["weights"], dict(heads=4, unmasked=5, grid=(4, 5)))
    p = tables.float64(p)
    assert (net.vocab, net.depth, net.width, net.mlp_dim, net.length) == (50, 3, 36, 144, 20)
    run = jax.jit(lambda *args: net.apply({"params": p}, *args, method="plain"))
    ids, embeddings = (gold["inputs"][name] for name in ("idx", "embeddings"))
    golden.check(gold, "logits", run(ids), dtype="float64", tol=1e-9)
    cut = gold["outputs"]["with_embeddings"].shape[1] - embeddings.shape[1]
    golden.check(gold, "with_embeddings", run(ids[:, :cut], embeddings), dtype="float64", tol=1e-9)


def test_float32_is_close():
    gold = golden.load("mingpt")
    net, p = tables.load(TAMING, gold["weights"], dict(heads=4, unmasked=5, grid=(4, 5)))
    run = jax.jit(lambda ids: net.apply({"params": p}, ids, method="plain"))
    golden.check(gold, "logits", run(gold["inputs"]["idx"]), tol=2e-5)


@pytest.mark.parametrize("name", NETS)
def test_each_token_sees_those_before_it_and_the_condition(x64, name):
    net, condition = NETS[name], told(name)
    p = params(net, **condition)
    run = jax.jit(lambda ids, condition: net.apply({"params": p}, ids, **condition))
    want = run(IDS, condition)
    assert want.dtype == np.float64 and want.shape == (2, 12, 11)
    for i in (0, 5, 11):
        changed = np.abs(run(IDS.at[:, i].add(1) % 11, condition) - want).max((0, 2))
        assert (changed[: i + 1] == 0).all()
        assert i == 11 or changed[i + 1] > 1e-3  # the very next one: nothing is lost
    for key, value in condition.items():
        other = ~value if value.dtype == bool else (value + 1) % 5
        assert np.abs(run(IDS, condition | {key: other}) - want)[:, 0].min(-1).max() > 1e-6, key


@pytest.mark.parametrize("name", NETS)
def test_the_cache_gives_what_the_whole_network_gives(x64, name):
    net, condition = NETS[name], told(name)
    p = params(net, **condition)
    want = jax.jit(lambda: net.apply({"params": p}, IDS, **condition))()
    given = condition or dict(batch=2)
    run = lambda v, *args, method: net.apply(v, *args, **given, method=method, mutable=["cache"])
    first, made = jax.jit(lambda: run({"params": p}, method="prefill"))()
    assert made["cache"]["layers"]["attn"]["keys"].shape == (3, 2, net.places, 2, 8)

    def every(made):
        def one(cache, i):
            previous = jnp.where(i > 0, IDS[:, i - 1], 7)
            logits, new = run({"params": p, "cache": cache}, previous, i, method="advance")
            return new["cache"], logits

        return jax.lax.scan(one, made["cache"], jnp.arange(12))[1]

    got = jax.jit(every)(made).swapaxes(0, 1)
    assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()
    assert np.abs(first - want[:, 0]).max() <= 1e-12 * np.abs(want).max()


def test_left_out_conditions(x64):
    """A class that is left out is one of its own; a text that is left out is all padding, and padding is not read."""
    keep = jnp.asarray([True, False])
    net = NETS["classes"]
    p = params(net, **LABEL)
    apply = jax.jit(lambda c, net=net, p=p: net.apply({"params": p}, IDS, **c))
    run = lambda **c: apply(c)
    both, told = run(**LABEL, keep=keep), run(**LABEL)
    np.testing.assert_array_equal(both[0], told[0])
    np.testing.assert_array_equal(both[1], run(label=jnp.asarray([0, 0]), keep=keep)[1])
    assert np.abs(both[1] - told[1]).max() > 1e-3
    net = NETS["text"]
    p = params(net, **TEXT)
    run = jax.jit(lambda c: net.apply({"params": p}, IDS, **c))
    np.testing.assert_array_equal(
        run(TEXT | dict(keep=keep))[1], run(TEXT | dict(text_mask=jnp.zeros((2, 6), bool)))[1]
    )
    other = TEXT | dict(text=jnp.where(TEXT["text_mask"], TEXT["text"], 0))
    np.testing.assert_array_equal(run(TEXT), run(other))
    short = dict(text=TEXT["text"][:, :4], text_mask=TEXT["text_mask"][:, :4])
    np.testing.assert_array_equal(run(short)[1], run(TEXT)[1])


def test_words_are_predicted_from_the_words_before(x64):
    net = NETS["dall_e"]
    p = params(net, **TEXT)
    run = jax.jit(lambda ids, c: net.apply({"params": p}, ids, **c, method="joint"))
    want = run(IDS, TEXT)
    assert want.text.shape == (2, 6, 7)
    changed = np.abs(run(IDS, TEXT | dict(text=TEXT["text"].at[:, 2].add(1) % 7)).text - want.text).max((0, 2))
    assert (changed[:3] == 0).all() and changed[3] > 1e-3
    np.testing.assert_array_equal(run((IDS + 1) % 11, TEXT).text, want.text)
    np.testing.assert_allclose(want.image, net.apply({"params": p}, IDS, **TEXT), rtol=1e-12)  # XLA may fuse otherwise


def test_patterns_of_the_figure():
    """Ramesh et al. 2021, figure 11: 4 x 4 image tokens behind 6 of text; a token sees itself and so many before it."""
    seen = {
        name: np.asarray(visible(name, jnp.arange(22), jnp.arange(22), prefix=6, columns=4, kernel=3))
        for name in ("full", "row", "column", "conv")
    }
    for mask in seen.values():
        np.testing.assert_array_equal(mask[:6], np.tri(22, dtype=bool)[:6])
        assert mask[6:, :6].all() and not np.triu(mask, 1).any() and mask.diagonal().all()
    image = {name: [set(np.flatnonzero(row)) for row in mask[6:, 6:]] for name, mask in seen.items()}
    assert image["full"][15] == set(range(16))
    assert image["row"][10] == {6, 7, 8, 9, 10}  # the last five: back to the same column of the row above
    assert image["column"][13] == {1, 5, 9, 13}
    assert image["conv"][10] == {5, 6, 7, 9, 10} and image["conv"][8] == {3, 4, 5, 7, 8}  # on over the border
    some = np.asarray(visible("full", jnp.arange(5), jnp.arange(5), prefix=3, columns=2, unmasked=3))
    np.testing.assert_array_equal(some, np.tri(5, dtype=bool) | (np.add.outer(*[np.arange(5) > 2] * 2) == 0))
    assert dall_e_patterns(64)[:6] == ("row", "column", "row", "row", "row", "column")
    assert dall_e_patterns(64).count("column") == 16 and dall_e_patterns(64)[-2:] == ("row", "conv")


@pytest.mark.parametrize("patterns", [("column",) * 3, ("row", "conv", "conv"), ("conv", "column", "row")], ids=str)
def test_layers_look_by_their_own_patterns(x64, patterns):
    """How far a change of one token gets is how far the masks of all layers, one after the other, let it."""
    net = GPT(**SIZES, patterns=patterns, kernel=1)
    p = params(net)
    run = jax.jit(lambda ids: net.apply({"params": p}, ids))
    changed = np.abs(run(IDS.at[:, 1].add(1) % 11) - run(IDS)).max((0, 2)) > 0
    places, reach = jnp.arange(12), np.arange(12) == 2  # logits i are made at place i, where the token before is read
    for pattern in patterns:
        reach = np.asarray(visible(pattern, places, places, prefix=1, columns=4, kernel=1)) @ reach
    np.testing.assert_array_equal(changed, reach)


def test_published_sizes():
    def size(net, **condition):
        ids = jax.ShapeDtypeStruct((1, net.tokens), jnp.int32)
        made = jax.eval_shape(net.init, jax.random.key(0), ids, **condition)["params"]
        return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in made.items()}

    label = dict(label=jax.ShapeDtypeStruct((1,), jnp.int32))
    small = size(GPT(1024, (16, 16), **IMAGENET, classes=1000, own_start=False), **label)
    assert sum(small.values()) == pytest.approx(307e6, rel=0.01)
    assert sum(size(GPT(16_384, (16, 16), **IMAGENET_BIG, classes=1000, own_start=False), **label).values()) == (
        pytest.approx(1.4e9, rel=0.01)
    )
    text = dict(text=jax.ShapeDtypeStruct((1, 256), jnp.int32))
    net = GPT(8192, (32, 32), **DALL_E, text_vocab=16_384, text_length=256, text_head=True, positions="axes")
    assert size(net, **text)["layers"] == pytest.approx(12.09e9, rel=0.002)


@pytest.mark.parametrize(
    "fields, condition, words",
    [
        (dict(positions="learned"), {}, "'table' or 'axes'"),
        (dict(text_length=3), {}, "come together"),
        (dict(patterns=("row",)), {}, "3 of full"),
        (dict(patterns=("row", "diagonal", "row")), {}, "3 of full"),
        (dict(length=5), {}, "12"),
        ({}, LABEL, "says? what it must be told"),
        (dict(classes=5), {}, "no label"),
        (dict(classes=5, own_start=False), LABEL | dict(keep=jnp.ones(2, bool)), "no start"),
        (dict(text_vocab=7, text_length=2), TEXT, "longer than text_length 2"),
    ],
)
def test_contradictions_are_refused(fields, condition, words):
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: GPT(**SIZES, **fields).init(jax.random.key(0), IDS, **condition))


def test_ids_must_be_of_the_grid():
    with pytest.raises(ValueError, match="tokens of a grid"):
        jax.eval_shape(lambda: NETS["nothing"].init(jax.random.key(0), IDS[:, :5]))
