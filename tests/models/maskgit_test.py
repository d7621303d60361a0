"""MaskGIT's transformer against the authors' network, and its published size."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.convert import tables
from tests.golden import golden
from vgen.convert.maskgit import MASKGIT
from vgen.models.maskgit import IMAGENET_256, MaskGIT


def test_against_the_authors_network():
    gold = golden.load("maskgit_transformer")
    net, params = tables.load(MASKGIT, gold["weights"], {"codebook": 40})
    assert net == MaskGIT(codebook=40, classes=5, length=21, depth=3, width=48, heads=6, mlp_dim=80)
    with jax.enable_x64(True):
        logits = jax.jit(net.apply)({"params": tables.float64(params)}, gold["inputs"]["input_ids"])
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
