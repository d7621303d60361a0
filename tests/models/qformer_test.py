"""The Q-Former: the authors' numbers in each of its uses, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from vgen.convert.qformer import LAVIS
from vgen.models.qformer import EVA_G, Blip2, QFormer
from vgen.models.vit import ViT

TOL = 1e-9


def test_authors_golden(x64):
    g = golden.load("blip2_qformer_lavis")
    module, params = tables.load(LAVIS, g["weights"], dict(heads=3))
    params = tables.float64(params)
    given = {k: jnp.asarray(v, jnp.float64 if v.dtype.kind == "f" else v.dtype) for k, v in g["inputs"].items()}

    @jax.jit
    def run(params, given):
        def use(*args, **kwargs):
            return module.apply(
                {"params": params}, *args, **kwargs, context_mask=given["enc_mask"] > 0, mutable=["intermediates"],
                capture_intermediates=lambda m, _: m.name == "layers_0",
            )  # fmt: skip

        text = dict(tokens=given["ids"], mask=given["text_mask"] > 0)
        queries = dict(queries=given["query"])
        image, mid = use(given["enc"], **queries)
        words, _ = use(**text, use_queries=False)
        joint, _ = use(given["enc"], **queries, **text)
        caption, _ = use(given["enc"], **queries, **text, causal=True)
        return image.queries, mid, words.text, joint, caption

    queries, mid, text, joint, caption = run(params, given)
    golden.check(g, "query", queries, TOL)
    golden.check(g, "layer0", mid["intermediates"]["layers_0"]["__call__"][0], TOL)
    golden.check(g, "text", text, TOL)
    golden.check(g, "joint", np.concatenate([joint.queries, joint.text], axis=1), TOL)
    golden.check(g, "lm_logits", caption.logits, TOL)
    np.testing.assert_allclose(caption.queries, queries, rtol=1e-12, atol=1e-12)  # no query sees a word


@pytest.mark.parametrize(
    "kwargs, count",
    [
        (dict(num_queries=0), 105_137_664),  # transformers' Blip2QFormerModel
        # stage 1 has 186.7M with norm, projections and heads, which are 2,816 + 2 x 196,864 + 1,538 + 1
        (dict(text=True, vocab=30_523, head=True), 186_705_470 - 398_083),
    ],
)
def test_published_sizes(kwargs, count):
    model = QFormer(**kwargs)
    context, tokens = jnp.zeros((1, 3, 1408)), jnp.zeros((1, 4), jnp.int32) if model.text else None
    queries = None if model.num_queries else jnp.zeros((1, 32, 768))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), context, tokens, queries=queries))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_published_sizes_of_blip2():
    model = Blip2(ViT(**EVA_G), QFormer(), projection=768)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert counts == dict(vision=985_952_256, qformer=105_137_664 + 32 * 768, project=590_592)


def test_learned_queries_and_gradients():
    model = QFormer(
        depth=2, width=12, heads=2, mlp_dim=16, context_width=10, num_queries=4, text=True, vocab=20, head=True,
        max_length=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    context = jnp.asarray(rng.standard_normal((2, 5, 10)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 20, (2, 6)), jnp.int32)
    params = tables.draw(model, context, tokens)

    @jax.jit
    @jax.grad
    def gradient(params):
        out = model.apply({"params": params}, context, tokens, causal=True)
        given = model.apply({"params": params}, context, queries=jnp.broadcast_to(params["queries"], (2, 4, 12)))
        # the learned queries are those that are given where none are
        mean = jnp.square(out.queries - given.queries).mean() * 1e6
        return -jax.nn.log_softmax(out.logits)[..., 3].mean() + jnp.abs(out.queries).mean() + mean

    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, grad in jax.tree_util.tree_leaves_with_path(gradient(params))
        if not np.abs(grad).max() > 1e-7
    ]
    assert all(name.endswith("/k/bias") for name in still), still  # a bias of all keys does not change a softmax


def test_wrong_uses_are_named():
    model = QFormer(depth=1, width=8, heads=2, mlp_dim=8, context_width=6, num_queries=0)
    for args, kwargs, message in (
        ((jnp.zeros((1, 2, 5)),), {}, "expected a width of 6"),
        ((jnp.zeros((1, 2, 6)),), {}, "queries must be given"),
        ((jnp.zeros((1, 2, 6)), jnp.zeros((1, 2), jnp.int32)), {}, "need text=True"),
        ((jnp.zeros((1, 2, 6)),), dict(use_queries=False), "neither queries nor tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda a=args, k=kwargs: model.init(jax.random.key(0), *a, **k))
