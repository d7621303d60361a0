"""MaskGIT's transformer in its released form: round trip, the file itself, sizes from shapes. Parity: see models."""

import jax
import numpy as np
import pytest

from tests.convert import tables
from tests.golden import golden
from vgen.convert import maskgit
from vgen.convert.formats import open_msgpack
from vgen.convert.rules import ConvertError
from vgen.models.maskgit import IMAGENET_512, MaskGIT

CODEBOOK = {"codebook": 40}


def test_round_trip(tmp_path):
    weights = golden.load("maskgit_transformer")["weights"]
    module, params = tables.check_round_trip(maskgit.MASKGIT, weights, CODEBOOK)
    assert tables.found(weights) is maskgit.MASKGIT
    bare = {k.removeprefix("params/"): v for k, v in weights.items()}
    jax.tree.map(np.testing.assert_array_equal, tables.load(maskgit.MASKGIT, bare, CODEBOOK)[1], params)
    stored = open_msgpack(tables.write_msgpack(tmp_path / "maskgit_imagenet256_checkpoint", weights))
    read = {name: array.read() for name, array in stored.items()}
    jax.tree.map(np.testing.assert_array_equal, tables.load(maskgit.MASKGIT, read, CODEBOOK)[1], params)
    ids = maskgit.MASKGIT.inputs(module, np.random.default_rng(0))["ids"]
    assert ids[:, 0].min() >= 40 and (ids == module.mask_id).any()


def test_published_sizes_from_shapes():
    made = MaskGIT(**IMAGENET_512)
    shapes, stored = tables.shapes_of(maskgit.MASKGIT, made), {}
    for rule in maskgit.table(made).rules:
        array = jax.eval_shape(lambda: np.zeros(shapes[rule.dst].shape, np.float32))
        layered = "{i}" in rule.src
        shape = rule.op.backward([np.broadcast_to(np.float32(0), array.shape[layered:])])[0].shape
        for i in range(made.depth if layered else 1):
            stored[rule.src.format(i=i)] = shape
    assert maskgit.MASKGIT.build({}, stored) == made


def test_a_table_too_small_for_the_codebook():
    weights = golden.load("maskgit_transformer")["weights"]
    with pytest.raises(ConvertError, match="46 ids.*codebook of 1024"):
        tables.load(maskgit.MASKGIT, weights)
