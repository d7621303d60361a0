"""Tokenizer networks: parity with the references, published sizes, image range, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.convert import tables
from tests.golden import golden
from vgen.convert.vqgan import MASKGIT_VQ, OPENMUSE_MASKGIT_VQ, TAMING_VQ
from vgen.layers.conv import depth_to_space, space_to_depth
from vgen.models.vqgan import MASKGIT, TAMING, VQGAN, Decoder, Encoder, Layout, count_res_blocks, resolve_layout

TOL = 1e-9


def nhwc(x):
    return np.asarray(x, np.float64).transpose(0, 2, 3, 1)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def init(model, *args):
    """Parameters drawn by numpy in the shapes of init: compiling the initialisers would take longer than the tests."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        x = rng.standard_normal(leaf.shape) * scale + (path[-1].key == "scale")
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), *args))


def tiny(**kwargs):
    sizes = dict(channels=8, multipliers=(1, 2), blocks=1, latent_channels=6, num_codes=16, groups=4)
    return VQGAN(**(sizes | kwargs))


def test_taming_golden(x64):
    g = golden.load("vqgan")
    model = VQGAN(
        channels=32, multipliers=(1, 2, 2), blocks=1, attention_levels=(2,), latent_channels=6, num_codes=18,
        code_dim=5, legacy=True, layout="taming",
    )  # fmt: skip
    built, params = tables.load(TAMING_VQ, g["weights"])
    assert built == model
    x = nhwc(g["inputs"]["x"])

    @jax.jit
    def run(params, x, codes):
        z, mids = model.apply(
            params, x, method="encode", mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name in ("conv_in", "mid"),
        )  # fmt: skip
        q = model.apply(params, z, method="quantize")
        recon, dec = model.apply(
            params, q.z_q, method="decode", mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name == "mid",
        )  # fmt: skip
        enc, dec = (m["intermediates"] for m in (mids, dec))
        mid = [enc["encoder"]["conv_in"], enc["encoder"]["mid"], dec["decoder"]["mid"]]
        return z, q, recon, model.apply(params, codes, method="decode_indices"), [m["__call__"][0] for m in mid]

    z, q, recon, decoded, mid = run({"params": tables.float64(params)}, x, g["inputs"]["codes"])
    for name, value in zip(("enc_stem", "enc_mid", "dec_mid"), mid, strict=True):
        golden.check(g, name, nchw(value), TOL)
    golden.check(g, "h", nchw(z), TOL)
    golden.check(g, "z_q", nchw(q.z_q), TOL)
    golden.check(g, "indices", q.indices)
    golden.check(g, "codebook_loss", sum(q.losses.values()), TOL)
    golden.check(g, "recon", nchw(recon), TOL)
    golden.check(g, "decode_code", nchw(decoded), TOL)


@pytest.mark.parametrize("case", ["maskgit_vqvae", "maskgit_vqvae_train"])
def test_maskgit_golden(x64, case):
    g = golden.load(case)
    strided = g["meta"]["kwargs"]["conv_downsample"]
    layout = Layout(**{**vars(MASKGIT), "downsample": "stride" if strided else "average"})
    model = VQGAN(
        channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=10, num_codes=18, entropy_weight=0.1,
        layout=layout, image_range=(0.0, 1.0),
    )  # fmt: skip
    built, params = tables.load(MASKGIT_VQ, g["weights"])
    assert built == model
    x = 2 * np.asarray(g["inputs"]["image"], np.float64) - 1  # the reference takes [0, 1], vgen [-1, 1]

    @jax.jit
    def run(params, x, codes):
        z, mids = model.apply(
            params, x, method="encode", mutable=["intermediates"],
            capture_intermediates=lambda m, _: m.name in ("conv_in", "block_0"),
        )  # fmt: skip
        q = model.apply(params, z, method="quantize")
        enc = mids["intermediates"]["encoder"]
        stem, block = enc["conv_in"], enc["down_0"]["block_0"]
        images = model.apply(params, q.z_q, method="decode"), model.apply(params, codes, method="decode_indices")
        return z, q, images, (stem["__call__"][0], block["__call__"][0])

    z, q, images, (stem, block) = run({"params": tables.float64(params)}, x, g["inputs"]["codes"])
    golden.check(g, "enc_stem", stem, TOL)
    golden.check(g, "enc_block0", block, TOL)
    golden.check(g, "raw", z, TOL)
    golden.check(g, "quantized", q.z_q, TOL)
    golden.check(g, "indices", q.indices)
    golden.check(g, "recon", (images[0] + 1) / 2, TOL)
    golden.check(g, "decode_from_indices", (images[1] + 1) / 2, TOL)
    if strided:
        golden.check(g, "e_latent_loss", q.losses["commitment"], TOL)
        golden.check(g, "q_latent_loss", q.losses["codebook"], TOL)
        golden.check(g, "entropy_loss", q.losses["entropy"], TOL)
        golden.check(g, "quantizer_loss", sum(q.losses.values()), TOL)


def test_openmuse_golden(x64):
    g = golden.load("maskgit_vqgan_openmuse")
    model = VQGAN(channels=32, multipliers=(1, 1, 2), blocks=1, latent_channels=8, num_codes=18, image_range=(0.0, 1.0))
    built, params = tables.load(OPENMUSE_MASKGIT_VQ, g["weights"])
    assert built == model
    x = 2 * nhwc(g["inputs"]["x"]) - 1
    variables = {"params": tables.float64(params)}
    recon, q = jax.jit(model.apply)(variables, x)
    z, decoded = jax.jit(
        lambda v, x, codes: (
            model.apply(v, x, method="encode"),
            model.apply(v, codes.reshape(2, 4, 4), method="decode_indices"),
        )
    )(variables, x, g["inputs"]["codes"])
    golden.check(g, "hidden", nchw(z), TOL)
    golden.check(g, "z_q", nchw(q.z_q), TOL)
    golden.check(g, "ids", q.indices.reshape(2, -1))
    golden.check(g, "recon", (nchw(recon) + 1) / 2, TOL)
    golden.check(g, "decode_code", (nchw(decoded) + 1) / 2, TOL)


def counts(model, size=256):
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    return {k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in tree.items()}


def test_published_sizes_taming():
    f16 = dict(attention_levels=(4,), code_dim=256, layout="taming")
    n = counts(VQGAN(num_codes=1024, **f16))
    assert n["encoder"] == pytest.approx(29.30e6, abs=5e3)
    assert n["decoder"] == pytest.approx(42.45e6, abs=5e3)
    assert n["quant_conv"] + n["post_quant_conv"] == 2 * (256 * 256 + 256)
    assert sum(n.values()) == pytest.approx(72.1e6, abs=5e4)
    assert sum(counts(VQGAN(num_codes=16384, **f16)).values()) == pytest.approx(76.1e6, abs=5e4)
    f8 = counts(VQGAN(multipliers=(1, 1, 2, 4), attention_levels=(3,), code_dim=256, layout="taming"))
    assert f8["encoder"] == pytest.approx(26.35e6, abs=5e3)
    assert f8["decoder"] == pytest.approx(38.32e6, abs=5e3)


def test_published_sizes_maskgit_and_muse():
    n = counts(VQGAN(num_codes=1024))
    # 54.43M if the shortcuts read the blocks' inputs; the released network's read the branch and are wider.
    assert sum(n.values()) == 54_515_587
    by_input = Layout(**{**vars(MASKGIT), "shortcut": "input"})
    assert sum(counts(VQGAN(num_codes=1024, layout=by_input)).values()) == pytest.approx(54.43e6, abs=5e3)
    assert count_res_blocks(5, 2) == 24 and count_res_blocks(4, 2) == 20
    assert count_res_blocks(5, 2, "taming") == 29
    tree = jax.eval_shape(VQGAN().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    names = {k[: k.index("block_") + 8] for k in flatten_dict(tree, sep="/") if "block_" in k}
    assert len(names) == 24
    assert tree["quantizer"]["codebook"].shape == (8192, 256)


def test_decoder_alone_and_of_another_size():
    """Muse's fine-tuned decoder: 256 wide, four blocks per level, the same tokens."""
    fine = Decoder(channels=256, blocks=4)
    alone = jax.eval_shape(fine.init, jax.random.key(0), jnp.zeros((1, 16, 16, 256)))["params"]
    inside = VQGAN(decoder_channels=256, decoder_blocks=4)
    whole = jax.eval_shape(inside.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]["decoder"]
    assert jax.tree.map(lambda a: a.shape, alone) == jax.tree.map(lambda a: a.shape, whole)
    assert alone["up_0"]["block_3"]["conv2"]["kernel"].shape == (3, 3, 256, 256)
    assert set(alone["mid"]) == {"block_0", "block_1", "block_2", "block_3"}
    assert jax.eval_shape(fine.apply, {"params": alone}, jnp.zeros((1, 16, 16, 256))).shape == (1, 256, 256, 3)


def test_image_range_maps_at_the_edges():
    """A [0, 1] network on images in [-1, 1] is the [-1, 1] network on (x + 1) / 2, with its output mapped back."""
    unit, plain = (tiny(multipliers=(1,), image_range=r) for r in ((0.0, 1.0), (-1.0, 1.0)))
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    params = init(plain, x)
    recon, q = jax.jit(unit.apply)(params, x)
    apply = jax.jit(plain.apply)
    want, want_q = apply(params, (x + 1) / 2)
    np.testing.assert_array_equal(q.indices, want_q.indices)
    np.testing.assert_allclose(recon, 2 * want - 1, atol=1e-5)
    assert not np.allclose(recon, apply(params, x)[0], atol=1e-2)


@pytest.fixture(scope="module", params=["taming", "maskgit"])
def trained(request):
    """A tiny model of either layout with its output and gradients."""
    model = tiny(layout=request.param, decoder_blocks=1, code_dim=4)
    x = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1)
    params = init(model, x)["params"]

    @jax.jit
    def run(params):
        def loss(params):
            recon, q = model.apply({"params": params}, x)
            decoded = model.apply({"params": params}, q.indices, method="decode_indices")
            tokens = model.apply({"params": params}, x, method="tokenize")
            return jnp.square(recon - x).mean() + sum(q.losses.values()), (recon, q, decoded, tokens)

        return jax.grad(loss, has_aux=True)(params)

    return model, params, x, *run(params)


def test_every_parameter_gets_a_gradient(trained):
    _, _, _, grads, _ = trained
    zero = [k for k, g in flatten_dict(grads, sep="/").items() if not np.abs(g).max() > 0]
    assert [k for k in zero if not k.endswith("k/bias")] == []  # a bias of all keys does not change a softmax


def test_shapes_and_tokens(trained):
    model, _, x, _, (recon, q, decoded, tokens) = trained
    assert recon.shape == x.shape and recon.dtype == jnp.float32
    assert q.indices.shape == (2, 4, 6) and q.indices.dtype == jnp.int32
    assert (model.num_tokens, model.downsampling) == (16, 2)
    np.testing.assert_array_equal(tokens, q.indices)
    np.testing.assert_allclose(decoded, recon, atol=1e-5)


def test_patches_are_channels():
    """With `patch` both ends work on patches: the same network on pictures rearranged by hand gives the same."""
    model, inner = tiny(patch=2), tiny(image_channels=12)
    x = jax.random.uniform(jax.random.key(1), (2, 16, 24, 3), minval=-1)
    params = init(model, x)
    recon, q = model.apply(params, x)
    deep, q_deep = inner.apply(params, space_to_depth(x, 2))
    assert model.downsampling == 4 and q.indices.shape == (2, 4, 6) and recon.shape == x.shape
    np.testing.assert_array_equal(q.indices, q_deep.indices)
    np.testing.assert_allclose(recon, depth_to_space(deep, 2), atol=1e-6)


def test_local_latents_see_their_patch_alone():
    layout = Layout(local=True, mid_attention=False)
    model = tiny(patch=4, multipliers=(1,), layout=layout)
    x = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3), minval=-1)
    params = init(model, x)
    encode = jax.jit(lambda x: model.apply(params, x, method="encode"))
    z = encode(x)
    assert z.shape[:3] == (2, 2, 3)
    moved = np.abs(encode(x.at[0, 4:, 4:8].add(0.1)) - z).max(-1)
    assert moved[0, 1, 1] > 1e-4 and (np.delete(moved.ravel(), 4) == 0).all()
    # the same patch anywhere has the same latent
    np.testing.assert_allclose(encode(jnp.roll(x, 4, axis=2)), jnp.roll(z, 1, axis=2), atol=1e-6)
    kernels = [leaf.shape[:2] for leaf in jax.tree.leaves(params["params"]["encoder"]) if leaf.ndim == 4]
    assert set(kernels) == {(1, 1)}
    with pytest.raises(ValueError, match=r"local layout has one level, got multipliers \(1, 2\)"):
        init(tiny(patch=2, multipliers=(1, 2), layout=layout), x)


def test_bfloat16_compute_keeps_float32_codes():
    sizes = dict(multipliers=(1,), code_dim=4, normalize=True)
    model = tiny(dtype=jnp.bfloat16, **sizes)
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3), minval=-1)
    params = init(model, x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    recon, q = jax.jit(model.apply)(params, x)
    encode = jax.jit(lambda m, p, x: m.apply(p, x, method="encode"), static_argnums=0)
    z = encode(model, params, x)
    assert recon.dtype == jnp.bfloat16 and z.dtype == jnp.bfloat16 and q.z_q.dtype == jnp.float32
    want = encode(tiny(**sizes), params, x)
    np.testing.assert_allclose(np.float32(z), want, atol=0.05 * float(jnp.abs(want).max()))


def test_remat_changes_nothing():
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3), minval=-1)
    params = init(tiny(multipliers=(1,)), x)
    a, b = (
        jax.jit(jax.grad(lambda x, r=r: tiny(multipliers=(1,), remat=r).apply(params, x)[0].sum()))(x)
        for r in (False, True)
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="multiples of the factor 2"):
        Encoder(channels=4, multipliers=(1, 1), groups=2).init(jax.random.key(0), jnp.zeros((1, 7, 8, 3)))
    with pytest.raises(ValueError, match="latent_channels=6"):
        Decoder(channels=4, multipliers=(1,), groups=2, latent_channels=6).init(
            jax.random.key(0), jnp.zeros((1, 4, 4, 5))
        )
    with pytest.raises(ValueError, match="'taming', 'maskgit'"):
        resolve_layout("muse")
    assert resolve_layout("taming") == TAMING
