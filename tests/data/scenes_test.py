"""The embedded world: determinism, splits, ground truth, captions, and what its oracle reads and refuses to read."""

import dataclasses
import pickle
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageFilter

from vgen.data import scene_draw, scene_oracle, scene_text, scenes
from vgen.data.preprocess import CLIP
from vgen.data.scene_oracle import read
from vgen.data.scene_text import Claims, Thing, parse
from vgen.data.scenes import FULL, Scenes, World, compose, prompts, scene
from vgen.metrics.scenes import score
from vgen.models import sam_prompt

MINI = World(shapes=("circle", "square", "triangle", "star"), textures=("solid",), max_objects=2)
PAIRS = World(max_objects=2)


def words(o):
    return o.shape, o.colour, o.texture, o.size


def exact(example, reading):
    """Every object with all its words, within 3 % of its place; nothing else; the right background."""
    if reading.unknown or reading.background != example["background"]:
        return False
    if Counter(map(words, example["objects"])) != Counter(map(words, reading.objects)):
        return False
    return all(
        any(words(a) == words(b) and abs(a.x - b.x) < 0.03 and abs(a.y - b.y) < 0.03 for b in reading.objects)
        for a in example["objects"]
    )


def found(example, reading):
    """Fraction of objects that the oracle reports with the right colour and shape, wherever."""
    pair = lambda o: (o.colour, o.shape)
    both = Counter(map(pair, example["objects"])) & Counter(map(pair, reading.objects))
    return sum(both.values()) / len(example["objects"])


def rate(measure, world, size, change=lambda image, rng: image, n=80):
    rng = np.random.default_rng(0)
    values = []
    for i in range(n):
        example = scene(world, i, size, scenes.SPLITS[i % 2])
        values.append(measure(example, read(change(example["image"], rng), world)))
    return np.mean(values, axis=0)


def blur(image, sigma):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def shuffle(image, rng, patch=8):
    n = len(image) // patch
    tiles = image.reshape(n, patch, n, patch, 3).swapaxes(1, 2).reshape(n * n, patch, patch, 3)
    return rng.permutation(tiles).reshape(n, n, patch, patch, 3).swapaxes(1, 2).reshape(image.shape)


def soft(image, rng):
    """What a small tokenizer does: blur, ringing, noise and a colour cast."""
    scale = len(image) / 32
    image = Image.fromarray(blur(image, 0.5 * scale)).filter(ImageFilter.UnsharpMask(1.5 * scale, 80, 0))
    image = np.asarray(image, float) + rng.normal(0, 4, np.shape(image)) + rng.normal(0, 5, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------- the world


def test_vocabularies_agree():
    assert tuple(scene_draw.PALETTE) == scene_text.COLOURS
    assert tuple(scene_draw.OUTLINES) == scene_text.SHAPES
    assert tuple(scene_draw.BACKDROPS) == scene_text.BACKGROUNDS
    assert ("solid", *scene_draw.PERIODS) == scene_text.TEXTURES
    assert tuple(scenes.DIAMETERS) == scene_text.SIZES


def test_colours_are_apart():
    tones = np.asarray([*scene_draw.PALETTE.values(), scene_draw.INK], float)
    gaps = np.linalg.norm(tones[:, None] - tones, axis=-1) + 1e3 * np.eye(len(tones))
    assert gaps.min() > 95
    for name in scene_draw.BACKDROPS:
        rows = scene_draw.backdrop(name, 64).astype(float)
        assert np.linalg.norm(rows - tones, axis=-1).min() > 80, name


@pytest.mark.parametrize("world", [FULL, MINI, World(colours=("red", "blue"), shapes=("ring", "moon"), max_objects=2)])
def test_splits(world):
    held = set(world.heldout)
    total = len(world.colours) * len(world.shapes)
    assert len(held) == max(1, round(0.15 * total))
    assert {c for c, _ in world.training} == set(world.colours) and {s for _, s in world.training} == set(world.shapes)
    assert held.isdisjoint(world.training) and len(held) + len(world.training) == total
    seen = set()
    for i in range(300):
        train = {(o.colour, o.shape) for o in compose(world, i, "train")[0]}
        test = {(o.colour, o.shape) for o in compose(world, i, "heldout")[0]}
        assert not train & held and test & held
        seen |= test & held
    assert seen == held
    assert world.heldout == dataclasses.replace(world, heldout=None).heldout


def test_same_scene_at_every_size_and_time():
    for i in range(20):
        small, large = scene(FULL, i, 32), scene(FULL, i, 256)
        assert small["objects"] == large["objects"] and small["caption"] == large["caption"]
        shrunk = large["image"].reshape(32, 8, 32, 8, 3).mean((1, 3))
        assert np.abs(shrunk - small["image"]).mean() < 2.5
        np.testing.assert_array_equal(small["image"], scene(FULL, i, 32)["image"])
    captions = [compose(w, i, s)[3] for w in (FULL, World(seed=1)) for s in scenes.SPLITS for i in range(50)]
    assert len(set(captions)) > 190


@pytest.mark.parametrize("size", [16, 17, 512])
def test_any_size(size):
    example = scene(FULL, 3, size)
    assert example["image"].shape == (size, size, 3) and example["image"].dtype == np.uint8


def test_objects_keep_their_distance():
    for world in (MINI, FULL):
        for i in range(400):
            objects = compose(world, i)[0]
            for k, a in enumerate(objects):
                assert min(a.x, a.y, 1 - a.x, 1 - a.y) >= a.radius + 0.03 - 1e-9
                for b in objects[:k]:
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 0.06 - 1e-9
            if world is MINI:
                assert all(8.5 < 2 * 32 * o.radius < 15 for o in objects)


def test_truth():
    for i in range(30):
        example = scene(FULL, i, 64, truth=True)
        empty = scene_draw.render((), example["background"], 64)[0]
        changed = np.abs(example["image"].astype(int) - empty).max(-1) > 0
        masks, n = example["masks"], len(example["objects"])
        assert masks.shape == (n, 64, 64) and masks.sum(0).max() == 1
        assert not (masks.any(0) & ~changed).any()  # nothing is claimed where nothing was painted
        assert (changed & ~masks.any(0)).sum() < 0.35 * changed.sum()  # and only rims are left out
        for k, o in enumerate(example["objects"]):
            x0, y0, x1, y1 = example["boxes"][k]
            assert masks[k][int(y0) : int(y1), int(x0) : int(x1)].sum() == masks[k].sum()
            assert abs((x0 + x1) / 2 - 64 * o.x) < 2.1 and x1 - x0 <= 2 * 64 * o.radius + 2
            centre, *corners = example["landmarks"][k]
            np.testing.assert_allclose(centre, [64 * o.x, 64 * o.y], rtol=1e-6)
            assert (np.abs(corners - centre) <= 64 * o.radius * 1.001).all()
            if o.shape == "square":
                r = 0.88 * 64 * o.radius
                np.testing.assert_allclose(np.abs(corners - centre), r, rtol=1e-5)
        np.testing.assert_array_equal(np.sort(example["depth"]), np.arange(n))
        edges = example["edges"] > 0
        assert edges.any() and not (edges & ~masks.any(0)).any()


def test_occlusion_hides_the_farther_object():
    world = World(min_objects=2, max_objects=2, occlusion=True, textures=("solid",))
    overlaps = 0
    for i in range(60):
        example = scene(world, i, 64, truth=True)
        alone = np.stack([scene_draw.render([o], "white", 64, masks=True)[1][0] for o in example["objects"]])
        nearest = int(example["depth"].argmin())
        np.testing.assert_array_equal(example["masks"][nearest], alone[nearest])
        both = alone.all(0)
        overlaps += both.any()
        assert not example["masks"][1 - nearest][both].any()
        assert example["masks"][1 - nearest].sum() > 0.25 * alone[1 - nearest].sum()
    assert overlaps > 5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"shapes": ("circle", "blob")}, "blob"),
        ({"colours": ()}, "at least one"),
        ({"max_objects": 5}, "max_objects <= 4"),
        ({"templates": ("a photo",)}, "{}"),
        ({"heldout": (("red", "cow"),)}, "cow"),
        ({"colours": ("red", "blue"), "heldout": tuple(("red", s) for s in scene_text.SHAPES)}, "without any training"),
    ],
)
def test_bad_worlds(kwargs, message):
    with pytest.raises(ValueError, match=message):
        World(**kwargs)


def test_bad_scenes():
    with pytest.raises(ValueError, match="16 to 512"):
        scene(FULL, 0, 8)
    with pytest.raises(ValueError, match="train, heldout"):
        scene(FULL, 0, 32, "test")
    with pytest.raises(ValueError, match="holds out no"):
        compose(World(heldout=()), 0, "heldout")


def test_source():
    source = Scenes(32, "heldout", count=10, world={"max_objects": 2, "shapes": ["circle", "star"]})
    assert len(source) == 10 and len(list(source)) == 10
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]["image"], source[3]["image"])
    assert set(source[0]) == {"image", "caption"} and source[-1]["caption"] == source[9]["caption"]
    with pytest.raises(IndexError):
        source[10]


@pytest.mark.parametrize("labels, count", [("pair", 6), ("colour", 3), ("shape", 2)])
def test_labels_are_classes_of_the_first_object(labels, count):
    world = World(shapes=("circle", "star"), colours=("red", "blue", "green"), max_objects=2, heldout=())
    source = Scenes(16, count=60, world=world, labels=labels)
    said = scenes.classes(world, labels)
    assert len(said) == count and {source[i]["label"] for i in range(60)} == set(range(count))
    for i in range(20):
        first = compose(world, i)[0][0]
        colour, shape = said[source[i]["label"]]
        assert colour in ("", first.colour) and shape in ("", first.shape) and (colour or shape)
    if labels == "pair":
        assert said[2 * 2 + 1] == ("green", "star")
    with pytest.raises(ValueError, match="labels must be one of pair, colour, shape, got 'texture'"):
        Scenes(16, world=world, labels="texture")


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize("world", [FULL, MINI, World(relations=("above",)), World(relations=()), World(canonical=0.7)])
def test_captions_parse_to_their_claims_and_are_true(world):
    stated = Counter()
    for i in range(400):
        objects, background, claims, caption = compose(world, i)
        assert parse(caption) == claims
        assert len(claims.objects) == len(objects) and claims.background in (None, background)
        match = [next(o for o in objects if (o.colour, o.shape) == thing[:2]) for thing in claims.objects]
        for thing, o in zip(claims.objects, match, strict=True):
            assert (thing.texture or "solid") == o.texture and thing.size in (None, o.size)
        for a, name, b in claims.relations:
            assert name in world.relations and scenes.relation(match[a], match[b], 1.39) == name
            stated[name] += 1
        if len(objects) == 2 and len(world.relations) != 0:
            assert len(claims.relations) == 1
        stated["size"] += any(thing.size for thing in claims.objects)
        stated["background"] += bool(claims.background)
    assert set(stated) - {"size", "background"} == set(world.relations)
    assert 100 < stated["size"] and 60 < stated["background"] < 180


def test_prompts_are_distinct_and_reproducible():
    found = prompts(MINI, 256, "heldout")
    assert len(set(found)) == 256 and found == prompts(MINI, 256, "heldout")
    assert found != prompts(MINI, 256, "heldout", seed=1)
    for caption in found:
        assert any((thing.colour, thing.shape) in MINI.heldout for thing in parse(caption).objects)
    tiny = World(colours=("red",), shapes=("ring", "star"), textures=("solid",), sizes=("large",), max_objects=1)
    with pytest.raises(ValueError, match="found only"):
        prompts(tiny, 100)


def test_parse_what_people_type():
    red, blue = Thing("red", "circle", "striped"), Thing("blue", "star", None, "small")
    assert parse("A striped red circle to the left of the small blue star.") == Claims(
        (red, blue), ((0, "left of", 1),)
    )
    assert parse("There is a red striped circle under a blue small star on a gray background") == Claims(
        (red, blue), ((0, "below", 1),), "grey"
    )
    assert parse("a red circle, a blue star and a pink moon").relations == ()
    assert parse("a red circle is above a blue star, and a pink moon").relations == ((0, "above", 1),)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red cirle", "did you mean 'circle'"),
        ("a circle", "has no colour"),
        ("a red blue circle", "state one colour"),
        ("a red circle a blue star", "nothing joins"),
        ("a red circle above", "ends too early"),
        ("left of a red circle", "between two objects"),
        ("", "ends too early"),
    ],
)
def test_parse_errors(caption, message):
    with pytest.raises(ValueError, match=message):
        parse(caption)


def test_write_refuses_what_the_grammar_cannot_say():
    things = (Thing("red", "star"), Thing("blue", "star"), Thing("pink", "star"))
    with pytest.raises(ValueError, match="cannot be written"):
        scene_text.write(Claims(things, ((0, "above", 2),)))


# ---------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize(
    ("world", "size"),
    [(MINI, 32), (MINI, 64), (PAIRS, 32), (PAIRS, 64), (FULL, 32), (FULL, 64), (MINI, 200), (PAIRS, 512)],
)
def test_oracle_reads_true_renders(world, size):
    assert rate(exact, world, size, n=150 if size <= 64 else 30) >= 0.99


@pytest.mark.parametrize(
    ("world", "size", "least"), [(MINI, 32, 0.97), (MINI, 64, 0.97), (PAIRS, 32, 0.85), (PAIRS, 64, 0.9)]
)
def test_oracle_tolerates_soft_pictures(world, size, least):
    assert rate(exact, world, size, soft) >= least
    assert rate(exact, world, size, lambda image, _: blur(image, 0.6 * size / 32)) >= least


def test_oracle_reads_floats():
    example = scene(PAIRS, 0, 32)
    assert read((example["image"] / 127.5 - 1).astype(np.float32), PAIRS) == read(example["image"], PAIRS)


@pytest.mark.parametrize("world", [MINI, FULL])
@pytest.mark.parametrize("size", [32, 64])
def test_oracle_sees_nothing_in_noise(world, size):
    noise = lambda image, rng: rng.integers(0, 256, image.shape).astype(np.uint8)
    assert rate(lambda _, reading: bool(reading.objects or reading.background), world, size, noise, n=40) == 0
    normal = lambda image, rng: np.clip(rng.normal(128, 40, image.shape), 0, 255).astype(np.uint8)
    assert rate(lambda _, reading: len(reading.objects), world, size, normal, n=40) == 0


@pytest.mark.parametrize("world", [MINI, PAIRS])
@pytest.mark.parametrize("size", [32, 64])
def test_oracle_refuses_blurred_pictures(world, size):
    assert rate(found, world, size, lambda image, _: blur(image, size / 10)) <= 0.01


@pytest.mark.parametrize(
    ("world", "size", "most"), [(MINI, 32, 0.2), (MINI, 64, 0.02), (PAIRS, 32, 0.15), (PAIRS, 64, 0.02)]
)
def test_oracle_refuses_shuffled_patches(world, size, most):
    # At 32 px one 8 px patch from the middle of a large square *is* a small square; whole scenes never survive.
    matched, whole = rate(lambda *pair: np.array([found(*pair), exact(*pair)]), world, size, shuffle)
    assert matched <= most and whole == 0


def test_oracle_refuses_a_picture_of_nothing():
    for name in scene_text.BACKGROUNDS:
        assert read(scene_draw.render((), name, 32)[0]) == ((), name, 0)
    with pytest.raises(ValueError, match="square pictures"):
        read(np.zeros((32, 48, 3), np.uint8))


def test_oracle_reports_blobs_that_are_no_objects():
    image = scene_draw.render((), "white", 64)[0]
    image[20:24, 5:60] = scene_draw.PALETTE["red"]  # a bar
    assert read(image) == ((), "white", 1)


def test_label_matches_flood_fill():
    rng = np.random.default_rng(0)
    for density in (0.3, 0.5, 0.62, 0.8):
        mask = rng.random((23, 31)) < density
        want, count = np.zeros(mask.shape, int), 0
        for start in zip(*np.nonzero(mask), strict=True):
            if not want[start]:
                count += 1
                stack = [start]
                while stack:
                    r, c = stack.pop()
                    if 0 <= r < 23 and 0 <= c < 31 and mask[r, c] and not want[r, c]:
                        want[r, c] = count
                        stack += [(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)]
        got, number = scene_oracle.label(mask)
        assert number == count
        np.testing.assert_array_equal(got > 0, mask)
        assert len(set(zip(got[mask], want[mask], strict=True))) == count


def test_lattice_keeps_few_places_and_everything_else():
    small = dict(shapes=("circle", "star"), sizes=("large",), textures=("solid",), max_objects=2)
    world = World(lattice=8, **small)
    places, pairs = set(), 0
    for index in range(300):
        objects, _, claims, _ = compose(world, index, "heldout")
        assert all(float(v * 8).is_integer() for o in objects for v in (o.x, o.y))
        assert {o.radius for o in objects} == {0.215}
        places |= {(o.x, o.y) for o in objects}
        pairs += len(objects) == 2
        assert len(claims.relations) == (len(objects) == 2)
    assert len(places) == 25 and 100 < pairs < 200
    images = [scene(world, i, 32, "heldout") for i in range(100)]
    assert score([e["image"] for e in images], [e["caption"] for e in images], world)["scene_exact"] == 1
    for wrong in (dict(lattice=3), dict(lattice=-1), dict(lattice=8, max_objects=3), dict(lattice=8, occlusion=True)):
        with pytest.raises(ValueError, match="lattice"):
            World(**(small | wrong))


def test_canonical_captions_are_told_from_the_left_and_from_above():
    """Most of them; the pictures stay as they are."""
    plain = World(max_objects=2)
    told, first = Counter(), Counter()
    for share, counts in ((0.0, first), (0.75, told)):
        world = dataclasses.replace(plain, canonical=share)
        for i in range(400):
            counts.update(name for _, name, _ in compose(world, i)[2].relations)
    total, moved = sum(first.values()), first["right of"] + first["below"]
    assert sum(told.values()) == total > 150 and 0.4 < moved / total < 0.6
    assert 0.15 < (told["right of"] + told["below"]) / moved < 0.35
    one, other = (scene(dataclasses.replace(plain, canonical=share), 5, 32) for share in (0.0, 1.0))
    np.testing.assert_array_equal(one["image"], other["image"])
    for wrong in (dict(canonical=1.5), dict(canonical=0.5, relations=("right of", "below"))):
        with pytest.raises(ValueError, match="World.canonical must be in"):
            World(**wrong)


def test_close_ups_are_of_the_object():
    """As sam_prompt.crops shows it to a CLIP: the same middle, the same width, the same colour around."""
    image, masks = np.full((32, 32, 3), 200, np.uint8), np.zeros((32, 32), bool)
    masks[4:12, 20:26] = True
    image[masks] = (250, 0, 0)
    for wider, alone in ((1.0, False), (1.5, True), (2.0, False)):
        near = scenes.close_up(image, masks, wider, alone)
        boxes = jnp.array([[[20, 4, 25, 11]]], float)
        given = [jnp.asarray(each, float)[None] for each in (image - 255 * np.asarray(CLIP.mean),)]
        theirs = sam_prompt.crops(
            *given, jnp.asarray(masks)[None, None], boxes, jnp.full((1, 1), wider), jnp.full((1, 1), alone), 32
        )
        theirs = theirs[0, 0] + 255 * np.asarray(CLIP.mean)
        apart = np.abs(near.astype(float) - theirs)
        assert apart.mean() < 6 and (alone or apart[8:24, 8:24].max() < 2), (wider, alone)  # alone, edges are softer
    plain = np.rint(255 * np.asarray(CLIP.mean))
    assert (scenes.close_up(image, masks, 2.0, True)[0, 0] == plain).all()


def test_some_scenes_are_close_ups():
    world = dict(max_objects=1, textures=("solid",))
    whole, near = scenes.Scenes(32, world=world, count=60), scenes.Scenes(32, world=world, count=60, closeup=0.5)
    same = [(whole[i]["image"] == near[i]["image"]).all() for i in range(60)]
    assert 15 < sum(same) < 45 and all(whole[i]["caption"] == near[i]["caption"] for i in range(60))
    assert (near[7]["image"] == near[7]["image"]).all()
    for bad in (dict(closeup=1.5), dict(closeup=0.5, masks=True), dict(closeup=0.5, world={})):
        with pytest.raises(ValueError, match="closeup must be in"):
            scenes.Scenes(32, **dict(world=world) | bad)
