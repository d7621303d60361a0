"""taming's transformer as it lies in a Net2Net checkpoint: round trip, alone, and found beside its VQ-GAN."""

import jax
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from vgen.convert.gpt import TAMING
from vgen.convert.rules import ConvertError
from vgen.models.gpt import GPT

CONFIG = dict(heads=4, unmasked=5, grid=(4, 5), classes=7)


def stored():
    """The golden weights under the names of a Lightning checkpoint, with the tables that code computes itself."""
    weights = {f"transformer.{name}": array for name, array in golden.load("mingpt")["weights"].items()}
    beside = ("first_stage_model.quantize.embedding.weight", "first_stage_model.encoder.down.0.block.0.conv1.weight")
    beside += ("first_stage_model.loss.logvar", "cond_stage_model.embedding.weight", "permuter.forward_shuffle_idx")
    return weights, {name: np.zeros((2, 2), np.float32) for name in beside}


def test_round_trip():
    weights, beside = stored()
    lost = {name for name in weights if name.endswith("attn.mask")} | set(beside)
    assert len(lost) == 3 + len(beside)
    module, params = tables.check_round_trip(TAMING, weights | beside, CONFIG, lost)
    assert module == GPT(
        vocab=50,
        grid=(4, 5),
        depth=3,
        width=36,
        heads=4,
        mlp_dim=144,
        classes=7,
        own_start=False,
        length=20,
        unmasked=5,
    )
    assert tables.found(weights | beside) is TAMING
    bare = golden.load("mingpt")["weights"]
    assert tables.found(bare) is TAMING
    jax.tree.map(np.testing.assert_array_equal, tables.load(TAMING, bare, CONFIG)[1], params)
    assert set(TAMING.inputs(module, np.random.default_rng(0))) == {"ids", "label"}


def test_what_shapes_tell_and_do_not():
    weights = {name: array.shape for name, array in stored()[0].items()}
    plain = TAMING.build({}, weights | {"transformer.pos_emb": (1, 17, 36)})
    assert (plain.grid, plain.heads, plain.classes, plain.length) == ((4, 4), 16, None, 17)
    with pytest.raises(ConvertError, match="no transformer.pos_emb"):
        TAMING.build({}, {"blocks.0.attn.key.weight": (4, 4)})
