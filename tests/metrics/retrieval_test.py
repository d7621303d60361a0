"""Recall on tables known by hand."""

import numpy as np
import pytest

from vgen.metrics.retrieval import recalls


def test_recalls_by_hand():
    similarity = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.3], [0.1, 0.2, 0.6]])  # pictures down, captions across
    scores = recalls(similarity, np.arange(3), np.arange(3), at=(1, 2, 5))
    assert scores == pytest.approx(
        {"caption_recall_1": 2 / 3, "caption_recall_2": 2 / 3, "image_recall_1": 2 / 3, "image_recall_2": 1.0}
    )


def test_two_pictures_with_the_same_words_are_not_told_apart():
    kinds = np.array([4, 4, 7])
    similarity = np.array([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.2, 0.1, 0.3]])
    assert recalls(similarity, kinds, kinds, at=(1,)) == {"caption_recall_1": 1.0, "image_recall_1": 1.0}
    assert recalls(similarity, np.arange(3), np.arange(3), at=(1,))["caption_recall_1"] == pytest.approx(1 / 3)


def test_a_kind_without_its_other_side_is_refused():
    with pytest.raises(ValueError, match=r"kinds \[2, 3\]"):
        recalls(np.eye(3), np.array([0, 1, 2]), np.array([0, 1, 3]))
