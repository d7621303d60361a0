"""BLIP's captioner: published sizes, the split into encoder and decoder, causality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from vgen.models.bert import Bert
from vgen.models.blip import Captioner, captioner
from vgen.models.vit import ViT


@pytest.mark.parametrize(
    "size, vision, decoder", [("base", 86_090_496, 137_881_148), ("large", 303_690_752, 142_599_740)]
)
def test_published_sizes(size, vision, decoder):
    model = captioner(size)
    images, tokens = jnp.zeros((1, 384, 384, 3)), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert counts == dict(vision=vision, decoder=decoder)


def test_the_text_alone(x64):
    """A Bert without context: bidirectional sees padding's absence only, causal sees no later word."""
    model = Bert(vocab=20, width=12, depth=2, heads=3, mlp_dim=16, max_length=8)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 6)))
    params = tables.float64(tables.draw(model, tokens))
    mask = jnp.arange(6)[None] < jnp.array([[6], [4]])
    other = tokens.at[1, 4:].add(1)

    @jax.jit
    def run(tokens, mask):
        return [model.apply({"params": params}, tokens, mask, causal=causal) for causal in (False, True)]

    (both, causal), (both2, causal2) = run(tokens, mask), run(other, mask)
    np.testing.assert_array_equal(both[1, :4], both2[1, :4])
    np.testing.assert_array_equal(causal[1, :4], causal2[1, :4])
    changed = tokens.at[:, 3].add(1)
    both3, causal3 = run(changed % 20, mask)
    assert np.abs(both3 - both)[:, 0].max() > 1e-3
    np.testing.assert_array_equal(causal3[:, :3], causal[:, :3])


def test_gradients_reach_all_parameters():
    model = Captioner(
        ViT(width=12, depth=1, heads=2, mlp_dim=16, patch_size=4, image_size=8),
        Bert(vocab=20, width=10, depth=2, heads=2, mlp_dim=16, max_length=4, cross=True, head=True, remat="full"),
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 20, (2, 4)), jnp.int32)
    params = tables.draw(model, images, tokens)

    @jax.jit
    @jax.grad
    def gradient(params):
        logits = model.apply({"params": params}, images, tokens)
        return -jax.nn.log_softmax(logits)[:, :-1][..., 3].mean()

    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, grad in jax.tree_util.tree_leaves_with_path(gradient(params))
        if not np.abs(grad).max() > 1e-6
    ]
    assert all(name.endswith("/k/bias") for name in still), still  # a bias of all keys does not change a softmax


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="one of base, large"):
        captioner("huge")
