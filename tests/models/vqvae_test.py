"""VQ-VAE: the published port's numbers, and the training loss and its gradients against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.vqvae import VQ
from vgen.data import images as image_ops
from vgen.models.vqvae import SONNET, VQVAE
from vgen.tasks.autoencode import Autoencode
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")
TINY = dict(channels=8, hidden=4, num_codes=6)


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x):
    return np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_golden(x64, dtype, tol):
    g = golden.load("vqvae_rithesh")
    state = g["weights"]
    module, params = tables.check_round_trip(VQ, state)
    assert module == VQVAE(channels=20, num_codes=24, layout="batch_norm") and tables.found(state) is VQ
    variables = {"params": jax.tree.map(lambda a: jnp.asarray(a, dtype), params)}

    @jax.jit
    def run(variables, x, codes):
        z, mids = module.apply(
            variables, x, method="encode", mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name == "down_0",
        )  # fmt: skip
        q = module.apply(variables, z, method="quantize")
        images = (
            module.apply(variables, q.z_q, method="decode"),
            module.apply(variables, codes, method="decode_indices"),
        )
        return z, q, images, mids["intermediates"]["encoder"]["down_0"]["__call__"][0]

    z, q, (recon, decoded), stem = run(
        variables, jnp.asarray(nhwc(g["inputs"]["x"]), dtype), jnp.asarray(g["inputs"]["codes"])
    )
    golden.check(g, "stem", nchw(stem), tol)
    golden.check(g, "z_e", nchw(z), tol)
    golden.check(g, "z_q", nchw(q.z_q), tol)
    golden.check(g, "codes", q.indices)
    golden.check(g, "recon", nchw(recon), tol)
    golden.check(g, "decode", nchw(decoded), tol)


class Torch:
    """The paper's and DeepMind's networks in torch's functions, by vgen's parameters."""

    def __init__(self, params, model):
        import torch

        self.torch, self.model = torch, model
        self.w = {k: torch.from_numpy(np.array(v)).requires_grad_() for k, v in flatten_dict(params, sep="/").items()}

    def conv(self, x, name, **kwargs):
        kernel = self.w[f"{name}/kernel"].permute(3, 2, 0, 1)
        size = kernel.shape[-1]
        return self.torch.nn.functional.conv2d(x, kernel, self.w[f"{name}/bias"], padding=(size - 1) // 2, **kwargs)

    def up(self, x, name):
        kernel = self.w[f"{name}/kernel"].flip(0, 1).permute(2, 3, 0, 1)
        return self.torch.nn.functional.conv_transpose2d(x, kernel, self.w[f"{name}/bias"], stride=2, padding=1)

    def residual(self, x, half):
        relu = self.torch.relu
        for i in range(self.model.blocks):
            h = relu(self.conv(relu(x), f"{half}/block_{i}_conv1"))
            x = x + self.conv(h, f"{half}/block_{i}_conv2")
        return x

    def encode(self, x):
        relu, sonnet = self.torch.relu, self.model.layout == "sonnet"
        for i in range(self.model.levels):
            x = self.conv(relu(x) if i else x, f"encoder/down_{i}", stride=2)
        if sonnet:
            x = relu(self.conv(relu(x), "encoder/conv_mid"))
        x = self.residual(x, "encoder")
        return x if self.model.code_dim is None else self.conv(relu(x), "encoder/conv_out")

    def decode(self, z):
        relu = self.torch.relu
        x = z if self.model.code_dim is None else self.conv(z, "decoder/conv_in")
        x = relu(self.residual(x, "decoder"))
        for i in reversed(range(1, self.model.levels)):
            x = relu(self.up(x, f"decoder/up_{i}"))
        return self.up(x, "decoder/conv_out")

    def losses(self, x, beta):
        """(total, reconstruction, indices, z): eq. 3, its squared errors as means over values."""
        torch, codes = self.torch, self.w["quantizer/codebook"]
        z = self.encode(x)
        flat = z.permute(0, 2, 3, 1).reshape(-1, codes.shape[1])
        indices = torch.cdist(flat, codes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        quantized = codes[indices].reshape(z.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
        x_hat = self.decode(z + (quantized - z).detach())
        rec = ((x_hat - x) ** 2).mean()
        total = rec + beta * ((z - quantized.detach()) ** 2).mean()
        total = total if self.model.ema else total + ((quantized - z.detach()) ** 2).mean()
        return total, rec, indices, flat


@pytest.mark.parametrize(
    "case",
    [
        dict(TINY, layout="paper"),
        dict(TINY, layout="paper", code_dim=5, levels=1, blocks=1, commitment_weight=0.5),
        dict(TINY, layout="sonnet", code_dim=5, ema=True),
    ],
    ids=["paper", "narrow codes", "averaged codes"],
)
def test_loss_and_gradients_against_torch(x64, case):
    """What Autoencode minimises, with the straight-through gradient; averaged codes move as appendix A.1 says."""
    torch = pytest.importorskip("torch")
    model = VQVAE(**case)
    task = Autoencode(model=model, l1=0.0, l2=1.0, perceptual=0.0, decay=0.9)
    black_or_white = np.random.default_rng(0).integers(0, 2, (2, 16, 12, 3))  # -1 and 1, free of rounding
    batch = {"image": jnp.asarray(255 * black_or_white, jnp.uint8)}
    params = tables.float64(tables.draw(task, batch))
    if model.ema:
        params["quantizer"]["ema_count"] = 1 + np.abs(params["quantizer"]["ema_count"])
    x = nchw(np.asarray(image_ops.to_float(batch["image"]), np.float64))
    latents = Torch(params, model).encode(torch.from_numpy(x)).detach().permute(0, 2, 3, 1).flatten(0, 2).numpy()
    params["quantizer"]["codebook"] = 1.1 * latents[:: len(latents) // 6][:6]  # all of them in use
    context = Context(jnp.int32(0))

    def loss(params):
        out = task.losses(params, context, batch, jax.random.key(0))["gen"]
        return out.value, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    reference = Torch(params, model)
    total, rec, indices, z = reference.losses(torch.from_numpy(x), model.commitment_weight)
    total.backward()
    assert len(set(indices.tolist())) > 2
    for got, want in ((value, total), (out.metrics["l2"], rec)):
        assert float(got) == pytest.approx(want.item(), rel=1e-9)
    for path, leaf in flatten_dict(grads, sep="/").items():
        want = reference.w[path].grad
        if model.ema and path.startswith("quantizer"):
            assert want is None or path == "quantizer/codebook"  # torch's hangs on the decoder's input alone
            assert not np.any(leaf)
        else:
            assert tables.error(leaf, want.numpy()) < 1e-9, path
    if model.ema:
        hot = torch.nn.functional.one_hot(indices, model.num_codes).double()
        old = params["quantizer"]
        count = 0.9 * old["ema_count"] + 0.1 * hot.sum(0).numpy()
        total = 0.9 * old["ema_sum"] + 0.1 * (hot.T @ z).detach().numpy()
        smooth = (count + 1e-5) / (count.sum() + model.num_codes * 1e-5) * count.sum()
        assert tables.error(out.updates["quantizer/ema_count"], count) < 1e-9
        assert tables.error(out.updates["quantizer/codebook"], total / smooth[:, None]) < 1e-9
    else:
        assert not out.updates


def test_published_sizes():
    """Of DeepMind's example."""
    shapes = jax.eval_shape(VQVAE(**SONNET).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    assert counts == dict(encoder=372_416, decoder=290_307, quantizer=32_768)


def test_tokens_and_back():
    model = VQVAE(**TINY, ema=True)
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 16, 8, 3)), jnp.float32)
    variables = {"params": jax.tree.map(jnp.asarray, tables.draw(model, x))}
    tokens, decoded, (recon, q) = jax.jit(
        lambda v, x: (
            tokens := model.apply(v, x, method="tokenize"),
            model.apply(v, tokens, method="decode_indices"),
            model.apply(v, x),
        )
    )(variables, x)
    assert tokens.shape == (2, 4, 2) and tokens.dtype == jnp.int32 and model.downsampling == 4 and model.num_tokens == 6
    np.testing.assert_array_equal(q.indices, tokens)
    np.testing.assert_allclose(decoded, recon, rtol=1e-5, atol=1e-6)


def test_wrong_settings():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        jax.eval_shape(VQVAE(**TINY).init, key, jnp.zeros((1, 16, 10, 3)))
    with pytest.raises(ValueError, match="accepted: 'paper', 'sonnet', 'batch_norm'"):
        jax.eval_shape(VQVAE(**TINY, layout="taming").init, key, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(ValueError, match="statistics that training does not move"):
        Autoencode(model=VQVAE(**TINY, layout="batch_norm"))
