"""MaskGIT's transformer against the authors' network, and its published size."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden import golden
from vgen.models.maskgit import IMAGENET_256, MaskGIT


def convert(weights):
    w = {k.removeprefix("params/"): np.asarray(v, np.float64) for k, v in weights.items()}
    norm = lambda at: {"scale": w[at + "/scale"], "bias": w[at + "/bias"]}
    dense = lambda at: {"kernel": w[at + "/kernel"], "bias": w[at + "/bias"]}

    def layer(i):
        at = f"TransformerLayer_{i}/"
        attention = at + "Attention_0/self_attention/"
        attn = {}
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            kernel, bias = w[f"{attention}{long}/kernel"], w[f"{attention}{long}/bias"]
            attn[short] = {"kernel": kernel.reshape(48, 48), "bias": bias.reshape(48)}
        return {
            "attn": attn,
            "attn_norm": norm(at + "Attention_0/attention_output_ln"),
            "mlp": {"fc1": dense(at + "Mlp_0/intermediate_output"), "fc2": dense(at + "Mlp_0/layer_output")},
            "mlp_norm": norm(at + "Mlp_0/layer_output_ln"),
        }

    return {
        "embed": {"embedding": w["Embed_0/word_embeddings/embedding"]},
        "positions": {"table": w["Embed_0/position_embeddings/embedding"]},
        "embed_norm": norm("Embed_0/embeddings_ln"),
        "head": dense("MlmLayer_0/mlm_dense"),
        "head_norm": norm("MlmLayer_0/mlm_ln"),
        "head_bias": w["MlmLayer_0/mlm_bias/bias"],
        "layers": jax.tree.map(lambda *a: np.stack(a), *(layer(i) for i in range(3))),
    }


def test_against_the_authors_network():
    gold = golden.load("maskgit_transformer")
    net = MaskGIT(codebook=40, classes=5, length=21, depth=3, width=48, heads=6, mlp_dim=80)
    with jax.enable_x64(True):
        logits = jax.jit(net.apply)({"params": convert(gold["weights"])}, gold["inputs"]["input_ids"])
    assert logits.dtype == np.float64
    golden.check(gold, "logits", logits, dtype="float64", tol=1e-9)


def test_published_size():
    ids = jax.ShapeDtypeStruct((1, 257), jnp.int32)
    params = jax.eval_shape(MaskGIT(**IMAGENET_256).init, jax.random.key(0), ids)["params"]
    # 172.46M; the paper's 227M counts the tokenizer too
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 172_457_193


def test_image_logits_use_the_class_and_leave_it_out():
    net = MaskGIT(codebook=12, classes=3, length=7, depth=1, width=8, heads=2, mlp_dim=8)
    tokens = jnp.full((2, 6), net.mask_id)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32) / 2, shapes)
    run = jax.jit(lambda label: net.apply(params, tokens, label, method="image_logits"))
    out = run(jnp.asarray([0, 2]))
    assert out.shape == (2, 6, 12)
    whole = jax.jit(net.apply)(params, jnp.concatenate([jnp.asarray([[12], [14]]), tokens], 1))
    np.testing.assert_allclose(out, whole[:, 1:, :12], atol=1e-5)
    assert jnp.abs(out[0] - out[1]).max() > 1e-2
