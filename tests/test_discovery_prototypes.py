"""Nearest prototypes, and the two scenarios with new classes."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

from lib.book import load_reference
from lib.discovery import PrototypeClassifier, evaluate_novel

generator = torch.Generator().manual_seed(0)
CENTRES = 3 * torch.randn(6, 5, generator=generator)
Y = torch.arange(120) % 6
X = CENTRES[Y] + torch.randn(120, 5, generator=generator)


def test_euclidean_is_sklearns_nearest_centroid():
    mine = PrototypeClassifier("euclidean").fit(X[:60], Y[:60]).predict(X[60:])
    assert np.array_equal(mine, NearestCentroid().fit(X[:60], Y[:60]).predict(X[60:].numpy()))


def test_cosine_is_the_nearest_centroid_of_directions():
    mine = PrototypeClassifier().fit(X[:60], Y[:60])
    reference = load_reference("hyperspherical-softmax", "nearest_prototype")
    assert torch.equal(mine.predict(X[60:]), reference(X[:60], Y[:60], X[60:]))
    units = normalize(X.numpy())
    means = np.stack([units[:60][Y[:60] == c].mean(0) for c in range(6)])
    assert np.array_equal(mine.predict(X[60:]), (units[60:] @ normalize(means).T).argmax(1))
    assert torch.equal(mine.predict(7 * X[60:]), mine.predict(X[60:]))


def test_classes_come_later_and_candidates_limit_the_answer():
    old = Y < 4
    classifier = PrototypeClassifier().fit(X[old], Y[old])
    before = classifier.prototypes_.clone()
    assert classifier.add_classes(X[~old], Y[~old]) is classifier
    assert torch.equal(classifier.prototypes_[:4], before)
    assert classifier.classes_.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(classifier.predict(X), PrototypeClassifier().fit(X, Y).predict(X))
    some = torch.tensor([5, 1])
    assert set(classifier.predict(X, some).tolist()) <= {5, 1}
    with pytest.raises(ValueError, match=r"\[5\] are there already"):
        classifier.add_classes(X[:2], torch.tensor([5, 9]))
    with pytest.raises(ValueError, match="not there"):
        classifier.predict(X, torch.tensor([5, 11]))


def test_bad_input():
    with pytest.raises(ValueError, match="metric"):
        PrototypeClassifier("dot")
    with pytest.raises(ValueError, match="fit first"):
        PrototypeClassifier().predict(X)
    with pytest.raises(ValueError, match="fit first"):
        PrototypeClassifier().add_classes(X, Y)
    with pytest.raises(ValueError, match="expected"):
        PrototypeClassifier().fit(X, Y[:3])
    with pytest.raises(ValueError, match="expected"):
        PrototypeClassifier().fit(X[:0], Y[:0])
    with pytest.raises(ValueError, match="embeddings must be"):
        PrototypeClassifier().fit(X, Y).predict(X[:, :2])


def test_the_two_scenarios_by_counting():
    known, novel = Y < 4, Y >= 4
    parts = (X[:60][known[:60]], Y[:60][known[:60]]), (X[60:][known[60:]], Y[60:][known[60:]])
    new = X[novel], Y[novel]
    got = evaluate_novel(*parts, new, shots=3, draws=1, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(len(new[1]), generator=torch.Generator().manual_seed(3))
    taken = torch.cat([order[new[1][order] == c][:3] for c in (4, 5)])
    rest = torch.tensor([i for i in range(len(new[1])) if i not in taken.tolist()])
    reference = load_reference("hyperspherical-softmax", "nearest_prototype")
    support = torch.cat([parts[0][0], new[0][taken]]), torch.cat([parts[0][1], new[1][taken]])
    shots = new[0][taken], new[1][taken]
    disjoint = (reference(*shots, new[0][rest]) == new[1][rest]).double().mean().item()
    a = (reference(*support, new[0][rest]) == new[1][rest]).double().mean().item()
    b = (reference(*support, parts[1][0]) == parts[1][1]).double().mean().item()
    expected = {"disjoint": disjoint, "joint_novel": a, "joint_known": b, "joint": 2 * a * b / (a + b)}
    assert got == pytest.approx(expected)
    assert disjoint >= a


def test_scenarios_refuse_what_makes_no_sense():
    known, novel = Y < 4, Y >= 4
    parts = (X[known], Y[known]), (X[known], Y[known])
    with pytest.raises(ValueError, match="the smallest has 20"):
        evaluate_novel(*parts, (X[novel], Y[novel]), shots=20)
    with pytest.raises(ValueError, match="are there already"):
        evaluate_novel(*parts, (X, Y), shots=3)
