"""Scores of text-to-image generation on the embedded world: which of a caption's claims hold in the picture.

Protocol. The oracle reads each picture, the caption is parsed into claims, claimed objects are matched to read ones.

Matching: one to one; a pair may match only if colour or shape agrees. Of all matchings the one is taken with, in this
order, most agreeing colours and shapes together, most agreeing colours, most agreeing textures and sizes, most
relations that hold. A claimed object without a partner is missing: it counts as wrong in every attribute that the
caption states of it.

colour, shape: fraction of claimed objects whose partner has the claimed colour, or shape. A red square and a blue
    circle, drawn for "a red circle and a blue square", score 1 in colour and 0 in shape.
texture, size: the same over the objects whose texture, or size, is stated.
count: fraction of pictures with as many objects as the caption states and no blob that is no object.
relation: fraction of stated relations that hold along the dominant axis between the partners of the two objects. Both
    partners must be there and identified: with the claimed colours or, when both claims name one colour, with that
    colour and the claimed shapes too. A relation between other objects does not count.
background: fraction of stated backgrounds that are right.
scene_exact: fraction of pictures in which everything the caption states holds at once, and nothing else is there.

Fractions are over all captions together (not means of per-picture fractions). A metric of which no caption states
anything is NaN.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from vgen.data.scene_oracle import Reading, read
from vgen.data.scene_text import TEMPLATES, Claims, Thing, parse
from vgen.data.scenes import FULL, SceneObject, World, relation

METRICS = ("colour", "shape", "texture", "size", "count", "relation", "background", "scene_exact")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What holds in one picture: lists of bools, one entry per claim of that kind, and whether the scene is exact."""

    colour: list[bool]
    shape: list[bool]
    texture: list[bool]
    size: list[bool]
    count: list[bool]
    relation: list[bool]
    background: list[bool]

    @property
    def scene_exact(self) -> list[bool]:
        return [all(all(getattr(self, field.name)) for field in dataclasses.fields(self))]


def score(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n s s 3"] | Float[np.ndarray, "n s s 3"],
    captions: Sequence[str],
    world: World = FULL,
) -> dict[str, float]:
    """Score pictures against their captions (protocol above).

    Args:
      images: n square pictures, uint8 or float in [-1, 1], 32 px or more.
      captions: n captions in the grammar of `vgen.data.scene_text`.
      world: the vocabulary that the oracle reads with.

    Returns:
      metric -> fraction in [0, 1], or NaN where no caption states anything of the kind; keys: METRICS.

    Raises:
      ValueError: different numbers of images and captions, none at all, or a caption that cannot be parsed.
    """
    if len(images) != len(captions) or not len(captions):
        raise ValueError(
            f"score needs as many images as captions and at least one, got {len(images)} and {len(captions)}"
        )
    return score_claims(images, [parse(caption, world.templates + TEMPLATES) for caption in captions], world)


def score_claims(
    images: Sequence[np.ndarray] | UInt8[np.ndarray, "n s s 3"] | Float[np.ndarray, "n s s 3"],
    claims: Sequence[Claims],
    world: World = FULL,
) -> dict[str, float]:
    """`score` of what captions claim; a Thing may leave its colour or its shape open ("")."""
    verdicts = [judge(read(np.asarray(image), world), claim) for image, claim in zip(images, claims, strict=True)]
    scores = {}
    for name in METRICS:
        held = [each for verdict in verdicts for each in getattr(verdict, name)]
        scores[name] = float(np.mean(held)) if held else float("nan")
    return scores


def judge(reading: Reading, claims: Claims) -> Verdict:
    """Which claims hold in one reading, under the best matching."""
    partners = max(_matchings(claims.objects, reading.objects), key=lambda found: _agreement(claims, found))
    pairs = list(zip(claims.objects, partners, strict=True))

    def right(name: str) -> list[bool]:
        stated = [(getattr(thing, name), found) for thing, found in pairs if getattr(thing, name)]
        return [found is not None and getattr(found, name) == word for word, found in stated]

    return Verdict(
        colour=right("colour"),
        shape=right("shape"),
        texture=right("texture"),
        size=right("size"),
        count=[len(reading.objects) == len(claims.objects) and not reading.unknown],
        relation=[_holds(claims.objects, partners, *each) for each in claims.relations],
        background=[reading.background == claims.background] if claims.background else [],
    )


Partners = tuple[SceneObject | None, ...]


def _matchings(things: Sequence[Thing], objects: Sequence[SceneObject]) -> Iterator[Partners]:
    """Every one-to-one matching of things to objects that share colour or shape; None is a missing partner."""
    if not things:
        yield ()
        return
    for i, o in enumerate(objects):
        if o.colour == things[0].colour or o.shape == things[0].shape:
            for rest in _matchings(things[1:], [*objects[:i], *objects[i + 1 :]]):
                yield (o, *rest)
    for rest in _matchings(things[1:], objects):
        yield (None, *rest)


def _agreement(claims: Claims, partners: Partners) -> tuple[int, int, int, int]:
    """The order of preference among matchings."""
    pairs = [(thing, found) for thing, found in zip(claims.objects, partners, strict=True) if found is not None]
    colours = sum(thing.colour == found.colour for thing, found in pairs)
    shapes = sum(thing.shape == found.shape for thing, found in pairs)
    details = sum((thing.texture == found.texture) + (thing.size == found.size) for thing, found in pairs)
    return colours + shapes, colours, details, sum(_holds(claims.objects, partners, *each) for each in claims.relations)


def _holds(things: Sequence[Thing], partners: Partners, i: int, name: str, j: int) -> bool:
    """Whether relation (i, name, j) holds between identified partners."""
    a, b = partners[i], partners[j]
    if a is None or b is None or a.colour != things[i].colour or b.colour != things[j].colour:
        return False
    if things[i].colour == things[j].colour and (a.shape != things[i].shape or b.shape != things[j].shape):
        return False
    return relation(a, b, dominance=1.0) == name
