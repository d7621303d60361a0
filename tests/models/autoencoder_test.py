"""The KL autoencoder: the authors' numbers, its posterior, published sizes, latents' scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.autoencoder import FIRST_STAGE_KL, LDM_KL
from vgen.models import autoencoder
from vgen.models.autoencoder import AutoencoderKL, Gaussian

pytestmark = pytest.mark.usefixtures("quick")
TOL = 1e-9


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_golden(x64):
    g = golden.load("kl_autoencoder")
    model, params = tables.load(LDM_KL, g["weights"])
    assert (model.channels, model.multipliers, model.blocks, model.attention_levels) == (32, (1, 2, 2), 1, ())
    x, z = (np.asarray(g["inputs"][k], np.float64).transpose(0, 2, 3, 1) for k in "xz")

    @jax.jit
    def run(params, x, z):
        seen = dict(mutable=["intermediates"], capture_intermediates=lambda m, _: m.name in ("conv_in", "mid"))
        methods = ((x, "moments"), (z, "decode"))
        maps = [model.apply({"params": params}, value, method=name, **seen) for value, name in methods]
        return *maps, model.apply({"params": params}, x, method="encode")

    (moments, enc), (recon, dec), posterior = run(tables.float64(params), x, z)
    enc, dec = enc["intermediates"]["encoder"], dec["intermediates"]["decoder"]
    for name, value in (
        ("moments", moments),
        ("recon", recon),
        ("enc_stem", enc["conv_in"]["__call__"][0]),
        ("enc_mid", enc["mid"]["__call__"][0]),
        ("dec_mid", dec["mid"]["__call__"][0]),
    ):
        golden.check(g, name, nchw(value), TOL)
    np.testing.assert_array_equal(jnp.concatenate(posterior, -1), moments)  # none is clipped here


def test_golden_in_float32():
    g = golden.load("kl_autoencoder")
    model, params = tables.load(FIRST_STAGE_KL, {f"first_stage_model.{k}": v for k, v in g["weights"].items()})
    x = g["inputs"]["x"].transpose(0, 2, 3, 1)
    moments = jax.jit(lambda params, x: model.apply({"params": params}, x, method="moments"))(params, x)
    golden.check(g, "moments", nchw(moments), 2e-5)


@pytest.mark.parametrize(
    "sizes, count",
    [
        (autoencoder.KL_F8, 83_653_863),
        (autoencoder.KL_F4, 55_312_063),
        (dict(autoencoder.KL_F4, latent_channels=4), 55_325_927),
        (autoencoder.SD3, 83_819_683),  # computed here from the published configuration
    ],
)
def test_published_sizes(sizes, count):
    model = AutoencoderKL(**sizes)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(params) == count
    if sizes is autoencoder.KL_F8:
        assert {k: size(v) for k, v in params.items()} == {
            "encoder": 34_163_592, "decoder": 49_490_179, "quant_conv": 72, "post_quant_conv": 20
        }  # fmt: skip


def test_posterior():
    mean, logvar = jnp.zeros((2, 64, 64, 2)).at[1].set(3.0), jnp.zeros((2, 64, 64, 2)).at[1].set(jnp.log(4.0))
    p = Gaussian(mean, logvar)
    draw = p.sample(jax.random.key(0))
    assert p.mode() is mean and draw.shape == mean.shape
    np.testing.assert_allclose(draw.mean((1, 2, 3)), [0, 3], atol=0.1)
    np.testing.assert_allclose(draw.std((1, 2, 3)), [1, 2], atol=0.05)
    # KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2 in each of the 64 * 64 * 2 coordinates
    np.testing.assert_allclose(p.kl(), [0, 8192 * (9 + 4 - 1 - np.log(4)) / 2], rtol=1e-5)


def tiny(**kwargs):
    return AutoencoderKL(**(dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, groups=4) | kwargs))


def test_extreme_variances_are_clipped():
    model = tiny(multipliers=(1,), mid_attention=False)
    x = jnp.zeros((1, 4, 4, 3))
    params = jax.tree.map(np.zeros_like, tables.draw(model, x))
    params["quant_conv"]["bias"] = np.float32([5, 6, 100, -100])
    posterior = jax.jit(lambda params: model.apply({"params": params}, x, method="encode"))(params)
    np.testing.assert_array_equal(posterior.mean[0, 0, 0], [5, 6])
    np.testing.assert_array_equal(posterior.logvar[0, 0, 0], [20, -30])


def test_call_draws_with_a_key_and_compute_dtype():
    model = tiny(dtype=jnp.bfloat16)
    x = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1)
    params = {"params": tables.draw(model, x)}
    run = jax.jit(lambda params, key: (model.apply(params, x, key), model.apply(params, x)))
    (a, (mode, posterior)), (b, _) = run(params, jax.random.key(1)), run(params, jax.random.key(2))
    assert mode.shape == x.shape and mode.dtype == jnp.bfloat16
    assert posterior.mean.shape == (2, 4, 6, 2) and posterior.mean.dtype == jnp.float32
    assert not np.array_equal(a[0], b[0]) and not np.array_equal(a[0], mode)
    assert model.downsampling == 2


def test_normalised_latents():
    z = jnp.arange(8.0).reshape(1, 2, 2, 2)
    plain, shifted = tiny(scaling_factor=0.5), tiny(scaling_factor=1.5305, shift_factor=0.0609)
    per_channel = tiny(scaling_factor=0.5, latents_mean=(1.0, 2.0), latents_std=(4.0, 8.0))
    np.testing.assert_allclose(plain.normalize(z), z / 2)
    np.testing.assert_allclose(shifted.normalize(z), (z - 0.0609) * 1.5305, rtol=1e-6)
    np.testing.assert_allclose(per_channel.normalize(z), (z - jnp.asarray([1, 2])) / jnp.asarray([8, 16]), rtol=1e-6)
    for model in (plain, shifted, per_channel):
        np.testing.assert_allclose(model.denormalize(model.normalize(z)), z, atol=1e-5)
    with pytest.raises(ValueError, match="given together"):
        tiny(latents_mean=(1.0, 2.0)).normalize(z)
