"""The task of diffusion: conditions and their absence, latents and their scale, edits, guidance by a classifier."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert.tables import draw, quick  # noqa: F401  a fixture
from vgen.data import images as image_ops
from vgen.diffusion import losses, schedules, times
from vgen.models.autoencoder import AutoencoderKL
from vgen.models.text import TextTransformer
from vgen.models.unet import UNet
from vgen.models.unet_classifier import NoisedClassifier
from vgen.models.vqgan import Layout
from vgen.tasks.autoencode import Autoencode
from vgen.tasks.diffuse import Diffuse
from vgen.types import Context

pytestmark = pytest.mark.usefixtures("quick")

LOCAL = Layout(local=True, mid_blocks=1, mid_attention=False, decoder_extra=0, out_kernel=1)
VAE = AutoencoderKL(
    channels=8, multipliers=(1,), patch=4, blocks=1, latent_channels=4, groups=4, mid_attention=False, layout=LOCAL,
    scaling_factor=1.0,
)  # fmt: skip
SMALL = dict(widths=(8,), attention=(1,), blocks=1, heads=2, groups=4)
SCHEDULE = schedules.discrete(schedules.betas("scaled_linear"))
TEXT = TextTransformer(vocab=20, length=5, depth=1, width=8, heads=2, mlp_dim=16)
LATENT = Diffuse(
    UNet(in_channels=4, out_channels=4, context_dim=8, **SMALL), SCHEDULE, 16, vae=VAE, scale_by_std=True,
    text_encoder=TEXT, train_text=True, prediction="v", max_steps=6,
)  # fmt: skip
PIXELS = Diffuse(
    UNet(in_channels=3, out_channels=6, num_classes=4, **SMALL), SCHEDULE, 8, classes=3, variance="learned_range",
    classifier=NoisedClassifier(
        in_channels=3, image_size=8, widths=(8,), attention=(0,), blocks=1, head_dim=4, outputs=3, groups=4
    ),
    threshold="clip", max_steps=6,
)  # fmt: skip
RNG = np.random.default_rng(0)
BATCH = {
    "image": jnp.asarray(RNG.integers(0, 256, (4, 16, 16, 3)), jnp.uint8),
    "text": jnp.asarray(RNG.integers(2, 20, (4, 5)), jnp.int32),
    "text_mask": jnp.asarray([[1, 1, 1, 0, 0]] * 4, bool),
    "label": jnp.asarray([0, 1, 2, 1], jnp.int32),
}
KEY = jax.random.key(1)
OTHER = BATCH | {"text": 2 + (BATCH["text"] + 3) % 18, "label": (BATCH["label"] + 1) % 3}


@pytest.fixture(scope="module")
def params():
    """{task: parameters, all of them random}."""
    return {task.size: jax.tree.map(jnp.asarray, draw(task, BATCH)) for task in (LATENT, PIXELS)}


@pytest.fixture(scope="module")
def latent_sample(params):
    return jax.jit(lambda conds, **knobs: LATENT.sample(params[16], KEY, conds, **knobs))


@pytest.mark.parametrize("task", [LATENT, PIXELS], ids=["text", "classes"])
def test_dropped_conditions_do_not_matter_and_kept_ones_do(task, params):
    value = jax.jit(
        lambda t, b: t.losses(params[task.size], Context(jnp.int32(1)), b, KEY)["main"].value, static_argnums=0
    )
    dropped, kept = Static(dataclasses.replace(task, drop=1.0)), Static(dataclasses.replace(task, drop=1e-9))
    assert value(dropped, BATCH) == value(dropped, OTHER)
    assert value(kept, BATCH) != value(kept, OTHER)


class Static:
    """A task as a static argument: its settings hold dicts, which have no hash."""

    def __init__(self, task):
        self.losses = task.losses


def test_latents_are_brought_to_unit_scale_by_the_first_batch(params):
    """Step 0 trains at the new scale already, and later steps leave it alone."""
    run = jax.jit(lambda step: LATENT.losses(params[16], Context(step), BATCH, KEY)["main"])
    first, later = run(jnp.int32(0)), run(jnp.int32(5))
    stored = params[16]["latents"]["scale"]
    z = LATENT.encode(params[16], BATCH["image"], jax.random.split(KEY, 5)[0]) / stored
    np.testing.assert_allclose(first.updates["latents/scale"] * z.std(), 1, rtol=1e-5)
    np.testing.assert_allclose(later.updates["latents/scale"], stored, rtol=1e-6)
    assert first.value != later.value


def test_loss_is_that_of_the_parts(params):
    """Against the formulas called one by one, with the task's own draws; learned variance included."""
    got = PIXELS.losses(params[8], Context(jnp.int32(0)), BATCH, KEY)["main"]
    _, time_key, noise_key, drop_key, _ = jax.random.split(KEY, 5)
    x0 = image_ops.downsample(image_ops.to_float(BATCH["image"]), 2)
    noised = losses.diffuse(noise_key, x0, SCHEDULE, times.sample_times(time_key, 4, SCHEDULE))
    keep = jax.random.uniform(drop_key, (4,)) >= 0.1
    labels = jnp.where(keep, BATCH["label"], 3)
    raw = PIXELS.network.apply({"params": params[8]["network"]}, noised.x, noised.step.t, labels=labels)
    want, parts = losses.hybrid_loss(raw, noised, SCHEDULE)
    np.testing.assert_allclose(got.value, want.mean(), rtol=1e-5)
    np.testing.assert_allclose(got.metrics["vb"], parts["vb"].mean(), rtol=1e-5)


def test_frozen_parts_get_no_gradient(params):
    grads = jax.jit(jax.grad(lambda p: LATENT.losses(p, Context(jnp.int32(1)), BATCH, KEY)["main"].value))(params[16])
    size = lambda name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[name]))
    assert size("vae") == 0 < min(size("network"), size("text_encoder"))


def conds(**more):
    return {"text": BATCH["text"], "text_mask": BATCH["text_mask"]} | more


def test_negative_prompt_takes_the_place_of_no_text(latent_sample):
    one = lambda c, scale: latent_sample(c, guidance_scale=scale, steps=3)["latents"]
    negative = conds(negative=OTHER["text"], negative_mask=BATCH["text_mask"])
    plain = one(conds(), 1.0)
    assert jnp.abs(one(conds(), 4.0) - one(negative, 4.0)).max() > 1e-3
    np.testing.assert_allclose(plain, one(negative, 1.0), atol=1e-5)  # no guidance: neither is looked at
    same = conds(negative=BATCH["text"], negative_mask=BATCH["text_mask"])
    np.testing.assert_allclose(one(same, 4.0), plain, atol=1e-4)  # guidance away from the prompt itself is none


def test_edits_keep_what_they_must(latent_sample, params):
    mask = np.zeros((4, 16, 16), bool)
    mask[:, :, 9:] = True  # the last two of four columns of latents
    known = LATENT.encode(params[16], BATCH["image"])
    out = latent_sample(conds(image=BATCH["image"], mask=jnp.asarray(mask)), steps=4)
    np.testing.assert_allclose(out["latents"][:, :, :2], known[:, :, :2], atol=1e-5)
    assert jnp.abs(out["latents"][:, :, 2:] - known[:, :, 2:]).min(axis=(1, 2, 3)).max() > 1e-4
    untouched = latent_sample(conds(image=BATCH["image"]), steps=4, strength=0.0)
    np.testing.assert_allclose(untouched["latents"], known, atol=1e-5)
    far, near = (latent_sample(conds(image=BATCH["image"]), steps=4, strength=s)["latents"] for s in (1.0, 0.25))
    assert jnp.abs(far - known).mean() > jnp.abs(near - known).mean() > 0


@pytest.mark.parametrize("solver, knobs", [("ddim", {}), ("ddpm", {"variance": "learned_range"})])
def test_classifier_guidance_raises_the_probability(solver, knobs, params):
    """In both forms: the shift of the mean (ancestral) and of the noise (DDIM)."""
    task = dataclasses.replace(PIXELS, solver=solver, solver_knobs=knobs, drop=0.0)
    run = jax.jit(lambda scale: task.sample(params[8], KEY, {"label": BATCH["label"]}, classifier_scale=scale, steps=4))

    def log_prob(x):
        logits = PIXELS.classifier.apply({"params": params[8]["classifier"]}, x, jnp.zeros(4))
        return jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["label"][:, None], 1).mean()

    off, on = (log_prob(run(scale)["latents"]) for scale in (0.0, 3.0))
    assert on > off
    assert jnp.abs(run(0.0)["latents"]).max() <= 1
    # the last step of DDIM is its steered x0, of the other its mean: neither is clipped again
    assert jnp.abs(run(300.0)["latents"]).max() > 1


def test_a_network_without_classes_is_guided_by_the_classifier_alone(params):
    """ADM's unconditional models under guidance: labels are the classifier's business."""
    net = PIXELS.network.clone(num_classes=None)
    task = dataclasses.replace(PIXELS, network=net, drop=0.0)
    given = params[8] | {"network": {k: v for k, v in params[8]["network"].items() if k != "labels"}}
    run = jax.jit(lambda label, scale: task.sample(given, KEY, {"label": label}, classifier_scale=scale, steps=3))
    free, other = (run(label, 0.0)["latents"] for label in (BATCH["label"], OTHER["label"]))
    np.testing.assert_array_equal(free, other)
    led, other = (run(label, 5.0)["latents"] for label in (BATCH["label"], OTHER["label"]))
    assert jnp.abs(led - free).max() > 1e-3 and jnp.abs(led - other).max() > 1e-3


def test_other_shapes_and_settings_refused(params):
    out = jax.eval_shape(lambda: LATENT.sample(params[16], KEY, conds(), steps=2, shape=(16, 32)))
    assert out["image_out"].shape == (4, 16, 32, 3) and out["image_out"].dtype == jnp.uint8
    with pytest.raises(ValueError, match="15 x 16 is no multiple of 4"):
        LATENT.latent_shape((15, 16))
    wrong = [
        (dict(solver="dimm"), "solver must be one of ddpm, ddim"), (dict(threshold="soft"), "threshold must be one of"),
        (dict(size=18), "multiple of the vae's 4"), (dict(max_steps=0), "max_steps must be in 1..1000"),
        (dict(prediction="e"), "kind must be one of"), (dict(weight={"name": "snrr"}), "name must be one of"),
        (dict(micro="all"), "micro must be none"), (dict(classifier=PIXELS.classifier), "needs classes"),
    ]  # fmt: skip
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(LATENT, **change)
    rows = PIXELS.network.label_rows
    with pytest.raises(ValueError, match=f"has {rows} labels, {rows} classes and none need {rows + 1}; give it num"):
        dataclasses.replace(PIXELS, classes=rows, drop=0.1)  # the row of none would be NaN


def test_gaussian_autoencoder_learns_to_reconstruct_and_to_keep_its_latents_small():
    """The KL is in nats per value of the picture; its weight trades the error for it."""
    tasks = {kl: Autoencode(VAE, perceptual=0.0, l2=1.0, kl=kl) for kl in (1e-6, 1.0)}
    params = jax.tree.map(jnp.asarray, draw(tasks[1.0], BATCH))
    values = {}
    for kl, task in tasks.items():
        loss = task.losses(params, Context(jnp.int32(0)), BATCH, KEY)["gen"]
        values[kl] = loss.value
        z = VAE.apply({"params": params}, image_ops.to_float(BATCH["image"]), method="encode")
        np.testing.assert_allclose(loss.metrics["kl"], z.kl().mean() / (16 * 16 * 3), rtol=1e-5)
    np.testing.assert_allclose(values[1.0] - values[1e-6], (1 - 1e-6) * loss.metrics["kl"], rtol=1e-3)
    scores = tasks[1.0].evaluate(params, [BATCH], KEY)
    assert set(scores) == {"psnr", "latent_std"} and np.isfinite(list(scores.values())).all()
