"""Probes: nearest neighbours by hand, the linear one against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vgen.metrics.probe import knn, linear_probe


def test_the_linear_probe_is_logistic_regression():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, 6))
    labels, test_labels = rng.integers(0, 4, 200), rng.integers(0, 4, 400)
    train = centres[labels] + rng.standard_normal((200, 6))
    test = centres[test_labels] + rng.standard_normal((400, 6))
    scale, shift = 10.0 ** np.arange(-3, 3), np.arange(6) * 5  # which standardising takes out
    found = linear_probe(
        (train * scale + shift).astype(np.float32), labels, (test * scale + shift).astype(np.float32), test_labels,
        decay=0.01,
    )  # fmt: skip
    spread = train.std(0)
    theirs = LogisticRegression(C=1 / (0.01 * 200), max_iter=2000, tol=1e-8).fit(train / spread, labels)
    assert found == pytest.approx(theirs.score(test / spread, test_labels), abs=0.01) and 0.5 < found < 1


def test_the_linear_probe_refuses_labels_it_never_saw():
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"test labels \[2\] never occur"):
        linear_probe(x, np.array([0, 1, 1]), x, np.array([0, 1, 2]))


def test_neighbours_vote_by_their_cosine():
    train = np.array([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1])
    test = np.array([[2.0, 0.1], [0.0, 3.0]])  # lengths do not matter
    assert knn(train, labels, test, np.array([0, 1]), k=1) == 1.0
    # three neighbours of the first: cosines 0.999, 0.83 and 0.65; at 0.07 the nearest one outweighs the others
    assert knn(train, labels, test, np.array([0, 1]), k=3) == 1.0
    assert knn(train, labels, test, np.array([0, 1]), k=3, temperature=10.0) == 0.5
    with pytest.raises(ValueError, match="k must be in 1..4"):
        knn(train, labels, test, np.array([0, 1]), k=5)
