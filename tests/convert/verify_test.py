"""`verify` of the authors' files: through vgen's tables into the layout of the package that has the network."""

from pathlib import Path

import numpy as np
import pytest

from tests.convert import blip_test, mae_test, tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.config import UserError
from vgen.convert import families, formats, verify
from vgen.convert.sources import Source

pytestmark = pytest.mark.usefixtures("quick")


def source(weights, **config):
    """An open file of the authors': no config, but for numbers of heads that are not the published ones."""
    tensors = {name: formats.held(np.ascontiguousarray(value)) for name, value in weights.items()}
    return Source(Path("authors.pth"), tensors, config)


def check(source, tol=1e-4, **kwargs):
    found = verify.errors(source, **kwargs)
    assert found and all(relative < tol for _, relative in found.values()), found
    return found


@pytest.mark.parametrize(
    "name, config, outputs",
    [
        ("sam", dict(decoder_heads=4), {"logits", "iou"}),
        ("mae_authors", mae_test.GOLDEN, {"loss"}),
        ("dinov2", dict(num_heads=3), {"tokens"}),
        ("kl_autoencoder", {}, {"reconstruction", "mean", "logvar"}),
        ("vqgan", {}, {"reconstruction", "codes", "indices"}),
    ],
)
def test_files_of_the_authors(name, config, outputs):
    package = "diffusers" if name in ("kl_autoencoder", "vqgan") else "transformers"
    pytest.importorskip(package)
    assert outputs <= set(check(source(golden.load(name)["weights"], **config)))


def test_blip():
    transformers = pytest.importorskip("transformers")
    sizes = next(iter(blip_test.CONFIGS.values()))
    tokens = dict(bos_token_id=1, eos_token_id=2, sep_token_id=2, pad_token_id=0)
    config = transformers.BlipConfig(text_config=sizes["text"] | tokens, vision_config=sizes["vision"])
    state = tables.state_of(tables.randomize(transformers.BlipForConditionalGeneration(config)))
    theirs = source(blip_test.as_authors(state), vision_heads=4, heads=4)
    assert families.find(theirs) == "vgen.convert.blip:AUTHORS"
    check(theirs)


def test_a_wrong_network_is_noticed(monkeypatch):
    """Two networks are compared, not one with itself: a change of the export is found."""
    pytest.importorskip("transformers")
    export = verify.export

    def changed(where, model, params, *args, **kwargs):
        params["layers"]["mlp"]["fc1"]["kernel"] *= 1.5
        export(where, model, params, *args, **kwargs)

    monkeypatch.setattr(verify, "export", changed)
    found = verify.errors(source(golden.load("dinov2")["weights"], num_heads=3))
    assert max(relative for _, relative in found.values()) > 1e-3


def test_what_no_package_has_is_said():
    with pytest.raises(
        UserError, match="no package has a reference network for vgen.convert.clip:OPENAI, and .*HF_CLIP"
    ):
        verify.errors(source(golden.load("clip_rn")["weights"]))
    g = golden.load("blip2_qformer_lavis")["weights"]
    lavis = source({f"Qformer.{name}": value for name, value in g.items()}, heads=3)
    with pytest.raises(UserError, match="vgen.convert.qformer:LAVIS, and vgen.convert.qformer:HF cannot hold it"):
        verify.errors(lavis)
    with pytest.raises(UserError, match="no package has a reference network for vgen.convert.iresnet:ARCFACE$"):
        verify.errors(source(golden.load("arcface_iresnet")["weights"]))
    with pytest.raises(UserError, match="no package has a reference network for vgen.convert.qformer:LAVIS"):
        verify.errors(lavis, layout="vgen.convert.qformer:LAVIS")
