"""Which tokens of a source prompt stand for those of an edited one: the mappers of Prompt-to-Prompt, from token ids."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

Tokens = Int[np.ndarray, "b m"] | Int[Array, "b m"]
Mask = Bool[np.ndarray, "b m"] | Bool[Array, "b m"]


class Alignment(NamedTuple):
    """How the maps of a batch follow from those of its source prompts; all three may be traced.

    mapper: float [b, m, m]; token j of an edited prompt gets the sum over i of mapper[i, j] times the map of token i of
      the source.  share: float [b, m], 1 where it does, 0 where the map stays the prompt's own.
    source: int32 [b], the row in which the source of each row is; a source prompt is its own.
    """

    mapper: Float[np.ndarray, "b m m"]
    share: Float[np.ndarray, "b m"]
    source: Int[np.ndarray, "b"]


def matches(source: Sequence, target: Sequence) -> list[tuple[int, int]]:
    """The pairs (i, j) of equal elements in the best alignment of two sequences, ascending.

    Needleman & Wunsch 1970 with 1 for equal elements, -1 for unequal ones and 0 for gaps.  Of equally good ones that of
    the authors' code: gaps come last, in the target ahead of the source.
    """
    score = np.zeros((len(source) + 1, len(target) + 1), int)
    for i, x in enumerate(source):
        for j, y in enumerate(target):
            score[i + 1, j + 1] = max(score[i + 1, j], score[i, j + 1], score[i, j] + (1 if x == y else -1))
    pairs, i, j = [], len(source), len(target)
    while i and j:
        if score[i, j] == score[i, j - 1]:
            j -= 1
        elif score[i, j] == score[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def refine(tokens: Tokens, mask: Mask, source: Sequence[int] | None = None) -> Alignment:
    """The Alignment of prompts to which words were added, or from which some were taken: equal tokens share a map.

    tokens: [b, m] with the padding behind; mask: which of them are prompt, start and end included.
    source: the row of each row's source prompt, the first one by default.
    Padding takes the map of the padding in its place, and keeps its own where the source has a word there.
    """
    return _align(tokens, mask, source, None, swap=False)


def replace(tokens: Tokens, mask: Mask, source: Sequence[int] | None = None, words: Tokens | None = None) -> Alignment:
    """The Alignment of prompts in which words were swapped; what stands between equal words takes each other's maps.

    One by one where their numbers agree; else every token of the edited word gets the sum of the source's tokens,
    divided by the number of its own.  Words that were only added keep their own maps, as in `refine`.
    words: number of the word of every token, to swap whole words; by default each token is one.
    tokens, mask, source: see `refine`.
    The authors' code pairs what follows the last swapped word by its place in the prompt, which is the same where the
    numbers of tokens agree; here it is paired with itself.
    """
    return _align(tokens, mask, source, words, swap=True)


def swapped(tokens: Tokens, mask: Mask, source: Sequence[int] | None = None) -> Bool[np.ndarray, "b m"]:
    """Which tokens of each edited prompt its source has no equal of, and of each source any of its edits, bool [b, m].

    tokens, mask, source: see `refine`.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    found = np.zeros(tokens.shape, bool)
    for row, origin in enumerate(_sources(source, len(tokens))):
        ends = mask[origin].sum(), mask[row].sum()
        equal = matches(tokens[origin, : ends[0]].tolist(), tokens[row, : ends[1]].tolist())
        for place, end, shared in zip((origin, row), ends, zip(*equal) if equal else ((), ())):
            found[place, :end] |= ~np.isin(np.arange(end), shared)
    return found


def find(tokens: Tokens, mask: Mask, word: Sequence[int]) -> Bool[np.ndarray, "b m"]:
    """Where the run of ids `word` stands in each prompt, bool [b, m]: for equalizers, masks and maps of words.

    Raises ValueError where word is empty.
    """
    tokens, mask, word = np.asarray(tokens), np.asarray(mask, bool), list(word)
    if not word:
        raise ValueError("find: word is empty; give the ids of its tokens, without start and end")
    found = np.zeros(tokens.shape, bool)
    for begin in range(tokens.shape[1] - len(word) + 1):
        span = slice(begin, begin + len(word))
        found[:, span] |= ((tokens[:, span] == word) & mask[:, span]).all(1, keepdims=True)
    return found


def _align(tokens, mask, source, words, swap):
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    b, m = tokens.shape
    source = _sources(source, b)
    numbers = np.broadcast_to(np.arange(m), (b, m)) if words is None else np.asarray(words)
    mapper, share = np.tile(np.eye(m), (b, 1, 1)), np.zeros((b, m))
    units = [_units(*row) for row in zip(tokens, mask, numbers)]
    for row, origin in enumerate(source):
        if row == origin:
            continue
        mapper[row], n = 0, mask[row].sum()
        for xs, ys in _pairs(units[origin], units[row], swap):
            mapper[row][np.ix_(xs, ys)] = np.eye(len(xs)) if len(xs) == len(ys) else 1 / len(ys)
            share[row, ys] = 1
        padding = np.arange(max(n, mask[origin].sum()), m)
        mapper[row, padding, padding] = share[row, padding] = 1
    return Alignment(mapper, share, source)


def _sources(source, b):
    """int32 [b], the first row where nothing is given."""
    source = np.zeros(b, np.int32) if source is None else np.asarray(source, np.int32)
    if source.shape != (b,) or (source[source] != source).any():
        raise ValueError(f"align: source must have the row of a source prompt for each of {b} rows, got {source}")
    return source


def _units(tokens, mask, numbers):
    """[(its ids, its places)] of the words of a prompt."""
    places = range(int(mask.sum()))
    groups = [list(group) for _, group in groupby(places, key=lambda i: numbers[i])]
    return [(tuple(tokens[group].tolist()), group) for group in groups]


def _pairs(source, target, swap):
    """(places in the source, places in the target) of all that share maps."""
    equal = matches([ids for ids, _ in source], [ids for ids, _ in target])
    for i, j in equal:
        yield source[i][1], target[j][1]
    for (i, j), (i_end, j_end) in pairwise([(-1, -1), *equal, (len(source), len(target))]):
        xs, ys = ([places for _, places in part] for part in (source[i + 1 : i_end], target[j + 1 : j_end]))
        if swap and len(xs) == len(ys):
            yield from zip(xs, ys)
        elif swap and xs and ys:
            yield sum(xs, []), sum(ys, [])
