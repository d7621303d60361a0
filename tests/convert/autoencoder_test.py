"""The KL autoencoder's layouts: parity with diffusers, gradients, round trips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.autoencoder import DIFFUSERS_KL, FIRST_STAGE_KL, LDM_KL
from vgen.convert.rules import ConvertError

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = {
    "f4": dict(
        block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ),
    "f2 with attention, no 1x1 convolutions, 5 channels": dict(
        block_out_channels=(12, 24), norm_num_groups=6, layers_per_block=2, latent_channels=3, in_channels=5,
        out_channels=5, down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"), use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=False, scaling_factor=1.5, shift_factor=0.06,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    diffusers = pytest.importorskip("diffusers")
    return tables.randomize(diffusers.AutoencoderKL(**CONFIGS[request.param]))


def check(family, module, params, model, tol, dtype):
    inputs = family.inputs(module, np.random.default_rng(1))
    want = family.compare(model, inputs)
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    got = family.outputs(jax.jit(module.apply)({"params": params}, **{k: v.astype(dtype) for k, v in inputs.items()}))
    errors = {name: tables.error(got[name], value) for name, value in want.items()}
    assert set(got) == set(want) and max(errors.values()) < tol, errors
    moved = family.compare(model, {"images": inputs["images"] + 0.1})
    assert all(tables.error(moved[name], value) > 1e-3 for name, value in want.items())


def test_against_diffusers(x64, reference):
    module, params = tables.load(DIFFUSERS_KL, tables.state_of(reference), reference.config)
    check(DIFFUSERS_KL, module, params, reference, 1e-9, np.float64)


def test_against_diffusers_in_float32(reference):
    module, params = tables.load(DIFFUSERS_KL, tables.state_of(reference), reference.config)
    check(DIFFUSERS_KL, module, params, reference, 2e-5, np.float32)


def test_gradients_against_diffusers(x64, reference):
    """Of a reconstruction loss plus the KL term, for every parameter, with the noise of the draw given."""
    import torch

    if not reference.config.use_quant_conv:
        pytest.skip("one is enough: the same layers, and the VQGAN's test has levels with attention")
    module, params = tables.load(DIFFUSERS_KL, tables.state_of(reference), reference.config)
    x = DIFFUSERS_KL.inputs(module, np.random.default_rng(1))["images"].astype(np.float64)
    noise = np.random.default_rng(2).standard_normal((2, 4, 6, module.latent_channels))

    def loss(params, x):
        posterior = module.apply({"params": params}, x, method="encode")
        z = posterior.mean + jnp.exp(posterior.logvar / 2) * noise
        recon = module.apply({"params": params}, z, method="decode")
        return jnp.square(recon - x).mean() + 1e-3 * posterior.kl().mean()

    value, (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(tables.float64(params), x)
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    posterior = reference.encode(torch_x).latent_dist
    z = posterior.mean + posterior.std * torch.from_numpy(noise.transpose(0, 3, 1, 2))
    want = (reference.decode(z).sample - torch_x).square().mean() + 1e-3 * posterior.kl().mean()
    reference.zero_grad()
    want.backward()
    assert abs(float(value) / want.item() - 1) < 1e-10
    got = tables.export(DIFFUSERS_KL, module, jax.tree.map(np.asarray, grads))
    tables.check_gradients(got, reference, 1e-8, zero=("to_k.bias",))
    assert tables.error(grad_x.transpose(0, 3, 1, 2), torch_x.grad) < 1e-8


def test_round_trip_through_a_folder(reference, tmp_path):
    again = tables.check_folder(DIFFUSERS_KL, reference, tmp_path)
    kept = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "use_quant_conv")
    assert all(again.config[k] == reference.config[k] for k in kept)


def test_old_attention_names():
    """Files of Stable Diffusion 1 call the projections query, key, value and proj_attn."""
    diffusers = pytest.importorskip("diffusers")
    state = tables.state_of(tables.randomize(diffusers.AutoencoderKL(**CONFIGS["f4"])))
    config = CONFIGS["f4"]
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    old = dict(state)
    for new, before in names:
        old = {k.replace(f"attentions.0.{new}.", f"attentions.0.{before}."): v for k, v in old.items()}
    assert len(set(old) - set(state)) == 16
    got, want = (tables.load(DIFFUSERS_KL, x, config)[1] for x in (old, state))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_compvis_round_trips():
    weights = golden.load("kl_autoencoder")["weights"]
    assert tables.found(weights) is LDM_KL
    tables.check_round_trip(LDM_KL, weights | {"loss.logvar": np.zeros(1)}, lost={"loss.logvar"})
    whole = {f"first_stage_model.{k}": v for k, v in weights.items()}
    assert tables.found(whole) is FIRST_STAGE_KL
    rest = ("model.diffusion_model.out.0.weight", "cond_stage_model.transformer.x", "betas", "alphas_cumprod_prev",
            "sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod", "posterior_mean_coef1", "model_ema.decay",
            "first_stage_model.loss.logvar", "scale_factor")  # fmt: skip
    tables.check_round_trip(FIRST_STAGE_KL, whole | {k: np.zeros(1, np.float32) for k in rest}, lost=rest)
    with pytest.raises(ConvertError, match="unread first_stage_model.extra.weight"):
        tables.load(FIRST_STAGE_KL, whole | {"first_stage_model.extra.weight": np.zeros(1)})


def test_the_two_layouts_are_one_network():
    """diffusers' own translation of a CompVis state dict gives the parameters that our two tables give."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    weights = golden.load("kl_autoencoder")["weights"]
    config = DIFFUSERS_KL.config(LDM_KL.build({}, {k: v.shape for k, v in weights.items()}))
    state = {f"first_stage_model.{k}": torch.from_numpy(v) for k, v in weights.items()}
    translated = single_file.convert_ldm_vae_checkpoint(state, config)
    translated = {k: v.numpy() for k, v in translated.items()}
    jax.tree.map(
        np.testing.assert_array_equal, tables.load(LDM_KL, weights)[1], tables.load(DIFFUSERS_KL, translated, config)[1]
    )


def test_unknown_configurations_are_refused():
    for wrong, message in (
        (dict(act_fn="gelu"), "act_fn"),
        (dict(down_block_types=("DownBlock2D",) * 3), "down_block_types"),
        (
            dict(up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")),
            "levels with attention",
        ),
        (dict(block_out_channels=(16, 24, 32)), "multiples"),
    ):
        with pytest.raises(ConvertError, match=message):
            DIFFUSERS_KL.build(CONFIGS["f4"] | wrong, {})
