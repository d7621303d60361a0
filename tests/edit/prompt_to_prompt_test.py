"""Prompt-to-Prompt against a loop over the paper's equations in numpy, its limits, and maps out of a network."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compile_test import compilations
from tests.conftest import quick_compilation
from tests.convert import tables
from tests.edit.align_test import PROMPTS, columns, tokens
from vgen.diffusion import grids, samplers, schedules
from vgen.edit import align
from vgen.edit.compose import compose, run
from vgen.edit.ilvr import ilvr
from vgen.edit.maps import average, maps
from vgen.edit.multidiffusion import multidiffusion
from vgen.edit.prompt_to_prompt import LocalBlend, from_first, prompt_to_prompt
from vgen.edit.repaint import repaint
from vgen.edit.sdedit import sdedit
from vgen.layers.attention import Site, kept
from vgen.models.text import TextTransformer
from vgen.models.unet import UNet
from vgen.tasks.diffuse import Diffuse
from vgen.types import AttentionControl, Edit, Intervention, Prediction, Step

NET = dict(in_channels=3, out_channels=3, widths=(8, 8), blocks=1, heads=2, context_dim=8, groups=4)
TASK = Diffuse(
    network=UNet(attention=(1, 1), mid_attention=0, **NET), schedule=schedules.discrete(schedules.betas()), size=8,
    text_encoder=TextTransformer(vocab=12, length=7, depth=1, width=8, heads=2, mlp_dim=16), max_steps=6,
)  # fmt: skip
NOISE = np.random.default_rng(3).standard_normal((3, 8, 8, 3))
STEPS, SCALE, PLACES, FACTOR = 3, 3.0, 16, 2


def alignment(name):
    return (align.refine if name in ("added", "same") else align.replace)(*tokens(PROMPTS[name]))


@pytest.fixture(scope="module", autouse=True)
def quick():
    with quick_compilation():
        yield


@pytest.fixture(scope="module")
def params():
    text, mask = tokens(PROMPTS["swap"])
    drawn = tables.draw(TASK, {"text": text, "text_mask": mask})
    sharp = lambda path, a: a * 4 if "attn" in str(path) and path[-2].key in ("q", "k") else a  # far from uniform maps
    return tables.float64(jax.tree_util.tree_map_with_path(sharp, drawn))


# ----------------------------------------------------------------------------------------- against the paper's loop


KNOBS = dict(
    cross=(0.0, 0.8), hold=(0.0, 0.5), equalizer=np.ones((3, 7)), words=columns([2], [2], [1]), threshold=0.9,
    begin=2.0, steps=STEPS, scale=SCALE,
)  # fmt: skip


@jax.jit
def draw(params, conds, alignment, knobs):
    edit = prompt_to_prompt(
        alignment, knobs["steps"], cross_replace=knobs["cross"], self_replace=knobs["hold"], self_places=PLACES,
        equalizer=knobs["equalizer"], blend=LocalBlend(knobs["words"], FACTOR, knobs["threshold"], knobs["begin"]),
    )  # fmt: skip
    return drawn(params, conds, edit, steps=knobs["steps"], guidance_scale=knobs["scale"])


OFF = dict(cross=(0.0, 0.0), hold=(0.0, 0.0))


@jax.jit
def plain(params, conds, knobs):
    return drawn(params, conds, None, steps=knobs["steps"], guidance_scale=knobs["scale"])


def drawn(params, conds, edit, **kwargs):
    start = jnp.asarray(NOISE if edit is not None else np.tile(NOISE[:1], (3, 1, 1, 1)))
    return TASK.sample(params, jax.random.key(0), conds, edit=edit, start=start, **kwargs)["latents"]


def edited(params, name, **knobs):
    conds = dict(zip(("text", "text_mask"), tokens(PROMPTS[name])))
    knobs = KNOBS | knobs
    knobs["cross"] = tuple(np.broadcast_to(share, (3, 7)) for share in knobs["cross"])
    return np.asarray(draw(params, conds, alignment(name), knobs))


def edit_map(base, own, kind, row, i, a, knobs):
    """The paper's Edit(M_t, M_t*, t) of a map [1, h, n, m], word by word."""
    if kind == "self":
        begin, end = (int(share * STEPS) for share in knobs["hold"])
        return base if begin <= i < end and own.shape[2] <= PLACES else own
    out, (begin, end) = own.copy(), knobs["cross"]
    for j in range(own.shape[-1]):
        first, last = (int(np.broadcast_to(share, (3, 7))[row, j] * (STEPS + 1)) for share in (begin, end))
        if first <= i < last:
            mapped = sum(base[..., k] * a.mapper[row, k, j] for k in range(own.shape[-1]))
            out[..., j] = (mapped if a.share[row, j] else own[..., j]) * knobs["equalizer"][row, j]
    return out


SITES = [(kind, n) for n in (64, 16, 16, 16, 64, 64) for kind in ("self", "cross")]


@jax.jit
def network(params, x, t, cond, maps, count):
    """(eps, the maps in use) of one prompt; the first `count` maps are given."""
    used = []

    def probs(p, site, step):
        assert (site.kind, p.shape[2]) == SITES[len(used)]
        used.append(jnp.where(len(used) < count, maps[len(used)], p))
        return used[-1]

    return TASK.network.apply({"params": params["network"]}, x, t, **cond, control=AttentionControl(probs=probs)), used


def edited_network(params, x, t, cond, sources, *args):
    """(eps, maps) of an edited prompt, whose maps are edited one after the other."""
    maps = sources
    for k, (kind, _) in enumerate(SITES):
        own = np.asarray(network(params, x, t, cond, maps, k)[1][k])
        maps = [*maps[:k], edit_map(np.asarray(sources[k]), own, kind, *args), *maps[k + 1 :]]
    return network(params, x, t, cond, maps, len(SITES))


condition = jax.jit(TASK.condition)


def blended(x, totals, knobs):
    """(x where a word of the row or of the source is looked at, the source elsewhere; the mask)."""
    masks = []
    for total in totals:
        n = len(total)
        pooled = np.asarray(
            [[total[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2].max() for c in range(n)] for r in range(n)]
        )
        masks.append(np.kron(pooled / pooled.max(), np.ones((FACTOR, FACTOR))) > knobs["threshold"])
    masks = np.asarray([mask | masks[0] for mask in masks])
    return np.where(masks[..., None], x, x[:1]), masks


def paper(params, name, **changes):
    """(latents, mask): Algorithm 1 of the paper, prompt by prompt, with DDIM and guidance in numpy."""
    knobs = KNOBS | changes
    ids, mask = tokens(PROMPTS[name])
    batch, grid = {"text": ids, "text_mask": mask}, jax.tree.map(np.asarray, grids.grid(TASK.schedule, STEPS))
    cond, null = (condition(params, batch, jnp.full(3, keep)) for keep in (True, False))
    x, side = np.tile(NOISE[:1], (3, 1, 1, 1)), 8 // FACTOR
    none = [np.zeros((1, 2, n, n if kind == "self" else 7)) for kind, n in SITES]
    totals, masks = np.zeros((3, side, side)), None
    for i in range(STEPS):
        row = jax.tree.map(lambda field: field[i], grid)
        t, eps = np.full(1, row.t, np.float64), []
        for j in range(3):
            one = lambda tree: jax.tree.map(lambda a: a[j : j + 1], tree)
            if j == 0:
                with_text, maps = network(params, x[:1], t, one(cond), none, 0)
                sources = maps
                assert all(np.abs(np.asarray(a).sum(-1) - 1).max() < 1e-12 for a in maps)
            else:
                args = (j, i, alignment(name), knobs)
                with_text, maps = edited_network(params, x[j : j + 1], t, one(cond), sources, *args)
            without = network(params, x[j : j + 1], t, one(null), none, 0)[0]
            eps.append(np.asarray(without + knobs["scale"] * (with_text - without))[0])
            looked = [np.asarray(m)[0] @ knobs["words"][j] for m in maps if m.shape[2:] == (side * side, 7)]
            assert len(looked) == 3  # down, twice up
            totals[j] += np.concatenate(looked).mean(0).reshape(side, side)
        x0 = (x - row.sigma * np.asarray(eps)) / row.alpha
        x = row.alpha_next * x0 + row.sigma_next * np.asarray(eps)
        if i >= int(knobs["begin"] * STEPS):
            x, masks = blended(x, totals, knobs)
    return x, masks


PERIODS = (np.zeros((3, 7)), np.where(columns([], [2], [1, 3]), 0.3, 0.8))
WEIGHTS = 1 + columns([], [2], [3]) * [[0], [-3], [1.5]]
CASES = {
    "swap": ("swap", {}),
    "longer": ("longer", dict(cross=PERIODS)),
    "shorter": ("shorter", dict(cross=(0.25, 1.0), hold=(0.34, 0.67))),
    "added": ("added", {}),
    "weighted": ("same", dict(equalizer=WEIGHTS, cross=(0.0, 1.0))),
    "blended": ("longer", dict(begin=0.34)),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_paper(x64, params, case):
    name, knobs = CASES[case]
    got, (want, mask) = edited(params, name, **knobs), paper(params, name, **knobs)
    assert tables.error(got, want) < 1e-9, tables.error(got, want)
    np.testing.assert_array_equal(mask is None, case != "blended")
    plain = edited(params, name, **OFF)
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-12, atol=1e-12)  # the source is what it was
    assert all(np.abs(got[j] - plain[j]).max() > 1e-3 for j in (1, 2))  # and the edits are not
    if mask is not None:
        outside = ~mask[1:]
        assert 0.1 < outside.mean() < 0.9
        np.testing.assert_array_equal(got[1:][outside], np.stack([got[0]] * 2)[outside])
        assert (got[1:][~outside] != np.stack([got[0]] * 2)[~outside]).all()


def test_nothing_replaced_is_plain_sampling(x64, params):
    for name, scale in (("swap", SCALE), ("added", 1.0)):
        conds = dict(zip(("text", "text_mask"), tokens(PROMPTS[name])))
        want = plain(params, conds, KNOBS | dict(scale=scale))
        np.testing.assert_array_equal(edited(params, name, scale=scale, **OFF), want)
        assert np.abs(want[0] - want[1]).max() > 1e-3


def test_the_same_prompt_gives_the_same_picture(x64, params):
    conds = dict(zip(("text", "text_mask"), tokens(PROMPTS["same"])))
    want = plain(params, conds, KNOBS)
    got = edited(params, "same", cross=(0.0, 1.0), hold=(0.0, 1.0))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got, np.stack([got[0]] * 3), rtol=0, atol=1e-12)


def test_the_unconditional_half_is_left_alone(x64, params):
    """Under a guidance of 0 nothing else is to be seen."""
    conds = dict(zip(("text", "text_mask"), tokens(PROMPTS["swap"])))
    got = edited(params, "swap", scale=0.0, cross=(0.0, 1.0), hold=(0.0, 1.0), equalizer=WEIGHTS * 2)
    np.testing.assert_array_equal(got, plain(params, conds, KNOBS | dict(scale=0.0)))
    assert (got != edited(params, "swap", cross=(0.0, 1.0))).any()
    step, rng = Step(jnp.int32(0), *jnp.zeros(6)), np.random.default_rng(0)
    control = prompt_to_prompt(alignment("swap"), 3, self_places=16).control
    for site, shape in ((Site("cross"), (6, 2, 64, 7)), (Site("self"), (6, 2, 16, 16))):
        p = jnp.asarray(rng.random(shape))
        new = control.probs(p, site, step)
        np.testing.assert_array_equal(new[3:], p[3:])
        np.testing.assert_array_equal(new[0], p[0])
        np.testing.assert_array_equal(new[1], p[0])  # words stand where they stood: the maps are the source's
        assert control.probs(p[:3], site, step).shape == (3, *shape[1:])
        with pytest.raises(ValueError, match="attention of 4 rows: expected a multiple of the 3 prompts"):
            control.probs(p[:4], site, step)
    for site, shape in ((Site("cross"), (6, 2, 64, 5)), (Site("self"), (6, 2, 17, 17))):  # a picture's, a large one's
        p = jnp.asarray(rng.random(shape))
        assert control.probs(p, site, step) is p


def test_all_strengths_are_traced(x64, params):
    first = edited(params, "swap")
    with compilations() as found:
        others = [
            edited(params, "added"),
            edited(params, "swap", steps=6),
            edited(params, "swap", scale=5.0),
            edited(params, "swap", cross=(0.5, 0.9)),
            edited(params, "swap", hold=(0.4, 1.0)),
            edited(params, "swap", equalizer=WEIGHTS),
            edited(params, "swap", begin=0.0),
            edited(params, "swap", begin=0.0, threshold=0.97),
            edited(params, "swap", begin=0.0, words=columns([1], [3], [3])),
        ]
    assert not found and all((a != b).any() for a, b in itertools.combinations([first, *others], 2))


def test_first_prompt_of_a_batch_is_the_source_of_the_others(x64, params):
    """As a task's method, with tokens that are traced, it is what the plan made beforehand gives."""
    method = from_first(0.8, 0.5, PLACES, FACTOR, threshold=0.9, start=0.0)
    task = dataclasses.replace(TASK, method=method)
    knobs = dict(steps=STEPS, guidance_scale=SCALE, start=jnp.asarray(NOISE))
    run = jax.jit(lambda params, conds: task.sample(params, jax.random.key(0), conds, **knobs))
    for name in ("swap", "longer"):
        text, mask = tokens(PROMPTS[name])
        got = run(params, {"text": text, "text_mask": mask})["latents"]
        words = align.swapped(text, mask)
        want = edited(params, name, cross=(0.0, 0.8), hold=(0.0, 0.5), words=words.astype(float), begin=0.0)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert run._cache_size() == 1


# ----------------------------------------------------------------------------------------------------- kept maps


def test_maps_that_are_kept():
    """[b, heads, places, tokens]; layers of a stack stand behind the batch, also under remat."""
    net = UNet(attention=(0, 2), mid_attention=1, remat="full", **NET)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    x, t, context = shape(3, 8, 8, 3), shape(3), shape(3, 5, 8)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t, context=context)

    def shapes(control):
        call = lambda *args: net.apply(*args[:3], context=args[3], control=control, mutable=["kept"])
        collections = jax.eval_shape(call, params, x, t, context)[1]
        return {
            name: {path: [a.shape for a in arrays] for path, arrays in maps.items()}
            for name, maps in kept(collections).items()
        }

    assert shapes(AttentionControl(probs=lambda p, site, step: p)) == {}
    cross = lambda p, site, step: p if site.kind == "cross" else None
    deep, places = "layers/cross", [(3, 2, 2, 16, 5)]
    want = {f"down_1/attn_0/{deep}": places, f"up_1/attn_0/{deep}": places, f"up_1/attn_1/{deep}": places}
    want["mid/attn_0/layer/cross"] = [(3, 2, 16, 5)]
    both = shapes(AttentionControl(keep={"all": cross, "sum": lambda p, site, step: p.sum((1, 2, 3))}))
    assert both["all"] == want and both["sum"]["down_1/attn_0/layers/attn"] == [(3, 2)]


# ------------------------------------------------------------------------------------------------- with other edits


GRID = grids.grid(TASK.schedule, 4)
X = jnp.asarray(NOISE, jnp.float32)


def looking(x, step):
    """A denoiser without a network, one of whose words looks at the place (1, 1) of four by four in every window."""
    maps = jnp.full((x.shape[0], 4, 4, 1), 0.1).at[:, 1, 1].set(1.0).reshape(-1, 16, 1)
    x0 = jnp.tanh(x + jnp.arange(x.shape[0]).reshape(-1, 1, 1, 1))
    return Prediction(x0, {"kept": {"local_blend": {"a": (maps,), "b": (maps,)}}})


def local(x=X):
    return prompt_to_prompt(alignment("swap"), 4, blend=LocalBlend(columns([2], [2], [2]), FACTOR, 0.5, 0.0))


OTHERS = {
    "sdedit": lambda: sdedit(X[:, ::-1], 0.75),
    "ilvr": lambda: ilvr(X[:, ::-1], 4),
    "repaint": lambda: repaint(X[:1, ::-1], jnp.zeros((1, 8, 8, 1)).at[:, :4].set(1.0), 2, 2),
    "guidance": lambda: Edit(guidance=lambda f: lambda x, step: f(x * 1.01, step)),
}


def walk(edit, x=X):
    return np.asarray(jax.jit(lambda x: run(edit, looking, samplers.ddim(), GRID, jax.random.key(0), x))(x))


@pytest.fixture(scope="module")
def alone():
    return walk(local())


@pytest.mark.parametrize("name", OTHERS)
def test_with_another_edit(name, alone):
    mask = np.zeros((8, 8), bool)
    mask[:6, :6] = True  # the place and its neighbours
    np.testing.assert_array_equal(alone[1:, ~mask], np.stack([alone[0, ~mask]] * 2))
    assert (alone[1:, mask] != alone[0, mask]).all()
    both = walk(compose(OTHERS[name](), local()))  # the last word is the blend's
    np.testing.assert_array_equal(both[1:, ~mask], np.stack([both[0, ~mask]] * 2))
    assert np.isfinite(both).all() and (both[0] != alone[0]).any()


def test_with_windows():
    """The maps of MultiDiffusion's windows make one mask."""
    wide = jnp.concatenate([X, X + 1], axis=2)
    many = multidiffusion((8, 8), (8, 8))
    got = walk(compose(local(), many), wide)
    mask = np.zeros((8, 16), bool)
    mask[:6, :6] = mask[:6, 8:14] = mask[:6, 7:8] = True
    np.testing.assert_array_equal(got[1:, ~mask], np.stack([got[0, ~mask]] * 2))
    with pytest.raises(ValueError, match="does this edit come first in the chain"):
        walk(compose(many, local()), wide)


def test_maps_of_a_run():
    """The mean over steps, sites and heads, of maps that grow with the step and differ between two sites."""
    words = np.stack([columns([1, 2], [4])] * 3)  # [3, 2, 7]
    edit = maps(words, FACTOR)
    keep = edit.control.keep["maps"]
    probs = jax.nn.softmax(jnp.asarray(np.random.default_rng(5).standard_normal((6, 2, 16, 7)), jnp.float32))

    def denoise(x, step):
        looked = keep(probs * (1 + step.i), Site("cross"), step)[:3]
        return Prediction(x, {"kept": {"maps": {"a": (looked,), "b": (3 * looked[:, None],)}}})

    both = compose(Edit(hook=Intervention(lambda x: 0)), edit)
    x, states = run(both, denoise, samplers.ddim(), GRID, jax.random.key(0), X, states=True)
    mean = np.asarray(probs[:3]).mean(1)  # [3, 16, 7]; the steps weigh 1, 2, 3, 4 and the sites 1, 3
    want = 2.5 * 2 * np.stack([mean[..., 1] + mean[..., 2], mean[..., 4]], -1).reshape(3, 4, 4, 2)
    np.testing.assert_allclose(average(states), np.kron(want, np.ones((1, FACTOR, FACTOR, 1))), rtol=1e-5)
    np.testing.assert_array_equal(x, run(both, denoise, samplers.ddim(), GRID, jax.random.key(0), X))
    assert keep(probs, Site("self"), None) is None and keep(probs[..., :5], Site("cross"), None) is None
    with pytest.raises(ValueError, match="one `maps` among its edits, found 0"):
        average(())


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"no maps of 7 tokens came at 1 / 2 of x \(3, 8, 8, 3\)"):
        run(local(), lambda x, step: Prediction(x), samplers.ddim(), GRID, jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"2 edits set control.keep\['local_blend'\]"):
        compose(local(), local())
