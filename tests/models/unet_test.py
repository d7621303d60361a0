"""The U-Nets: the authors' numbers, published sizes, the size of the program, and what is refused."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.convert import tables
from tests.convert.tables import quick  # noqa: F401  a fixture
from tests.golden import golden
from vgen.bench.compile import equations
from vgen.convert.unet_ddpm import DDPM
from vgen.convert.unet_openai import ADM_CLASSIFIER, ADM_LEGACY, ADM_NEW_ORDER, LDM
from vgen.models import unet, unet_classifier
from vgen.models.unet import UNet
from vgen.models.unet_blocks import Given, Level
from vgen.models.unet_classifier import NoisedClassifier

pytestmark = pytest.mark.usefixtures("quick")
TOL = 1e-9
HEADS = {
    "adm_unet_legacy": dict(num_head_channels=16),
    "adm_unet_new_order": dict(num_head_channels=32),
    "adm_classifier": dict(num_head_channels=16),
    "sdxl_sgm_unet": dict(num_head_channels=16),
    "sd1_ldm_unet": dict(num_heads=4),
}
FAMILIES = dict(
    ddpm_unet=DDPM, adm_unet_legacy=ADM_LEGACY, adm_unet_new_order=ADM_NEW_ORDER, sd1_ldm_unet=LDM, sdxl_sgm_unet=LDM
)  # fmt: skip


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def given(g, dtype=np.float64):
    """The golden inputs under the names of `UNet`."""
    have = {k: np.asarray(v, dtype if v.dtype.kind == "f" else v.dtype) for k, v in g["inputs"].items()}
    made = dict(x=have["x"].transpose(0, 2, 3, 1), t=have["timesteps" if "timesteps" in have else "t"])
    if "context" in have:
        made["context"] = have["context"]
    if "y" in have and have["y"].ndim == 2:  # of SDXL: text and sizes together, embedded already
        made["added"] = (have["y"], np.zeros((2, 0), dtype))
    elif "y" in have:
        made["labels"] = have["y"]
    return made


def load(name):
    """(golden file, module, params, {the authors' name of a place: our path})."""
    g = golden.load(name)
    model, params = tables.load(FAMILIES[name], g["weights"], HEADS.get(name))
    first = "down_0" if "attn_0" in params["down_0"] else "down_0/block_0"  # theirs holds the attention too
    places = {"conv_in": "stem", "mid": "middle", "added": "label", first: "block1"}
    return g, model, params, {k: v for k, v in places.items() if v in g["mid"] and k != "down_0"}


@pytest.mark.parametrize("name", FAMILIES)
def test_golden(x64, name):
    g, model, params, places = load(name)

    @jax.jit
    def run(params, inputs):
        keep = lambda module, _: "/".join(module.path) in places
        return model.apply({"params": params}, **inputs, mutable=["intermediates"], capture_intermediates=keep)

    y, seen = run(tables.float64(params), given(g))
    golden.check(g, "y", nchw(y), TOL)
    for path, key in places.items():
        value = seen["intermediates"]
        for part in path.split("/"):
            value = value[part]
        value = value["__call__"][0]
        value = value[0] if key == "middle" else value
        golden.check(g, key, nchw(value) if value.ndim == 4 else value, TOL)
    assert {"stem", "middle"} <= set(places.values())


def test_golden_in_float32():
    g, model, params, _ = load("sdxl_sgm_unet")
    golden.check(g, "y", nchw(jax.jit(model.apply)({"params": params}, **given(g, np.float32))), 2e-5)


def test_golden_classifier_and_its_gradient(x64):
    g = golden.load("adm_classifier")
    model, params = tables.load(ADM_CLASSIFIER, g["weights"], HEADS["adm_classifier"])
    inputs = given(g)
    labels = inputs.pop("labels")

    @jax.jit
    def run(params, x, t):
        def score(x):
            logits = model.apply({"params": params}, x, t)
            return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).sum(), logits

        return jax.grad(score, has_aux=True)(x)

    grad, logits = run(tables.float64(params), **inputs)
    golden.check(g, "logits", logits, TOL)
    golden.check(g, "grad", nchw(grad), TOL)
    with pytest.raises(ValueError, match="must be 32 pixels"):
        jax.eval_shape(model.apply, {"params": params}, jnp.zeros((1, 64, 64, 3)), jnp.zeros(1))


# --------------------------------------------------------------------------------------------------- published networks


def hollow(model, batch=2, side=None):
    """Hollow inputs of a published network."""
    spec = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *s), dtype)
    side = side or getattr(model, "image_size", 2 * model.downsampling)
    made = dict(x=spec(side, side, model.in_channels), t=spec(dtype=jnp.int32))
    if model.context_dim:
        made["context"] = spec(77, model.context_dim)
    if model.num_classes:
        made["labels"] = spec(dtype=jnp.int32)
    if model.added_dim:
        made["added"] = (spec(1280), spec((model.added_dim - 1280) // 256))
    return made


@functools.cache
def shapes(model):
    """The parameters of a published network, as shapes."""
    return jax.eval_shape(lambda i: model.init(jax.random.key(0), **i)["params"], hollow(model))


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)))


@pytest.mark.parametrize("name, wanted", [
    ("DDPM_CIFAR10", 35_746_307), ("DDPM_256", 113_673_219),
    ("ADM_64", 295_904_454), ("ADM_128", 421_529_606), ("ADM_256", 553_838_086), ("ADM_512", 558_997_638),
    ("ADM_64_TO_256", 311_795_910), ("ADM_128_TO_512", 308_835_270),
    ("SD1", 859_520_964), ("SD2", 865_910_724), ("SDXL", 2_567_463_684), ("SDXL_REFINER", 2_259_526_660),
    ("X4_UPSCALER", 473_398_020),
])  # fmt: skip
def test_published_sizes(name, wanted):
    assert count(UNet(**getattr(unet, name))) == wanted


def test_published_sizes_of_variants():
    assert count(UNet(**unet.ADM_256 | dict(num_classes=None))) == 552_814_086
    assert count(UNet(**unet.SD1 | dict(in_channels=9))) == 859_535_364
    ddpm = dict(unet.DDPM_CIFAR10, widths=(128, 256, 256, 256, 512), attention=(0, 0, 1, 0, 0))
    assert count(UNet(**ddpm)) == 78_700_803  # CelebA at 64 x 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wanted", [("ADM_64", 65_438_568), ("ADM_128", 42_568_040), ("ADM_256", 54_096_360), ("ADM_512", 54_448_360)]
)
def test_published_sizes_of_classifiers(name, wanted):
    model = NoisedClassifier(**getattr(unet_classifier, name))
    assert count(model) == wanted


def test_the_program_is_small():
    """SD 1.5's forward; diffusers' Flax network was 21,047 lines of program and compiled for four minutes."""
    model = UNet(**unet.SD1)
    run = lambda params, inputs: model.apply({"params": params}, **inputs)
    program = jax.make_jaxpr(run)(shapes(model), hollow(model, side=64))
    assert 2_000 < equations(program.jaxpr) <= 8_000


# ------------------------------------------------------------------------------------------------------ a small network

TINY = dict(widths=(8, 8), blocks=1, attention=(0, 2), heads=2, context_dim=6, groups=4, dropout=0.3)
ONE_LEVEL = dict(widths=(8,), attention=(2,))


def small(**kwargs):
    """(module, parameters, inputs)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    inputs = dict(x=normal(2, 4, 4, 4), t=jnp.asarray([3, 500]), context=normal(2, 3, 6))
    model = UNet(**TINY | kwargs)
    return model, {"params": jax.tree.map(jnp.asarray, tables.draw(model, **inputs))}, inputs


@pytest.fixture(scope="module")
def tiny():
    """(module, parameters, inputs, output)."""
    model, params, inputs = small()
    return model, params, inputs, jax.jit(model.apply)(params, **inputs)


def test_starts_at_zero():
    model, _, inputs = small(**ONE_LEVEL)

    @jax.jit
    def start(key):
        params = model.init(key, **inputs)["params"]
        level = params["down_0"]
        last = [params["conv_out"], level["block_0"]["conv2"], level["attn_0"]["proj_out"]]
        return [x["kernel"] for x in last], level["block_0"]["conv1"]["kernel"]

    zero, other = start(jax.random.key(0))
    assert not any(np.any(x) for x in zero) and np.all(other)


def test_time_may_be_a_float_and_one_for_all(tiny):
    model, params, inputs, y = tiny
    got = jax.jit(model.apply)(params, **inputs | dict(t=jnp.asarray(500.0)))
    np.testing.assert_allclose(got[1], y[1], rtol=1e-5, atol=1e-5)
    assert tables.error(got[0], y[0]) > 1e-3


def test_recomputation():
    """It changes no gradient."""
    rng = np.random.default_rng(0)
    x, emb, text = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 4, 4, 8), (2, 5), (2, 3, 6)))
    level = Level(8, (True,), dict(groups=4), dict(groups=4, heads=2, depth=2))
    start = types.SimpleNamespace(init=lambda key: level.init(key, x, Given(emb, text)))
    params = {"params": jax.tree.map(jnp.asarray, tables.draw(start))}

    def grad(remat):
        run = lambda p, x: level.clone(remat=remat).apply(p, x, Given(emb, text))[0]
        return jax.grad(lambda p: jnp.square(run(p, x)).mean())

    want, got = jax.jit(grad("none"))(params), jax.jit(grad("full"))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)
    found = [str(jax.make_jaxpr(grad(kind))(params)).count("remat2[") for kind in ("none", "full")]
    assert found[0] == 0 and found[1] >= 2  # of the residual block and of the stack
    with pytest.raises(ValueError, match="must be 'none', 'full', 'dots'"):
        jax.eval_shape(grad("some"), params)


def test_half_precision(tiny):
    """bfloat16 gives float32 back, near enough."""
    model, params, inputs, y = tiny
    half = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(params, **inputs)
    assert half.dtype == jnp.float32 and 1e-4 < tables.error(half, y) < 0.1


def test_dropout_is_for_training():
    model, params, inputs = small(**ONE_LEVEL)
    run = jax.jit(lambda key: model.apply(params, **inputs, train=True, rngs={"dropout": key}))
    a, b = map(run, jax.random.split(jax.random.key(0)))
    assert tables.error(a, b) > 1e-2


def test_named_contexts(tiny):
    """Keys and values of their own in every cross-attention; with strength 0 they change nothing, and it is traced."""
    model, params, inputs, _ = tiny
    tokens = jax.random.normal(jax.random.key(1), (2, 5, 9))
    contexts = dict(ip=(tokens, None, 0.5))
    wide = {"params": tables.draw(model, **inputs, contexts=contexts)}
    names = lambda p: {jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_flatten_with_path(p)[0]}
    new = names(wide) - names(params)
    assert len(new) == 2 * 4 and all("['cross']['" in k and "_ip']['kernel']" in k for k in new)
    run = jax.jit(lambda p, s, tokens: model.apply(p, **inputs, contexts=dict(ip=(tokens, None, s))))
    assert tables.error(run(wide, 0.5, tokens), run(wide, 0.0, tokens)) > 1e-3
    np.testing.assert_allclose(run(wide, 0.0, tokens), run(wide, 0.0, 2 * tokens), atol=1e-6)
    assert run._cache_size() == 1


@pytest.mark.parametrize("wrong, changed, message", [
    (dict(), dict(x=np.zeros((2, 4, 5, 4), np.float32)), "must be multiples of 2"),
    (dict(), dict(x=np.zeros((2, 4, 4, 3), np.float32)), r"x must be \[b, h, w, 4\]"),
    (dict(), dict(context=None), "context is missing, this network needs one"),
    (dict(), dict(context=np.zeros((2, 3, 5), np.float32)), r"context must be \[b, m, 6\]"),
    (dict(), dict(labels=np.zeros(2, np.int32)), "labels is given, this network takes none"),
    (dict(num_classes=3), dict(), "labels is missing"),
    (dict(added_dim=30, added_time_width=4), dict(added=(np.zeros((2, 5)), np.zeros((2, 6)))), "must make 30 numbers"),
    (dict(attention=(0, 1, 0)), dict(), "a number for each of widths"),
    (dict(heads=3), dict(), "does not divide into heads=3"),
    (dict(resample="conv"), dict(), "accepted: 'same', 'pad', 'resblock'"),
    (dict(injection="film"), dict(), "accepted: 'add', 'scale_shift'"),
])  # fmt: skip
def test_refusals(tiny, wrong, changed, message):
    inputs = jax.tree.map(jnp.asarray, {**tiny[2], **changed})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: UNet(**TINY | wrong).init(jax.random.key(0), **inputs))
