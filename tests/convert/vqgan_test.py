"""Tokenizer layouts: diffusers' VQModel by parity, gradients and a folder; taming's, open-muse's, MaskGIT's by bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.convert.rules import ConvertError
from vgen.convert.vqgan import DIFFUSERS_VQ, LDM_VQ, MASKGIT_VQ, OPENMUSE_MASKGIT_VQ, TAMING_VQ
from vgen.models.vqgan import VQGAN

pytestmark = pytest.mark.usefixtures("quick")

CONFIGS = {
    "attention": dict(
        block_out_channels=(12, 24), norm_num_groups=6, layers_per_block=1, latent_channels=5, vq_embed_dim=4,
        num_vq_embeddings=19, down_block_types=("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    ),
    "as aMUSEd": dict(
        block_out_channels=(8, 16, 24), norm_num_groups=4, layers_per_block=1, latent_channels=6, num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, lookup_from_codebook=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def reference(request):
    diffusers = pytest.importorskip("diffusers")
    return tables.randomize(diffusers.VQModel(**CONFIGS[request.param]))


def imported(reference):
    return tables.load(DIFFUSERS_VQ, tables.state_of(reference), reference.config)


@pytest.mark.parametrize("dtype, tol", [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_against_diffusers(x64, reference, dtype, tol):
    module, params = imported(reference)
    inputs = DIFFUSERS_VQ.inputs(module, np.random.default_rng(1))
    want = DIFFUSERS_VQ.compare(reference, inputs)
    params = jax.tree.map(lambda a: np.asarray(a, dtype), params)
    got = DIFFUSERS_VQ.outputs(jax.jit(module.apply)({"params": params}, inputs["images"].astype(dtype)))
    assert got["reconstruction"].dtype == dtype and set(got) == set(want)
    np.testing.assert_array_equal(got["indices"], want["indices"])
    assert len(np.unique(want["indices"])) > 4
    errors = {name: tables.error(got[name], want[name]) for name in ("reconstruction", "codes")}
    assert max(errors.values()) < tol, errors
    moved = DIFFUSERS_VQ.compare(reference, {"images": inputs["images"] + 0.1})
    assert tables.error(moved["reconstruction"], want["reconstruction"]) > 1e-3


def test_gradients_against_diffusers(x64, reference):
    """Of reconstruction and quantiser losses, straight through the quantiser, for every parameter and the image."""
    import torch

    if reference.config.lookup_from_codebook:
        pytest.skip("one configuration is enough: the other has no layer that this lacks")
    module, params = imported(reference)
    x = DIFFUSERS_VQ.inputs(module, np.random.default_rng(1))["images"].astype(np.float64)

    def loss(params, x):
        recon, quantized = module.apply({"params": params}, x)
        return jnp.square(recon - x).mean() + sum(quantized.losses.values())

    value, (grads, grad_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(tables.float64(params), x)
    torch_x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    z_q, quantizer_loss, _ = reference.quantize(reference.encode(torch_x).latents)
    recon = reference.decoder(reference.post_quant_conv(z_q))
    want = (recon - torch_x).square().mean() + quantizer_loss
    reference.zero_grad()
    want.backward()
    assert abs(float(value) / want.item() - 1) < 1e-10
    got = tables.export(DIFFUSERS_VQ, module, jax.tree.map(np.asarray, grads))
    tables.check_gradients(got, reference, 1e-8, zero=("to_k.bias",))
    assert tables.error(grad_x.transpose(0, 3, 1, 2), torch_x.grad) < 1e-8


def test_round_trip_through_a_folder(reference, tmp_path):
    tables.check_folder(DIFFUSERS_VQ, reference, tmp_path)


def test_amused_size():
    """The published tokenizer of aMUSEd, by its config.json."""
    config = dict(
        block_out_channels=[128, 256, 256, 512, 768], layers_per_block=2, latent_channels=64, num_vq_embeddings=8192,
        vq_embed_dim=64, mid_block_add_attention=False, lookup_from_codebook=True, norm_num_groups=32,
    )  # fmt: skip
    module = DIFFUSERS_VQ.build(config, {})
    assert (module.downsampling, module.num_codes, module.image_range) == (16, 8192, (0.0, 1.0))
    count = sum(a.size for a in tables.shapes_of(DIFFUSERS_VQ, module).values())
    assert count == 146_244_675  # as diffusers counts this configuration


def test_what_diffusers_has_and_the_network_not_is_refused():
    with pytest.raises(ConvertError, match="norm_type.*spatial"):
        DIFFUSERS_VQ.build(CONFIGS["attention"] | {"norm_type": "spatial"}, {})


# --------------------------------------------------------------------------------------- layouts that have no package


def test_taming_round_trips():
    weights = golden.load("vqgan")["weights"]
    module, _ = tables.check_round_trip(TAMING_VQ, weights)
    assert tables.found(weights) is TAMING_VQ
    lost = {"loss.discriminator.main.0.weight": np.zeros((1, 3, 4, 4), np.float32)}
    tables.check_round_trip(TAMING_VQ, weights | lost, lost=lost)
    inside = {f"first_stage_model.{k}": v for k, v in weights.items()}
    assert tables.found(inside) is LDM_VQ
    rest = {"model.diffusion_model.out.2.bias": np.zeros(1, np.float32), "posterior_variance": np.zeros(1, np.float32)}
    assert tables.check_round_trip(LDM_VQ, inside | rest, lost=rest)[0] == module
    # the middle of the decoder, upside down
    wrong = {k.replace("decoder.up.0", "decoder.up.7"): v for k, v in weights.items()}
    with pytest.raises(ConvertError, match="unfilled decoder/up_0/block_0/conv1/kernel"):
        tables.load(TAMING_VQ, wrong)


def test_openmuse_round_trip():
    weights = golden.load("maskgit_vqgan_openmuse")["weights"]
    module, _ = tables.check_round_trip(OPENMUSE_MASKGIT_VQ, weights)
    config = OPENMUSE_MASKGIT_VQ.config(module)
    assert tables.found(weights) is tables.found({}, config) is OPENMUSE_MASKGIT_VQ
    kwargs = golden.load("maskgit_vqgan_openmuse")["meta"]["kwargs"] | {"resolution": 256}
    assert {k: config[k] for k in kwargs} == kwargs


@pytest.mark.parametrize("case", ["maskgit_vqvae", "maskgit_vqvae_train"])
def test_maskgit_round_trip(case, tmp_path):
    from vgen.convert.formats import open_msgpack

    weights = golden.load(case)["weights"]
    module, params = tables.check_round_trip(MASKGIT_VQ, weights)
    assert tables.found(weights) is MASKGIT_VQ
    bare = {k.removeprefix("params/"): v for k, v in weights.items()}  # saved without the name of its collection
    again, same = tables.load(MASKGIT_VQ, bare)
    assert again == module
    jax.tree.map(np.testing.assert_array_equal, same, params)
    stored = open_msgpack(tables.write_msgpack(tmp_path / "tokenizer_imagenet256_checkpoint", weights))
    assert set(stored) == set(weights)
    np.testing.assert_array_equal(
        stored["params/decoder/Conv_1/kernel"].read(), weights["params/decoder/Conv_1/kernel"]
    )


def test_maskgit_sizes_from_shapes():
    """The published tokenizer's tree, two blocks a level, is recognised from its shapes alone."""
    made = VQGAN(num_codes=1024, image_range=(0.0, 1.0), entropy_weight=0.1)
    shapes = tables.shapes_of(MASKGIT_VQ, made)
    names = {rule.dst: rule.src for rule in MASKGIT_VQ.table(made).rules}
    assert MASKGIT_VQ.build({}, {names[path]: a.shape for path, a in shapes.items()}).clone(layout="maskgit") == made


def test_config_is_json():
    for config in CONFIGS.values():
        module = DIFFUSERS_VQ.build(config, {})
        assert DIFFUSERS_VQ.build(json.loads(json.dumps(DIFFUSERS_VQ.config(module))), {}) == module
