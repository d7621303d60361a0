"""U-Nets in the layouts of OpenAI, CompVis, Stability and ermongroup: round trips, sizes from shapes, quirks."""

import jax
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from tests.models.unet_test import FAMILIES, HEADS, shapes
from vgen.convert import unet_openai
from vgen.convert.rules import ConvertError, exported_shapes
from vgen.convert.unet_ddpm import DDPM
from vgen.convert.unet_diffusers import TEXT
from vgen.convert.unet_openai import ADM, ADM_CLASSIFIER, ADM_LEGACY, ADM_NEW_ORDER, LDM, LDM_DENOISER
from vgen.models import unet, unet_classifier
from vgen.models.unet import UNet
from vgen.models.unet_classifier import NoisedClassifier


@pytest.mark.parametrize("name, family", FAMILIES.items())
def test_round_trips(name, family):
    weights = golden.load(name)["weights"]
    assert tables.found(weights) is (ADM if name.startswith("adm") else family)
    module, _ = tables.check_round_trip(family, weights, HEADS.get(name))
    kwargs = golden.load(name)["meta"]["kwargs"]
    assert module.blocks == kwargs["num_res_blocks"]
    multipliers = kwargs.get("channel_mult", kwargs.get("ch_mult"))
    assert module.widths == tuple(32 * m for m in multipliers)


def test_round_trip_of_the_classifier():
    weights = golden.load("adm_classifier")["weights"]
    assert tables.found(weights) is ADM_CLASSIFIER
    module, _ = tables.check_round_trip(ADM_CLASSIFIER, weights, HEADS["adm_classifier"])
    assert (module.image_size, module.outputs, module.blocks, module.attention) == (32, 7, 2, (0, 1, 1))


def test_whole_checkpoints():
    """The denoiser of a file that holds the other parts, the schedule and the averages too."""
    weights = {f"model.diffusion_model.{k}": v for k, v in golden.load("sd1_ldm_unet")["weights"].items()}
    assert tables.found(weights) is LDM_DENOISER
    rest = ("first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.x", "betas", "model_ema.decay",
            "alphas_cumprod", "posterior_mean_coef1", "scale_factor", "conditioner.embedders.0.x", "logvar",
            "depth_model.model.x", "low_scale_model.betas")  # fmt: skip
    stored = weights | {k: np.zeros(1, np.float32) for k in rest}
    tables.check_round_trip(LDM_DENOISER, stored, HEADS["sd1_ldm_unet"], lost=rest)
    with pytest.raises(ConvertError, match="unread model.diffusion_model.extra.weight"):
        tables.load(LDM_DENOISER, stored | {"model.diffusion_model.extra.weight": np.zeros(1)})


@pytest.mark.parametrize("name", ["sd1_ldm_unet", "sdxl_sgm_unet"])
def test_the_two_layouts_are_one_network(name):
    """diffusers' own translation of a state dict gives the parameters that our two tables give."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    weights = golden.load(name)["weights"]
    module, params = tables.load(LDM, weights, HEADS[name])
    config = TEXT.config(module)
    if name == "sdxl_sgm_unet":  # which our config calls by what the published network has
        config |= dict(class_embed_type=None, num_class_embeds=None)
    state = {f"model.diffusion_model.{k}": torch.from_numpy(v) for k, v in weights.items()}
    translated = single_file.convert_ldm_unet_checkpoint(state, config)
    translated = {k: v.numpy() for k, v in translated.items()}
    jax.tree.map(np.testing.assert_array_equal, params, tables.load(TEXT, translated, config)[1])


def test_orders_of_the_fused_projection():
    """They disagree, the released 64 x 64 network alone has the new one, and each undoes itself."""
    weights = golden.load("adm_unet_new_order")["weights"]
    (_, new), (_, old), (_, auto) = (
        tables.load(family, weights, HEADS["adm_unet_new_order"]) for family in (ADM_NEW_ORDER, ADM_LEGACY, ADM)
    )
    q = lambda params: params["mid"]["attn_0"]["q"]["kernel"]
    qkv = weights["middle_block.1.qkv.weight"][:, :, 0]
    np.testing.assert_array_equal(q(new), qkv[: len(qkv) // 3].T)
    np.testing.assert_array_equal(q(old)[:, :32], qkv[:32].T)
    np.testing.assert_array_equal(q(old)[:, 32:64], qkv[96:128].T)
    np.testing.assert_array_equal(q(auto), q(old))
    source = {r.src: r for r in ADM.table(UNet(**unet.ADM_64)).rules}["middle_block.1.qkv.bias"]
    bias = np.arange(3 * 768)
    np.testing.assert_array_equal(source.op.forward([bias])[0], bias[:768])


SIZES = {name: LDM for name in ("SD1", "SD2", "SDXL", "SDXL_REFINER", "X4_UPSCALER")} | {
    name: ADM for name in ("ADM_64", "ADM_128", "ADM_256", "ADM_512", "ADM_64_TO_256", "ADM_128_TO_512")
}


def published(family, module):
    """{name: shape} of a published network's checkpoint."""
    flat = {
        "/".join(p.key for p in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(shapes(module))[0]
    }
    return exported_shapes(flat, family.table(module))


@pytest.mark.slow
@pytest.mark.parametrize("name, family", SIZES.items())
def test_published_networks_from_their_shapes(name, family):
    """Sizes, heads and all: from names and shapes alone comes the network that they belong to."""
    module = UNet(**getattr(unet, name))
    built = family.build({}, published(family, module))
    heads = [[net.heads_at(i) for i in range(len(net.widths))] for net in (built, module)]
    assert heads[0] == heads[1]
    assert built == module.clone(heads=built.heads, head_dim=built.head_dim, dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ADM_64", "ADM_128", "ADM_256", "ADM_512"])
def test_published_classifiers_from_their_shapes(name):
    module = NoisedClassifier(**getattr(unet_classifier, name))
    assert ADM_CLASSIFIER.build({}, published(ADM_CLASSIFIER, module)) == module


def test_other_files_are_refused():
    with pytest.raises(ConvertError, match="not in OpenAI's layout"):
        unet_openai.sizes({"conv_in.weight": (3, 3, 3, 3)})
    sizes = {k: v.shape for k, v in golden.load("adm_unet_legacy")["weights"].items()}
    sizes["input_blocks.2.1.qkv.weight"] = (9, 3, 1)
    with pytest.raises(ConvertError, match="do not fall into levels"):
        unet_openai.sizes(sizes)
    sizes = {k: v.shape for k, v in golden.load("ddpm_unet")["weights"].items()}
    with pytest.raises(ConvertError, match="only levels resampled by convolutions"):
        DDPM.build({}, {k: v for k, v in sizes.items() if "downsample" not in k})
