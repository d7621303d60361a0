"""Mappers of words: by hand, and the alignment against the longest common subsequence."""

import itertools

import numpy as np
import pytest

from vgen.edit import align

START, END = 1, 2
PROMPTS = {
    "swap": [[5, 6, 7], [5, 8, 7], [9, 6, 7]],
    "longer": [[5, 6, 7], [5, 8, 9, 7], [8, 9, 6, 7]],  # two tokens for one
    "shorter": [[5, 6, 7, 3], [5, 8, 3], [8, 7, 3]],
    "added": [[5, 6, 7], [5, 10, 6, 7], [5, 6, 7, 4, 10]],
    "same": [[5, 6, 7]] * 3,
}


def tokens(prompts, length=7):
    rows = [[START, *words, END] for words in prompts]
    mask = np.arange(length) < np.asarray([[len(row)] for row in rows])
    return np.asarray([row + [0] * (length - len(row)) for row in rows], np.int32), mask


def columns(*rows, length=7):
    """float [b, m]: 1 at the listed places of each row."""
    return np.asarray([[float(j in row) for j in range(length)] for row in rows])


def longest(x, y):
    """The length of the longest common subsequence, by its recursion."""
    if not x or not y:
        return 0
    return max(longest(x[1:], y), longest(x, y[1:]), *([1 + longest(x[1:], y[1:])] if x[0] == y[0] else []))


def test_matches():
    assert align.matches("abc", "abxc") == [(0, 0), (1, 1), (2, 3)]
    assert align.matches("a", "aa") == [(0, 0)] and align.matches("aa", "a") == [(0, 0)]
    assert align.matches("ab", "ba") == [(1, 0)]  # of equally good ones that which leaves out the target's last
    assert align.matches("", "ab") == [] and align.matches("ab", "cd") == []
    rng = np.random.default_rng(0)
    for n, m in rng.integers(0, 7, (40, 2)):
        x, y = rng.integers(0, 3, n).tolist(), rng.integers(0, 3, m).tolist()
        pairs = align.matches(x, y)
        assert len(pairs) == longest(x, y) and all(x[i] == y[j] for i, j in pairs)
        assert all(i < k and j < n for (i, j), (k, n) in itertools.pairwise(pairs))


def test_refine():
    got = align.refine(*tokens(PROMPTS["added"]))
    np.testing.assert_array_equal(got.source, 0)
    np.testing.assert_array_equal(got.mapper[0], np.eye(7))
    np.testing.assert_array_equal(got.share[0], 0)
    # start 5 10 6 7 end pad takes start 5 - 6 7 end and the padding at its place
    np.testing.assert_array_equal(got.share[1], [1, 1, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(got.mapper[1].T @ np.arange(7), [0, 1, 0, 2, 3, 4, 6])
    np.testing.assert_array_equal(got.share[2], [1, 1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(got.mapper[2].T @ np.arange(7), [0, 1, 2, 3, 0, 0, 4])
    fewer = align.refine(*tokens([[5, 6, 7, 3], [5, 3]]))  # the source has words where the edit has padding
    np.testing.assert_array_equal(fewer.share[1], [1, 1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(fewer.mapper[1].T @ np.arange(7), [0, 1, 4, 5, 0, 0, 6])


def test_replace():
    equal = align.replace(*tokens(PROMPTS["swap"]))
    np.testing.assert_array_equal(equal.mapper, np.tile(np.eye(7), (3, 1, 1)))
    np.testing.assert_array_equal(equal.share, [[0] * 7, [1] * 7, [1] * 7])
    longer = align.replace(*tokens(PROMPTS["longer"]))
    np.testing.assert_array_equal(longer.share[1], 1)
    want = np.zeros((7, 7))
    want[[0, 1, 2, 2, 3, 4, 6], [0, 1, 2, 3, 4, 5, 6]] = [1, 1, 0.5, 0.5, 1, 1, 1]  # half of the word to each token
    np.testing.assert_array_equal(longer.mapper[1], want)
    one = align.replace(*tokens([[5, 6, 7, 3], [5, 8, 3]])).mapper[1]
    np.testing.assert_array_equal(one[:, 2], [0, 0, 1, 1, 0, 0, 0])  # one token gets all of two
    words = align.replace(
        *tokens([[5, 6, 7], [8, 9, 10, 7]]), words=np.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 2, 3, 4, 5]])
    )
    np.testing.assert_array_equal(
        words.mapper[1][:4, :5], [[1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    )
    mixed = align.replace(*tokens([[5, 6, 7], [8, 9, 10, 7]])).mapper[1]
    np.testing.assert_allclose(mixed[1:3, 1:4], 1 / 3)


def test_of_several_sources():
    ids, mask = tokens([[5, 6], [5, 8], [9, 6], [9, 6, 10]])
    got = align.refine(ids, mask, [0, 0, 2, 2])
    np.testing.assert_array_equal(got.source, [0, 0, 2, 2])
    for rows in ([0, 1], [2, 3]):
        alone = align.refine(ids[rows], mask[rows])
        np.testing.assert_array_equal(got.mapper[rows], alone.mapper)
        np.testing.assert_array_equal(got.share[rows], alone.share)
    with pytest.raises(ValueError, match="a source prompt for each of 4 rows"):
        align.refine(ids, mask, [1, 0, 2, 2])


def test_find():
    ids, mask = tokens([[5, 6, 5, 6], [6, 5], [0, 5]])
    np.testing.assert_array_equal(align.find(ids, mask, [5, 6]), columns([1, 2, 3, 4], [], []))
    np.testing.assert_array_equal(align.find(ids, mask, [5]), columns([1, 3], [2], [2]))
    np.testing.assert_array_equal(align.find(ids, mask, [0]), columns([], [], [1]))  # padding is no word
    with pytest.raises(ValueError, match="word is empty"):
        align.find(ids, mask, [])


def test_swapped():
    marked = lambda name, *args: align.swapped(*tokens(PROMPTS[name]), *args).astype(float)
    np.testing.assert_array_equal(marked("swap"), columns([1, 2], [2], [1]))  # of the source, for both edits
    np.testing.assert_array_equal(marked("longer"), columns([1, 2], [2, 3], [1, 2]))
    np.testing.assert_array_equal(marked("added"), columns([], [2], [4, 5]))
    np.testing.assert_array_equal(marked("shorter"), columns([2, 3], [2], [1]) + columns([1], [], []))
    assert not marked("same").any()
    pairs = [0, 0, 2]
    np.testing.assert_array_equal(marked("swap", pairs), columns([2], [2], []))
    with pytest.raises(ValueError, match="row of a source prompt"):
        marked("swap", [1, 0, 0])
