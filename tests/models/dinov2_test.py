"""DINOv2: published sizes, resized positions, the projection head; see tests/convert/dinov2_test.py for parity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from vgen.layers.embed import GridPositions
from vgen.models import dinov2


@pytest.mark.parametrize(
    "sizes, count",
    [
        (dinov2.SMALL, 22_056_576), (dinov2.BASE, 86_580_480), (dinov2.LARGE, 304_368_640),
        (dinov2.GIANT, 1_136_480_768),
    ],
)  # fmt: skip
def test_published_sizes(sizes, count):
    for kind in (dinov2.PLAIN, dinov2.REGISTERS):
        model = dinov2.DINOv2(**sizes, **kind)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 518, 518, 3)))["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count + kind["num_registers"] * sizes["width"]


def test_golden_positions(x64):
    g = golden.load("dinov2")
    positions = GridPositions((4, 4), 36, cls=True, resize="bicubic", offset=0.1)
    cls, rows = positions.apply({"params": {"table": np.asarray(g["weights"]["pos_embed"][0], np.float64)}}, 7, 5)
    golden.check(g, "other_pos", jnp.concatenate([cls[None], rows])[None], 1e-10)


def test_golden_head(x64):
    g = golden.load("dinov2_head")
    w = {k: np.asarray(v, np.float64) for k, v in g["weights"].items()}
    params = {f"fc_{i}": dict(kernel=w[f"mlp.{2 * i}.weight"].T, bias=w[f"mlp.{2 * i}.bias"]) for i in range(3)}
    params |= dict(direction=w["last_layer.weight_v"].T, length=w["last_layer.weight_g"][:, 0])
    head = dinov2.DINOHead(prototypes=40, hidden=28, bottleneck=12)
    x = jnp.asarray(g["inputs"]["x"], jnp.float64)
    shapes = jax.eval_shape(head.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, params)
    golden.check(g, "y", jax.jit(head.apply)({"params": params}, x), 1e-10)


def test_intermediate_layers(x64):
    model = dinov2.DINOv2(width=8, depth=3, heads=2, mlp_dim=12, patch_size=4, image_size=8, num_registers=2)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 12, 3)))
    params = {"params": tables.draw(model, images)}
    out = jax.jit(model.apply)(params, images)
    find = jax.jit(dinov2.intermediate, static_argnums=(0, 3, 4))
    (patches, cls), (last, last_cls) = find(model, params, images, 2)
    assert patches.shape == (2, 2, 3, 8) and cls.shape == (2, 8)
    np.testing.assert_allclose(last.reshape(2, 6, 8), out.tokens[:, 3:], atol=1e-12)
    np.testing.assert_allclose(last_cls, out.pooled, atol=1e-12)
    ((raw, _),) = find(model, params, images, 1, False)
    assert not np.allclose(raw, last)
    with pytest.raises(ValueError, match="last=4"):
        dinov2.intermediate(model, params, images, last=4)
