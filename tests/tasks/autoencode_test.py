"""The tokenizer's objective: one backward pass gives what plain differentiation gives; views and buffers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen import trees
from vgen.data import images as image_ops
from vgen.models import discriminator as gan
from vgen.models.dvae import DVAE, gumbel_softmax, kl_to_uniform, logit_laplace
from vgen.models.vqgan import VQGAN
from vgen.tasks.autoencode import Autoencode
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

MODEL = VQGAN(channels=8, multipliers=(1, 2), blocks=1, latent_channels=8, num_codes=16, groups=4, ema=True)
DISCRIMINATOR = gan.NLayerDiscriminator(channels=8, layers=1, norm="group", groups=4)
BATCH = {"image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)), jnp.uint8)}
KEY = jax.random.key(3)


def params_of(task):
    return jax.tree.map(jnp.asarray, draw(task, BATCH))


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_one_backward_pass_equals_plain_differentiation(step):
    """Before the discriminator begins (step 0) and after; the adaptive weight is a constant of the generator's loss."""
    task = Autoencode(model=MODEL, discriminator=DISCRIMINATOR, gan=0.3, gan_start=3, l2=0.5, perceptual=0.0)
    params = params_of(task)
    x = image_ops.to_float(BATCH["image"])

    losses = jax.jit(lambda params: task.losses(params, Context(jnp.int32(step)), BATCH, KEY))
    value = lambda params, group: losses(params)[group].value
    weight = losses(params)["gen"].metrics["gan/weight"]

    def plain_gen(params):
        fixed = jax.lax.stop_gradient(params["discriminator"])
        x_hat, q = MODEL.apply({"params": params}, x)
        fooled = gan.hinge_g(DISCRIMINATOR.apply({"params": fixed}, x_hat).logits)
        return jnp.abs(x_hat - x).mean() + 0.5 * jnp.square(x_hat - x).mean() + weight * fooled + q.losses["commitment"]

    def plain_disc(params):
        x_hat = jax.lax.stop_gradient(MODEL.apply({"params": params}, x)[0])
        score = lambda y: DISCRIMINATOR.apply({"params": params["discriminator"]}, y).logits
        return gan.hinge_d(score(x), score(x_hat)) * (step >= 3)

    assert (weight > 0) == (step >= 3)
    for group, plain in (("gen", plain_gen), ("disc", plain_disc)):
        got, want = jax.jit(jax.grad(value), static_argnums=1)(params, group), jax.jit(jax.grad(plain))(params)
        for path, leaf in trees.flatten(want).items():
            np.testing.assert_allclose(trees.flatten(got)[path], leaf, rtol=2e-3, atol=2e-6, err_msg=f"{group} {path}")
        np.testing.assert_allclose(value(params, group), jax.jit(plain)(params), rtol=1e-5)


def test_a_discriminator_in_bfloat16_has_its_loss_in_float32():
    """As before it begins; published scales have it so."""
    task = Autoencode(model=MODEL, discriminator=DISCRIMINATOR, perceptual=0.0, gan_start=3)
    half = dataclasses.replace(task, discriminator=DISCRIMINATOR.clone(dtype=jnp.bfloat16))
    params, x = params_of(task), image_ops.to_float(BATCH["image"])
    found = jax.eval_shape(lambda params: half.losses(params, Context(jnp.int32(0)), BATCH, KEY), params)
    assert found["disc"].value.dtype == jnp.float32
    wide, narrow = (each._discriminate(params["discriminator"], x, -x) for each in (task, half))
    assert narrow.value.dtype == jnp.float32
    np.testing.assert_allclose(narrow.value, wide.value, rtol=0.02)


def test_adaptive_weight_is_the_ratio_of_last_layer_gradients():
    task = Autoencode(model=MODEL, discriminator=DISCRIMINATOR, gan=0.3, perceptual=0.0)
    params = params_of(task)
    x = image_ops.to_float(BATCH["image"])

    def of_kernel(kernel, part):
        new = params | {"decoder": params["decoder"] | {"conv_out": params["decoder"]["conv_out"] | {"kernel": kernel}}}
        x_hat = MODEL.apply({"params": new}, x)[0]
        if part == "rec":
            return jnp.abs(x_hat - x).mean()
        return gan.hinge_g(DISCRIMINATOR.apply({"params": params["discriminator"]}, x_hat).logits)

    kernel = params["decoder"]["conv_out"]["kernel"]
    rec, adversarial = (jnp.linalg.norm(jax.grad(of_kernel)(kernel, part)) for part in ("rec", "gan"))
    got = task.losses(params, Context(jnp.int32(0)), BATCH, KEY)["gen"].metrics["gan/weight"]
    np.testing.assert_allclose(got, 0.3 * rec / (adversarial + 1e-4), rtol=1e-4)


def test_continuous_start_ignores_the_codebook_and_fills_it_with_latents():
    task = Autoencode(model=MODEL, perceptual=0.0, continuous_steps=2)
    params = params_of(task)
    losses = lambda step: task.losses(params, Context(jnp.int32(step)), BATCH, KEY)["gen"]
    z = MODEL.apply({"params": params}, image_ops.to_float(BATCH["image"]), method="encode")
    x_hat = MODEL.apply({"params": params}, z, method="decode")
    l1 = jnp.abs(x_hat - image_ops.to_float(BATCH["image"])).mean()
    np.testing.assert_allclose(losses(0).value, l1, rtol=1e-5)
    assert not np.isclose(losses(2).value, l1, rtol=1e-3)
    codes, latents = losses(0).updates["quantizer/codebook"], z.reshape(-1, z.shape[-1])
    nearest = jnp.abs(codes[:, None] - latents[None]).max(-1).min(1)
    assert nearest.max() < 1e-5
    with pytest.raises(ValueError, match="continuous_steps needs model.ema"):
        Autoencode(model=MODEL, continuous_steps=2, train="decoder")


def test_views_are_downsampled_images_and_crops():
    task = Autoencode(model=MODEL, crop_size=8, downsampled=0.5)
    x = image_ops.to_float(BATCH["image"])
    views = task._views(x, KEY)
    assert views.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(views[:2], image_ops.downsample(x[:2], 2))
    for i in (2, 3):
        places = [(r, c) for r in range(9) for c in range(9) if jnp.array_equal(x[i, r : r + 8, c : c + 8], views[i])]
        assert len(places) == 1


def test_only_the_decoder_learns_when_asked():
    task = Autoencode(model=MODEL, discriminator=DISCRIMINATOR, train="decoder", perceptual_kind="lpips")
    shapes = trees.flatten(jax.eval_shape(lambda key: task.init(key, BATCH), KEY))
    groups = trees.group_paths(shapes, task.groups)
    assert all(path.startswith("decoder/") for path in groups["gen"])
    frozen = {path.split("/")[0] for path in shapes} - {p.split("/")[0] for paths in groups.values() for p in paths}
    assert frozen == {"encoder", "quantizer", "lpips"}


def test_evaluation_measures_psnr_of_uint8_pictures():
    task = Autoencode(model=MODEL)
    params = params_of(task)
    x_hat = image_ops.to_uint8(task.reconstruct(params, BATCH["image"])[0]).astype(jnp.float32)
    error = np.square(np.asarray(x_hat) - np.asarray(BATCH["image"], float)).mean((1, 2, 3)) / 255**2
    metrics = task.evaluate(params, [BATCH, BATCH], KEY)
    np.testing.assert_allclose(metrics["psnr"], (-10 * np.log10(error)).mean(), rtol=1e-4)
    assert 1 / 16 <= metrics["codebook_usage"] <= 1
    with pytest.raises(ValueError, match="no batches"):
        task.evaluate(params, [], KEY)
    assert task.show(params, BATCH, KEY)["reconstruction"].dtype == np.uint8


RELAXED = Autoencode(
    model=DVAE(channels=4, blocks=1, num_codes=11, decoder_stem=6, levels=2), l1=0.5, perceptual=0.0, kl=6.6,
    kl_steps=50, temperature=(1.0, 1 / 16, 150),
)  # fmt: skip


@pytest.mark.parametrize(
    "step, temperature, weight", [(0, 1.0, 0.0), (25, None, 3.3), (75, 17 / 32, 6.6), (999, 1 / 16, 6.6)]
)
def test_relaxed_tokens_are_trained_by_the_bound(x64, step, temperature, weight):
    """Ramesh et al. 2021, section 2.1: loss and gradients are those of the bound written out, per value."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params_of(RELAXED))
    x, model = image_ops.to_float(BATCH["image"]).astype(jnp.float64), RELAXED.model
    said = jax.jit(lambda p: RELAXED.losses(p, Context(jnp.int32(step)), BATCH, KEY)["gen"])
    cold = said(params).metrics["temperature"]
    assert temperature is None or abs(cold - temperature) < 1e-6

    def bound(params):
        logits = model.apply({"params": params}, x, method="logits")
        codes = gumbel_softmax(jax.random.split(KEY)[1], logits, cold)
        statistics = model.apply({"params": params}, codes, method="decode")
        kl = kl_to_uniform(logits).sum() / x.size
        l1 = jnp.abs(model.picture(statistics) - x).mean()
        return logit_laplace(statistics, x).mean() + weight * kl + 0.5 * l1

    value, grads = jax.jit(jax.value_and_grad(lambda p: said(p).value))(params)
    want, wanted = jax.jit(jax.value_and_grad(bound))(params)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for path, leaf in trees.flatten(wanted).items():
        np.testing.assert_allclose(trees.flatten(grads)[path], leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_relaxed_tokens_are_measured_as_tokens():
    params = params_of(RELAXED)
    x_hat, tokens = RELAXED.reconstruct(params, BATCH["image"])
    assert tokens.shape == (4, 8, 8) and jnp.abs(x_hat).max() <= 1
    metrics = RELAXED.evaluate(params, [BATCH], KEY)
    assert 1 / 11 <= metrics["codebook_usage"] <= 1 <= metrics["codebook_perplexity"] and metrics["psnr"] > 0
    assert RELAXED.sample(params, KEY, BATCH)["image_out"].dtype == jnp.uint8
    with pytest.raises(ValueError, match="a DVAE takes no discriminator"):
        Autoencode(model=RELAXED.model, discriminator=DISCRIMINATOR)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(train="encoder"), "train must be"),
        (dict(gan_loss="wgan"), "gan_loss must be"),
        (dict(perceptual_kind="vgg"), "perceptual_kind must be"),
        (dict(r1=1.0, discriminator=gan.NLayerDiscriminator()), "r1 needs"),
    ],
)
def test_bad_settings_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Autoencode(model=MODEL, **kwargs)
