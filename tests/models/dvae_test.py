"""DALL-E's dVAE: the authors' encoder (golden), the decoder written out in PyTorch, sizes, pixels, round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.dvae import DECODER, DVAE_BOTH, ENCODER
from vgen.models.dvae import (
    DALL_E,
    DVAE,
    DVAEDecoder,
    DVAEEncoder,
    gumbel_softmax,
    kl_to_uniform,
    logit_laplace,
    map_pixels,
    unmap_pixels,
)

pytestmark = pytest.mark.usefixtures("quick")


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_encoder_golden(x64):
    g = golden.load("dalle_dvae_encoder")
    module, params = tables.check_round_trip(ENCODER, g["weights"])
    assert module == DVAEEncoder(channels=24, blocks=2, num_codes=48) and tables.found(g["weights"]) is ENCODER
    x = 2 * g["inputs"]["x"].astype(np.float64).transpose(0, 2, 3, 1) - 1  # the reference takes [0, 1]
    seen = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in ("conv_in", "group_0_block_0"))
    run = jax.jit(lambda params, x: module.apply({"params": params}, x, **seen))
    logits, mids = run(tables.float64(params), x)
    golden.check(g, "logits", nchw(logits), 1e-9)
    golden.check(g, "tokens", logits.argmax(-1))
    golden.check(g, "stem", nchw(mids["intermediates"]["conv_in"]["__call__"][0]), 1e-9)
    golden.check(g, "block1", nchw(mids["intermediates"]["group_0_block_0"]["__call__"][0]), 1e-9)


def decoder_state(sizes, rng):
    """Random weights of a decoder under the authors' names."""
    module = DVAEDecoder(**sizes)
    codes = DECODER.inputs(module, rng)["codes"]
    return module, codes, tables.export(DECODER, module, tables.draw(module, codes))


def torch_decoder(state, codes, blocks):
    """The decoder of the facts sheet, written out: pre-activated bottlenecks, gain 1 / layers^2, nearest upsampling."""
    import torch
    from torch.nn import functional as F

    w = {k: torch.from_numpy(v).double() for k, v in state.items()}

    def conv(name, x):
        kernel = w[f"{name}.w"]
        return F.conv2d(x, kernel, w[f"{name}.b"], padding=kernel.shape[-1] // 2)

    x = conv("blocks.input", torch.from_numpy(nchw(codes)).double())
    for i in range(1, 5):
        for j in range(1, blocks + 1):
            at, h = f"blocks.group_{i}.block_{j}", x
            for n in range(1, 5):
                h = conv(f"{at}.res_path.conv_{n}", F.relu(h))
            x = (conv(f"{at}.id_path", x) if f"{at}.id_path.w" in w else x) + h / (4 * blocks) ** 2
        x = x if i == 4 else F.interpolate(x, scale_factor=2, mode="nearest")
    return conv("blocks.output.conv", F.relu(x)).numpy()


@pytest.mark.parametrize("sizes", [
    dict(channels=12, blocks=1, num_codes=10, stem=6),
    dict(channels=8, blocks=2, num_codes=7, stem=64, image_channels=1),
])  # fmt: skip
def test_decoder_in_torch(x64, sizes):
    pytest.importorskip("torch")
    made, codes, state = decoder_state(sizes, np.random.default_rng(0))
    module, params = tables.check_round_trip(DECODER, state)
    assert module == made
    run = jax.jit(lambda params, codes: module.apply({"params": params}, codes))
    for value in (codes, codes / 2 + 0.1):  # tokens, and a relaxed distribution
        got = nchw(run(tables.float64(params), value.astype(np.float64)))
        assert tables.error(got, torch_decoder(state, value, sizes["blocks"])) < 1e-9


def test_decoder_against_the_authors_package():
    """In float32, which is all that it accepts."""
    dall_e, torch = pytest.importorskip("dall_e"), pytest.importorskip("torch")
    sizes = dict(channels=64, blocks=1, num_codes=512, stem=32)
    module, codes, state = decoder_state(sizes, np.random.default_rng(0))
    net = dall_e.Decoder(n_init=32, n_hid=64, n_blk_per_group=1, vocab_size=512)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    with torch.no_grad():
        want = net(torch.from_numpy(nchw(codes))).numpy()
    assert tables.found(state) is DECODER
    params = tables.load(DECODER, state)[1]
    got = jax.jit(module.apply)({"params": params}, codes)
    assert tables.error(nchw(got), want) < 2e-5
    x = np.random.default_rng(0).uniform(0, 1, (1, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(map_pixels(2 * jnp.asarray(x) - 1), dall_e.map_pixels(torch.from_numpy(x)), atol=1e-6)


def test_published_sizes():
    tree = jax.eval_shape(DVAE(**DALL_E).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    sizes = {k: sum(a.size for a in jax.tree.leaves(v)) for k, v in tree.items()}
    assert sizes["encoder"] == pytest.approx(53.79e6, abs=5e3)
    assert sizes["decoder"] == pytest.approx(43.83e6, abs=5e3)


def test_both_halves_and_tokens():
    module = DVAE(channels=4, blocks=1, num_codes=11, decoder_stem=6)
    x = jax.random.uniform(jax.random.key(0), (2, 16, 24, 3), minval=-1)
    params = tables.draw(module, x)
    state = tables.export(DVAE_BOTH, module, params)
    assert tables.check_round_trip(DVAE_BOTH, state)[0] == module and tables.found(state) is DVAE_BOTH

    @jax.jit
    def run(params, x):
        apply = lambda *args, **kw: module.apply({"params": params}, *args, **kw)
        tokens = apply(x, method="tokenize")
        return apply(x), tokens, apply(tokens, method="decode_indices"), apply(x, method="logits")

    (recon, logits), tokens, decoded, again = run(params, x)
    assert recon.shape == x.shape and np.abs(recon).max() <= 1 and tokens.dtype == jnp.int32
    assert tokens.shape == (2, 2, 3) and (module.num_tokens, module.downsampling) == (11, 8)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_array_equal(recon, decoded)
    np.testing.assert_array_equal(logits, again)
    assert not np.allclose(run(params, x + 0.3)[0][1], logits, atol=1e-3)


def test_pixels_there_and_back():
    x = jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)
    np.testing.assert_allclose([map_pixels(x).min(), map_pixels(x).max()], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(unmap_pixels(map_pixels(x)), x, atol=1e-6)
    np.testing.assert_array_equal(unmap_pixels(jnp.asarray([0.0, 1.0]).reshape(1, 1, 1, 2)).ravel(), [-1, 1])


def test_fewer_levels():
    """Three have one token for 4 x 4 pixels, and branches of gain 1 / (3 blocks)^2."""
    module = DVAE(channels=4, blocks=1, num_codes=11, decoder_stem=6, levels=3)
    x = jnp.zeros((1, 8, 12, 3))
    params = tables.draw(module, x)
    assert module.downsampling == 4 and not any("group_3" in name for half in params.values() for name in half)
    tokens, out = jax.eval_shape(
        lambda: (module.apply({"params": params}, x, method="tokenize"), module.apply({"params": params}, x))
    )
    assert tokens.shape == (1, 2, 3) and out[0].shape == x.shape


def compared(got, want, arguments):
    """Value and gradients of a function against those of one in torch, relative to their size."""
    import torch

    value, grads = jax.jit(
        jax.value_and_grad(lambda *args: jnp.square(got(*args)).sum(), tuple(range(len(arguments))))
    )(*arguments)
    tensors = [torch.from_numpy(np.asarray(a)).requires_grad_() for a in arguments]
    (want(*tensors) ** 2).sum().backward()
    np.testing.assert_allclose(got(*arguments), want(*tensors).detach().numpy(), rtol=1e-9)
    for a, b in zip(grads, tensors):
        assert tables.error(a, b.grad.numpy()) < 1e-9


def test_losses_against_torch(x64):
    """The density as torch builds it of a Laplace distribution and a sigmoid, the KL as it knows it."""
    torch = pytest.importorskip("torch")
    d, rng = torch.distributions, np.random.default_rng(0)
    statistics, images = rng.standard_normal((2, 3, 4, 6)), rng.uniform(-1, 1, (2, 3, 4, 3))

    def likelihood(statistics):
        mu, log_b = statistics.chunk(2, -1)
        x = torch.from_numpy(images) * 0.4 + 0.5
        return -d.TransformedDistribution(d.Laplace(mu, log_b.exp()), [d.SigmoidTransform()]).log_prob(x)

    compared(lambda s: logit_laplace(s, jnp.asarray(images)), likelihood, [jnp.asarray(statistics)])
    floor = lambda s: likelihood(torch.cat([s[..., :3], s[..., 3:].clamp(min=float(np.log(0.8)))], -1))
    assert (statistics[..., 3:] < np.log(0.8)).any() and (statistics[..., 3:] > np.log(0.8)).any()
    compared(lambda s: logit_laplace(s, jnp.asarray(images), 0.8), floor, [jnp.asarray(statistics)])
    logits = jnp.asarray(rng.standard_normal((2, 3, 7)) * 2)
    uniform = d.Categorical(torch.full((7,), 1 / 7, dtype=torch.float64))
    compared(kl_to_uniform, lambda x: d.kl_divergence(d.Categorical(logits=x), uniform), [logits])
    noise = torch.from_numpy(np.asarray(jax.random.gumbel(jax.random.key(0), logits.shape, logits.dtype)))
    relaxed = lambda x: torch.softmax((x + noise) / 0.3, -1)
    compared(lambda x: gumbel_softmax(jax.random.key(0), x, 0.3), relaxed, [logits])


def test_relaxed_tokens_are_nearly_tokens_when_cold():
    """Their likeliest code has the probabilities of the logits, whatever the temperature (Gumbel-max)."""
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    draws = jax.jit(lambda t: gumbel_softmax(jax.random.key(0), jnp.broadcast_to(logits, (20_000, 3)), t))
    for t in (1.0, 1 / 16):
        x = draws(t)
        shares = np.bincount(np.asarray(x.argmax(-1)), minlength=3) / 20_000
        np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.015)
        np.testing.assert_allclose(x.sum(-1), 1, atol=1e-5)
    assert draws(1 / 16).max(-1).mean() > 0.95 > 0.9 > draws(1.0).max(-1).mean()


def test_errors():
    with pytest.raises(ValueError, match="multiples of 8"):
        jax.eval_shape(DVAEEncoder(channels=4).init, jax.random.key(0), jnp.zeros((1, 12, 16, 3)))
