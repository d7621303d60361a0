"""LoRA of the U-Net in diffusers' and kohya's form: attention, gated MLPs, convolutions; published sizes."""

import json
import re
import warnings

import jax
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.convert.unet_diffusers_test import cast, exact, torch_unet  # noqa: F401  exact is a fixture
from vgen.adapt import lora as adapt
from vgen.adapt.lora import count, factors, lora
from vgen.convert import families, formats
from vgen.convert.lora import Part, sites
from vgen.convert.lora_files import DIFFUSERS_FILE, read_diffusers, write_diffusers
from vgen.models import unet

pytestmark = pytest.mark.usefixtures("quick")
merge = jax.jit(adapt.merge)
UNET = "vgen.convert.unet_diffusers:TEXT"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LCM = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
       "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]  # of LCM-LoRA (arXiv:2311.05556)  # fmt: skip


def network(name):
    """(torch model, vgen's part, params) of a tiny U-Net, float64."""
    family, model = torch_unet(name)
    module, params = tables.load(family, tables.state_of(model), model.config)
    return model, Part(module, UNET), tables.float64(params)


def run(part, params):
    given = families.get(UNET).inputs(part.model, np.random.default_rng(1))
    return tables.applied(part.model, params, cast(given, np.float64))


def theirs(part, model):
    family = families.get(UNET)
    return family.compare(model, family.inputs(part.model, np.random.default_rng(1)))["y"]


def check_reads(model, folder):
    """diffusers' U-Net with the LoRA of a folder; what it misses or does not expect is a warning in its log."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders import peft as log
    from diffusers.utils import peft_utils

    said = []
    for module in (log, peft_utils):
        module.logger.warning, module.logger.warning_before = said.append, module.logger.warning
    try:
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(folder, return_lora_metadata=True)
        model.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    finally:
        for module in (log, peft_utils):
            module.logger.warning = module.logger.warning_before
    assert not said
    return model.double().eval()


def adapted(model, rng, **settings):
    """The U-Net with PEFT's LoRA in it, every factor drawn anew."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(config := peft.LoraConfig(**settings))
    model.double().eval()
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(p.new_tensor(np.float32(rng.standard_normal(tuple(p.shape)) / p[0].numel() ** 0.5)))
    return config


@pytest.mark.parametrize("name, targets", [("sd1", LCM), ("sdxl", [*ATTENTION, "ff.net.0.proj", "proj_in"])])
def test_diffusers_in_and_out(x64, exact, name, targets, tmp_path):  # noqa: F811
    model, part, params = network(name)
    settings = dict(r=3, lora_alpha=5, target_modules=targets, alpha_pattern={"to_q": 2}, rank_pattern={"to_v": 2})
    config = adapted(model, np.random.default_rng(7), **settings)
    want = theirs(part, model)
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    held = {key: value.contiguous() for key, value in get_peft_model_state_dict(model).items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "in", unet_lora_layers=held,
        unet_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )  # fmt: skip
    delta = read_diffusers(tmp_path / "in", {"unet": part, "text_encoder": part})["unet"]
    changed = merge(params, delta)
    assert tables.error(run(part, changed), want) < 1e-9
    assert tables.error(run(part, params), want) > 1e-2

    write_diffusers(tmp_path / "out", {"unet": (part, delta)})
    stored, again = (formats.open_safetensors(tmp_path / x / DIFFUSERS_FILE) for x in ("in", "out"))
    assert set(stored) == set(again)
    for key, tensor in stored.items():
        if "lora_A" in key:
            np.testing.assert_array_equal(again[key].read(), tensor.read(), err_msg=key)
    fresh, _, _ = network(name)
    assert tables.error(theirs(part, check_reads(fresh, tmp_path / "out")), want) < 1e-9


def test_ours_out(x64, exact, tmp_path):  # noqa: F811
    """Every kernel of the U-Net with factors of its own: the two of a gated MLP lie side by side there."""
    model, part, params = network("sd1")
    rng = np.random.default_rng(0)
    adapter = lora(r"(down|mid|up).*/(attn|cross|mlp|proj_in|proj_out|conv.|time|shortcut|resample).*kernel", 2)
    delta = jax.tree.map(
        lambda x: rng.standard_normal(x.shape) / max(x.size, 1) ** 0.5 if x.ndim > 1 else np.asarray(x),
        adapter.init(jax.random.key(0), params),
    )
    write_diffusers(tmp_path, {"unet": (part, delta)})
    stored = formats.open_safetensors(tmp_path / DIFFUSERS_FILE)
    ranks = {name: x.shape[0] for name, x in stored.items() if "lora_A" in name}
    assert {n for name, n in ranks.items() if ".ff.net.0.proj." in name} == {4}
    assert {n for name, n in ranks.items() if ".ff.net.0.proj." not in name} == {2}
    want = run(part, merge(params, delta))
    assert tables.error(theirs(part, check_reads(model, tmp_path)), want) < 1e-9
    assert tables.error(run(part, params), want) > 1e-2


def test_kohya(x64, exact, tmp_path):  # noqa: F811
    """Dots are underscores in kohya's names, and every module has an alpha; diffusers reads the same file."""
    model, part, params = network("sd1")
    rng, held = np.random.default_rng(0), {}
    state = {name.removesuffix(".weight"): tuple(x.shape) for name, x in model.state_dict().items()}
    for module, shape in state.items():
        if re.search(r"attentions.*(attn\d\.to_[qkv]|to_out\.0|proj_in|ff\.net\.0\.proj)$", module):
            at, one = "lora_unet_" + module.replace(".", "_"), (1, 1) if len(shape) == 4 else ()
            held[f"{at}.lora_down.weight"] = rng.standard_normal((2, shape[1], *one)) / 4
            held[f"{at}.lora_up.weight"] = rng.standard_normal((shape[0], 2, *one)) / 4
            held[f"{at}.alpha"] = np.array(1.5)
    formats.write_safetensors(tmp_path / "kohya.safetensors", held)
    delta = read_diffusers(tmp_path / "kohya.safetensors", {"lora_unet": part, "lora_te": part})["lora_unet"]
    assert {float(s) for x in factors(delta).values() for s in np.ravel(x["scale"])} == {0.75}
    got = run(part, merge(params, delta))
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
        tmp_path, weight_name="kohya.safetensors", unet_config=None
    )
    model.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    assert tables.error(got, theirs(part, model.double().eval())) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("rank, targets, wanted", [(4, ATTENTION, 797_184), (64, ATTENTION, 12_754_944),
                                                   (64, LCM, 67_252_224)])  # fmt: skip
def test_published_sizes(rank, targets, wanted):
    """LoRA of Stable Diffusion 1's attention, and LCM-LoRA, counted as diffusers keeps them."""
    found, _, shapes = sites(Part(unet.UNet(**unet.SD1), UNET))
    total = 0
    for module, site in found.items():
        if any(module.endswith("." + target) for target in targets):
            kernels = [shapes[path].shape[site.row is not None :] for path in site.paths]
            total += rank * (int(np.prod(kernels[0][:-1])) + sum(kernel[-1] for kernel in kernels))
    assert total == wanted


def test_published_size_of_a_delta():
    model = unet.UNet(**unet.SD1)
    family = families.get(UNET)
    inputs = family.inputs(model, np.random.default_rng(0))
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    adapter = lora(r".*/(attn|cross)/(q|k|v|out)/kernel", 4)
    assert count(jax.eval_shape(lambda key: adapter.init(key, shapes), jax.random.key(0))) == 797_184
