"""SAM: the authors' numbers, published sizes, windows and positions, image and mask sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import quick_compilation
from tests.convert import tables
from tests.golden import golden
from vgen.convert.sam import AUTHORS
from vgen.models import sam

TOL = 1e-9


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, 1)


@pytest.fixture(scope="module")
def authors():
    """(golden case, network, parameters in float64) of segment_anything."""
    g = golden.load("sam")
    module, params = tables.load(AUTHORS, g["weights"], dict(decoder_heads=4))
    return g, module, tables.float64(params)


def normalised(g):
    """The golden image [72, 96, 3] of 0..255 in its frame; the reference holds mean and deviation in float32."""
    pixels = np.zeros((1, 96, 96, 3))
    image = g["inputs"]["image"].astype(np.float64).transpose(1, 2, 0)
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    pixels[0, :72] = (image - mean) / std
    return pixels


def test_authors_encoder(x64, authors):
    g, module, params = authors
    pixels = normalised(g)

    @jax.jit
    def run(params, x):
        return module.apply(
            {"params": params}, x, method="encode", mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name == "global_0",
        )  # fmt: skip

    embedding, mid = run(params, pixels)
    golden.check(g, "embedding", nchw(embedding), TOL)
    golden.check(g, "block1", mid["intermediates"]["image_encoder"]["global_0"]["__call__"][0], TOL)
    places = module.apply({"params": params}, method=lambda m: m.prompt_encoder.grid_positions())
    golden.check(g, "dense_pe", nchw(places[None]), TOL)


def test_authors_decoder(x64, authors):
    g, module, params = authors
    i = {k: jnp.asarray(v, jnp.float64 if v.dtype.kind == "f" else v.dtype) for k, v in g["inputs"].items()}
    points, boxes = dict(points=i["points"][None], labels=i["labels"][None]), dict(boxes=i["boxes"][None])
    mask = dict(masks=i["mask_input"][None, :, 0])
    first = dict(points=points["points"][:, :1], labels=points["labels"][:, :1], boxes=boxes["boxes"][:, :1])

    @jax.jit
    def run(params, image):
        def decode(multimask=True, **prompts):
            return module.apply({"params": params}, embedding, **prompts, multimask=multimask, method="decode")

        def prompt(**prompts):
            return module.apply({"params": params}, **prompts, method=lambda m, **kw: m.prompt_encoder(**kw))

        embedding = module.apply({"params": params}, image, method="encode")
        masks = dict(points=decode(**points), box=decode(False, **boxes), mask=decode(**mask), none=decode())
        masks["all"] = decode(**first, **mask)
        full = sam.postprocess(masks["points"].logits, (72, 96), (54, 70), 96)
        return masks, prompt(**points)[0], prompt(**boxes)[0], prompt(**mask)[1], full

    with quick_compilation():
        masks, points_sparse, box_sparse, mask_dense, full = run(params, normalised(g))
    for name, out in masks.items():
        golden.check(g, f"{name}_low_res", out.logits[0], TOL)
        golden.check(g, f"{name}_iou", out.iou[0], TOL)
    golden.check(g, "points_sparse", points_sparse[0], TOL)
    golden.check(g, "box_sparse", box_sparse[0], TOL)
    golden.check(g, "mask_dense", nchw(mask_dense[0]), TOL)
    golden.check(g, "points_full", full[0], TOL)


@pytest.mark.parametrize(
    "sizes, count", [(sam.BASE, 89_670_912), (sam.LARGE, 308_278_272), (sam.HUGE, 637_026_048)]
)  # fmt: skip
def test_published_sizes(sizes, count):
    model = sam.SAM(**sizes)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1024, 1024, 3)))["params"]
    counts = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert counts == dict(image_encoder=count, prompt_encoder=6_220 + 256, mask_decoder=4_058_340)


@pytest.mark.parametrize("shape, size", [((2, 8, 8, 5), 3), ((1, 6, 9, 2), 3), ((1, 2, 5, 1), 4)])
def test_windows_come_back(shape, size):
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) + 1
    cut = sam.split_windows(x, size)
    rows, columns = -(-shape[1] // size), -(-shape[2] // size)
    assert cut.shape == (shape[0] * rows * columns, size, size, shape[3])
    np.testing.assert_array_equal(cut[1, 0], np.pad(x[0, 0], ((0, size), (0, 0)))[size : 2 * size])
    np.testing.assert_array_equal(sam.join_windows(cut, shape[1:3]), x)


@pytest.mark.parametrize("chunk", [12, 512])
def test_relative_attention(x64, chunk):
    """The whole at once, a few rows of queries at a time, and the formula written out."""
    rng = np.random.default_rng(0)
    h, w, heads, d = 6, 4, 2, 3
    q, k, v = map(jnp.asarray, rng.standard_normal((3, 2, h * w, heads, d)))
    rows, columns = (jnp.asarray(rng.standard_normal((2 * side - 1, d))) for side in (h, w))

    def loss(rows, q):
        return jnp.square(sam.relative_attention(q, k, v, rows, columns, chunk=chunk)).sum()

    got = jax.jit(lambda: sam.relative_attention(q, k, v, rows, columns, chunk=chunk))()
    y, x = np.divmod(np.arange(h * w), w)
    bias = np.einsum("bnhd,nmd->bhnm", q, rows[y[:, None] - y + h - 1] + columns[x[:, None] - x + w - 1])
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / d**0.5 + bias
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, np.einsum("bhnm,bmhd->bnhd", probs, v), rtol=1e-12, atol=1e-12)
    grad = jax.grad(loss)(rows, q)
    step = jnp.zeros_like(rows).at[2, 1].set(1e-6)
    slope = (loss(rows + step, q) - loss(rows - step, q)) / 2e-6
    np.testing.assert_allclose(grad[2, 1], slope, rtol=1e-6)


def test_segments():
    assert sam.segments(5, (0, 3)) == [
        ("global_0", (0,)), ("windows_0", (1, 2)), ("global_1", (3,)), ("windows_1", (4,)),
    ]  # fmt: skip
    assert sam.segments(2, (0, 1)) == [("global_0", (0,)), ("global_1", (1,))]


def test_gradients_reach_all_but_the_gaussian():
    sizes = dict(depth=3, width=12, heads=2, global_layers=(2,), image_size=32, patch=4, window=3, channels=8)
    model = sam.SAM(**sizes, decoder_depth=1, decoder_heads=2, decoder_mlp_dim=8, iou_dim=8)
    rng = np.random.default_rng(0)
    inputs = AUTHORS.inputs(model, rng)
    inputs["labels"][0, 0] = (0, -1)
    inputs["labels"][0, 1] = (1, 1)
    inputs = jax.tree.map(jnp.asarray, inputs)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.3, a.dtype), shapes)

    @jax.jit
    @jax.grad
    def gradient(params):
        embedding = model.apply({"params": params}, inputs["pixels"], method="encode")
        prompts = {k: v for k, v in inputs.items() if k != "pixels"}
        outs = [
            model.apply({"params": params}, embedding, **given, method="decode")
            for given in (prompts, prompts | {"masks": None})
        ]
        return sum((jnp.square(out.logits) + out.iou[..., None, None]).mean() for out in outs)

    with quick_compilation():
        grads = gradient(params)
    still = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, grad in jax.tree_util.tree_leaves_with_path(grads)
        if not np.abs(grad).max() > 1e-9
    ]
    # a bias of all keys does not change a softmax
    assert [name for name in still if not name.endswith("/k/bias")] == ["prompt_encoder/gaussian"]


@pytest.mark.parametrize("original, inside", [((40, 61), (31, 48)), ((64, 33), (48, 25))])
def test_mask_sizes_against_transformers(original, inside):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    processor = transformers.SamImageProcessorPil(size={"longest_edge": 48}, pad_size={"height": 48, "width": 48})
    logits = np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)
    (want,) = processor.post_process_masks([torch.from_numpy(logits)], [original], [inside], binarize=False)
    np.testing.assert_allclose(sam.postprocess(logits, inside, original, 48), want.numpy(), atol=2e-6)


def test_wrong_inputs_are_named():
    model = sam.SAM(depth=1, width=8, heads=2, global_layers=(0,), image_size=32, patch=8, channels=8)
    with pytest.raises(ValueError, match="expected a side of 32"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 32, 3)))
    with pytest.raises(ValueError, match="points need labels"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 1, 2, 2)))
