"""Gated PixelCNN: the published port's numbers, torch's gradients, and what each token can see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.vqvae import PIXELCNN
from vgen.models.pixelcnn import GatedLayer, PixelCNN
from vgen.models.vqvae import VQVAE
from vgen.tasks.autoregressive import Autoregressive
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_golden(x64, dtype, tol):
    g = golden.load("gated_pixelcnn")
    module, params = tables.check_round_trip(PIXELCNN, g["weights"], {"grid": (7, 7)})
    sizes = dict(vocab=20, grid=(7, 7), width=12, depth=4, classes=6)
    assert module == PixelCNN(**sizes) and tables.found(g["weights"]) is PIXELCNN
    params = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
    x, label = g["inputs"]["x"], jnp.asarray(g["inputs"]["label"])
    y = tables.applied(module, params, dict(tokens=x.reshape(2, -1), label=label))
    golden.check(g, "y", nchw(y.reshape(2, 7, 7, -1)), tol)

    def layers(params):
        pair = (params["embed"]["embedding"][x],) * 2
        first = GatedLayer(12, 7, first=True, classes=6).apply({"params": params["first"]}, pair, label)
        second = jax.tree.map(lambda a: a[0], params["layers"])
        return first, GatedLayer(12, 3, classes=6).apply({"params": second}, first, label)

    first, second = jax.jit(layers)(params)
    golden.check(g, "layer0_v", nchw(first[0]), tol)
    golden.check(g, "layer0_h", nchw(first[1]), tol)
    golden.check(g, "layer1_h", nchw(second[1]), tol)


def in_torch(w, tokens, label):
    """The network of a state dict in torch's functions, masks as in the paper's figure 2: [b, vocab, h, w]."""
    import torch
    from torch.nn import functional as F

    def gated(x):
        a, b = x.chunk(2, 1)
        return torch.tanh(a) * torch.sigmoid(b)

    v = h = F.embedding(torch.from_numpy(tokens).long(), w["embedding.weight"]).permute(0, 3, 1, 2)
    i = 0
    while f"layers.{i}.vert_stack.weight" in w:
        part = lambda name: (w[f"layers.{i}.{name}.weight"], w[f"layers.{i}.{name}.bias"])
        told = w[f"layers.{i}.class_cond_embedding.weight"][torch.from_numpy(label).long()][:, :, None, None]
        (down, down_bias), (along, along_bias) = part("vert_stack"), part("horiz_stack")
        half = down.shape[3] // 2
        if i == 0:  # the row of the token, and the token, are hidden
            down = torch.cat([down[:, :, :-1], 0 * down[:, :, -1:]], 2)
            along = torch.cat([along[..., :-1], 0 * along[..., -1:]], 3)
        above = F.conv2d(F.pad(v, (half, half, half, 0)), down, down_bias)
        left = F.conv2d(F.pad(h, (half, 0, 0, 0)), along, along_bias)
        out = F.conv2d(gated(F.conv2d(above, *part("vert_to_horiz")) + left + told), *part("horiz_resid"))
        v, h, i = gated(above + told), (out + h if i else out), i + 1
    x = F.relu(F.conv2d(h, w["output_conv.0.weight"], w["output_conv.0.bias"]))
    return F.conv2d(x, w["output_conv.2.weight"], w["output_conv.2.bias"])


def test_loss_and_gradients_against_torch(x64):
    """Other kernels, a grid that is no square; next-token cross-entropy and its gradient in every parameter."""
    torch = pytest.importorskip("torch")
    module = PixelCNN(vocab=11, grid=(4, 6), width=6, depth=3, first_kernel=5, hidden=9, classes=3)
    rng = np.random.default_rng(1)
    tokens, label = rng.integers(0, 11, (2, 24), np.int32), np.array([2, 0], np.int32)
    params = tables.float64(tables.draw(module, tokens, label))
    state = tables.export(PIXELCNN, module, params)
    weights = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in state.items()}
    logits = in_torch(weights, tokens.reshape(2, 4, 6), label)
    want = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens.reshape(2, 4, 6)).long())
    want.backward()

    def loss(params):
        log_p = jax.nn.log_softmax(module.apply({"params": params}, jnp.asarray(tokens), jnp.asarray(label)))
        return -jnp.take_along_axis(log_p, tokens[..., None], -1).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(float(value) - want.item()) < 1e-12
    got = tables.export(PIXELCNN, module, jax.tree.map(np.asarray, grads))
    for name, leaf in weights.items():
        assert tables.error(got[name], leaf.grad.numpy()) < 1e-9, name


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_token_sees_all_before_it_and_nothing_else(remat):
    """By gradients: each place has a token of its own, so that rows of the table are places."""
    rows, columns = 5, 6
    n = rows * columns
    module = PixelCNN(vocab=n, grid=(rows, columns), width=4, depth=5, hidden=8, classes=2, remat=remat)
    tokens, label = jnp.arange(n, dtype=jnp.int32)[None], jnp.array([1], jnp.int32)
    params = tables.draw(module, tokens, label)
    each = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)

    def outputs(table):
        logits = module.apply({"params": params | {"embed": {"embedding": table}}}, tokens, label)[0]
        return (logits * each).sum(-1)  # [n], of each token

    influence = np.abs(jax.jit(jax.jacrev(outputs))(params["embed"]["embedding"])).max(-1)  # [output, input]
    before = np.tril(np.ones((n, n), bool), -1)
    assert (influence[~before] == 0).all() and (influence[before] > 0).all()


def test_a_class_that_is_not_told():
    module = PixelCNN(vocab=7, grid=(3, 3), width=4, depth=2, hidden=8, classes=2)
    tokens, label = np.arange(18, dtype=np.int32).reshape(2, 9) % 7, np.array([1, 0], np.int32)
    params = tables.draw(module, tokens, label)
    run = lambda **told: np.asarray(tables.applied(module, params, dict(tokens=tokens, **told)))
    told, nothing, half = run(label=label), run(), run(label=label, keep=np.array([True, False]))
    assert np.abs(told - nothing).max() > 1e-3 and np.abs(told - run(label=label[::-1])).max() > 1e-3
    np.testing.assert_array_equal(half, np.stack([told[0], nothing[1]]))
    plain = PixelCNN(vocab=7, grid=(3, 3), width=4, depth=1, hidden=8)
    assert "layers" not in jax.eval_shape(plain.init, jax.random.key(0), tokens)["params"]


def test_samples_of_the_task_are_what_the_network_says():
    """Over a VQ-VAE's codes: the likeliest tokens, drawn one by one, are the likeliest given the whole picture."""
    codes = dict(channels=8, hidden=4, blocks=1, levels=2, num_codes=9)
    task = Autoregressive(PixelCNN(vocab=9, grid=(4, 4), width=6, depth=3, hidden=8, classes=3), VQVAE(**codes), 16,
                          classes=3, drop=0.2)  # fmt: skip
    rng = np.random.default_rng(2)
    batch = {"image": jnp.asarray(rng.integers(0, 256, (4, 16, 16, 3)), jnp.uint8), "label": jnp.array([0, 1, 2, 1])}
    params = jax.tree.map(lambda a: jnp.asarray(3 * a), tables.draw(task, batch))  # sure of what they say

    @jax.jit
    def run(params):
        out = task.sample(params, jax.random.key(0), {"label": batch["label"]}, guidance_scale=1.5, temperature=0.0)
        told, other = (
            task.network.apply({"params": params["network"]}, out["tokens"], batch["label"], keep=jnp.full(4, told))
            for told in (True, False)
        )
        return out, other + 1.5 * (told - other), task.losses(params, Context(jnp.int32(0)), batch, jax.random.key(1))

    out, logits, losses = run(params)
    np.testing.assert_array_equal(logits.argmax(-1), out["tokens"])
    assert len(np.unique(out["tokens"])) > 2 and out["image_out"].shape == (4, 16, 16, 3)
    assert np.isfinite(losses["main"].value)


def test_wrong_input():
    module = PixelCNN(vocab=7, grid=(3, 3), width=4, depth=2)
    key, tokens = jax.random.key(0), np.zeros((2, 9), np.int32)
    with pytest.raises(ValueError, match="are not 9, those of a grid"):
        jax.eval_shape(module.init, key, tokens[:, :8])
    with pytest.raises(ValueError, match="classes is 0"):
        jax.eval_shape(module.init, key, tokens, tokens[:, 0])
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        jax.eval_shape(module.clone(kernel=4).init, key, tokens)
