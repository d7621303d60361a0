"""T5's encoder against transformers, and its published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgen import trees
from vgen.convert import rules
from vgen.convert.t5 import table
from vgen.models import t5


def reference(version):
    import torch
    from transformers import T5Config, T5EncoderModel

    kind = {
        "1.1": dict(feed_forward_proj="gated-gelu", num_layers=3, relative_attention_num_buckets=32),
        "1.0": dict(feed_forward_proj="relu", num_layers=2, relative_attention_num_buckets=12),
    }[version]
    size = dict(vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_heads=5, dropout_rate=0.0)
    config = T5Config(attn_implementation="eager", **size, **kind)
    model = T5EncoderModel(config).double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        spread = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.data = 1 + spread if "norm" in name else spread
    return model


@pytest.fixture
def exact(monkeypatch):
    """transformers rounds norms and softmax to float32 even in a float64 model: take those casts out."""
    import torch
    from transformers.models.t5 import modeling_t5

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def softmax(x, dim, dtype=None):
        return torch.softmax(x, dim)

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", norm)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_against_transformers(version, exact):
    import torch

    model = reference(version)
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 190)).astype(np.int32)  # beyond max_distance
    mask = np.arange(190)[None] < np.array([[190], [77]])
    with torch.no_grad():
        want = model(torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    kind = {"1.1": dict(depth=3, buckets=32), "1.0": dict(depth=2, buckets=12, act="relu", gated=False)}[version]
    net = t5.T5Encoder(width=24, heads=5, head_dim=6, mlp_dim=40, vocab=50, **kind)
    with jax.enable_x64(True):
        shapes = trees.flatten(jax.eval_shape(net.init, jax.random.key(0), tokens)["params"])
        params = trees.unflatten(rules.load(state.get, state, table(net), shapes))
        got = np.asarray(jax.jit(net.apply)({"params": params}, tokens, jnp.asarray(mask)))
    error = np.abs(got - want)[mask].max() / np.abs(want[mask]).max()
    assert error < 1e-12, error


@pytest.mark.parametrize(
    "shape, count", [(t5.XXL, 4_762_310_656), (t5.XL, 1_223_527_424), (t5.LARGE, 341_231_104), (t5.BASE, 109_628_544)]
)
def test_published_sizes(shape, count):
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(t5.T5Encoder(**shape).init, jax.random.key(0), tokens)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
