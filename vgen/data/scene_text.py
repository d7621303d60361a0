"""The language of the embedded world: its words, what a caption claims, and the way between the two.

    caption  = template with "{}" replaced by: clauses ["on a" BACKGROUND "background"]
    clauses  = clause {("," | "and" | ", and") clause}
    clause   = thing [RELATION thing]
    thing    = ("a" | "an") [SIZE] COLOUR [TEXTURE] SHAPE

`write` makes a caption out of `Claims` and `parse` takes it back: parse(write(claims)) == claims. `parse` is more
lenient than `write` (any case, any order of adjectives, a few synonyms), so that a caption typed by a person can be
scored too.
"""

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart", "moon")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
BACKGROUNDS = ("white", "grey", "beige", "mint", "sky", "dusk", "mist")
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("{}", "a picture of {}", "there is {}", "an image showing {}")

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_ALIASES = {
    r"(to|on) the (left|right) (side )?of": r"\2 of",
    r"\b(is|are|stands|placed)\b": " ",
    r"\b(on top of|over)\b": "above",
    r"\b(under|underneath|beneath)\b": "below",
    r"\bgray\b": "grey",
    r"\bcheckerboard\b": "checkered",
    r"\b(left|right) of\b": r"\1_of",
}


class Thing(NamedTuple):
    """One object as a caption states it; None where the caption does not say."""

    colour: str
    shape: str
    texture: str | None = None
    size: str | None = None


class Claims(NamedTuple):
    """Everything a caption states.

    objects: in the order they are mentioned. relations: (i, relation, j) with relation in RELATIONS, "object i is
      <relation> object j". background: its name, or None where the caption does not say.
    """

    objects: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    background: str | None = None


def write(claims: Claims, template: str = "{}") -> str:
    """Say `claims` in words; relations must join neighbours (i, i + 1), each object in at most one of them."""
    joined = {i: relation for i, relation, j in claims.relations if j == i + 1}
    if len(joined) != len(claims.relations) or any(i + 1 in joined for i in joined):
        raise ValueError(f"relations {claims.relations} cannot be written: join (i, i + 1), sharing no object")
    clauses, i = [], 0
    while i < len(claims.objects):
        clause = _phrase(claims.objects[i])
        if i in joined:
            clause += f" {joined[i]} {_phrase(claims.objects[i + 1])}"
            i += 1
        clauses.append(clause)
        i += 1
    if joined:
        body = ", and ".join(clauses)
    else:
        body = " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)
    if claims.background:
        body += f" on {_article(claims.background)} background"
    return template.format(body)


def parse(caption: str, templates: Sequence[str] = TEMPLATES) -> Claims:
    """Read a caption as claims.

    Args:
      caption: English in the grammar above; case, final full stop, order of adjectives and synonyms do not matter.
      templates: the frames that may surround the clauses.

    Raises:
      ValueError: a word or an order that the grammar does not have; the message names it and the nearest known word.
    """
    text = " ".join(caption.lower().strip(" .!").split())
    for template in sorted(templates, key=len, reverse=True):
        before, after = (part.strip() for part in template.lower().split("{}"))
        if text.startswith(before) and text.endswith(after):
            text = text.removeprefix(before).removesuffix(after).strip()
            break
    for pattern, plain in _ALIASES.items():
        text = re.sub(pattern, plain, text)
    text = " ".join(text.split())
    background = None
    if match := re.search(rf" on (?:an?|the) ({'|'.join(BACKGROUNDS)}) background$", text):
        text, background = text[: match.start()], match.group(1)
    return Claims(*_clauses(re.findall(r"[\w']+|,", text), caption), background)


def _clauses(words: list[str], caption: str) -> tuple[tuple[Thing, ...], tuple[tuple[int, str, int], ...]]:
    """Objects and relations of tokenised clauses."""
    objects: list[Thing] = []
    relations: list[tuple[int, str, int]] = []
    adjectives: dict[str, str] = {}
    pending, glue = None, True  # a relation that waits for its second object; whether an object may begin here
    for word in words:
        if kind := _ADJECTIVE.get(word):
            if kind in adjectives:
                raise ValueError(
                    f"caption {caption!r}: {adjectives[kind]!r} and {word!r} on one object; state one {kind}"
                )
            adjectives[kind] = word
        elif word in SHAPES:
            if "colour" not in adjectives:
                raise ValueError(f"caption {caption!r}: the {word} has no colour; name one of {', '.join(COLOURS)}")
            if not glue:
                raise ValueError(f"caption {caption!r}: nothing joins {word!r} to the object before; use 'and'")
            objects.append(Thing(adjectives["colour"], word, adjectives.get("texture"), adjectives.get("size")))
            if pending:
                relations.append((len(objects) - 2, pending, len(objects) - 1))
            adjectives, pending, glue = {}, None, False
        elif word.replace("_", " ") in RELATIONS:
            if not objects or adjectives or pending:
                raise ValueError(f"caption {caption!r}: {word.replace('_', ' ')!r} must stand between two objects")
            pending, glue = word.replace("_", " "), True
        elif word in (",", "and"):
            glue = True
        elif word not in ("a", "an", "the", "one"):
            near = difflib.get_close_matches(word, _WORDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known words: {', '.join(_WORDS)}"
            raise ValueError(f"caption {caption!r}: unknown word {word!r}; {hint}")
    if adjectives or pending or not objects:
        raise ValueError(f"caption {caption!r} ends too early; for example: 'a red ring above a blue star'")
    return tuple(objects), tuple(relations)


def _phrase(thing: Thing) -> str:
    return _article(" ".join(filter(None, (thing.size, thing.colour, thing.texture, thing.shape))))


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


_ADJECTIVE = {
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(TEXTURES, "texture"),
    **dict.fromkeys(SIZES, "size"),
}
_WORDS = (*SHAPES, *COLOURS, *TEXTURES, *SIZES, *RELATIONS)
