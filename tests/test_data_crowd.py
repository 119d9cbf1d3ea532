"""Simulated crowds against what they promise, and the loaders on tiny files of the public formats."""

import gzip

import pytest
import torch

from lib.data import cifar10h_crowd, rte_crowd, simulated_crowd


def test_sizes_and_seeds():
    targets = torch.arange(10).repeat(30)
    t, w, labels = simulated_crowd(targets, seed=1)
    each = torch.bincount(t)
    assert len(each) == 300 and each.min() == 3 and each.max() == 5
    assert torch.bincount(w).min() > 0 and len(torch.bincount(w)) == 30
    assert len(torch.unique(t * 30 + w)) == len(t)  # nobody votes twice on an item
    again = simulated_crowd(targets, seed=1)
    assert all(torch.equal(a, b) for a, b in zip((t, w, labels), again, strict=True))
    assert not torch.equal(simulated_crowd(targets, seed=2)[2][:500], labels[:500])


def accuracy_by_worker(targets, votes):
    t, w, labels = votes
    right = (labels == targets[t]).double()
    return torch.bincount(w, right) / torch.bincount(w)


def test_kinds():
    targets = torch.arange(10).repeat(300)
    size = {"workers": 12, "per_item": (12, 12)}
    mixed = accuracy_by_worker(targets, simulated_crowd(targets, kind="mixed", **size))
    assert mixed[2::3].max() < 0.2 and mixed[0::3].min() > 0.97 and 0.4 < mixed[1::3].mean() < 0.85
    spam = accuracy_by_worker(targets, simulated_crowd(targets, kind="spam", **size))
    assert spam[0::2].min() > 0.68 and spam[1::2].max() < 0.45
    t, _, labels = simulated_crowd(targets, kind="confusion", **size)
    threes, fives = labels[targets[t] == 3], labels[targets[t] == 5]
    assert set(threes.tolist()) == {3, 8} and set(fives.tolist()) == set(range(10))
    difficulty = torch.tensor([0.0, 1.0]).repeat(1500)
    t, _, labels = simulated_crowd(targets, kind="glad", difficulty=difficulty, **size)
    right = (labels == targets[t]).double()
    assert right[difficulty[t] == 0].mean() > right[difficulty[t] == 1].mean() + 0.3


def test_rte(tmp_path):
    path = tmp_path / "rte.standardized.tsv"
    path.write_text(
        "!amt_annotation_ids\t!amt_worker_ids\torig_id\tresponse\tgold\n"
        "a\tX\t266\t1\t1\nb\tY\t266\t0\t1\nc\tX\t12\t0\t0\n"
    )
    t, w, labels, gold = rte_crowd(path)
    assert (t.tolist(), w.tolist(), labels.tolist(), gold.tolist()) == (
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [1, 0],
    )
    with pytest.raises(FileNotFoundError):
        rte_crowd(tmp_path / "none.tsv")
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="missing"):
        rte_crowd(path)


def test_cifar10h(tmp_path):
    path = tmp_path / "cifar10h-raw.csv.gz"
    content = "annotator_id,trial_index,chosen_label,cifar10_test_test_idx\n0,0,3,1\n0,1,5,0\n7,0,3,1\n7,1,2,-99999\n"
    path.write_bytes(gzip.compress(content.encode()))
    t, w, labels = cifar10h_crowd(path)
    assert (t.tolist(), w.tolist(), labels.tolist()) == ([1, 0, 1], [0, 0, 1], [3, 5, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "good"},
        {"per_item": (3, 31)},
        {"per_item": (0, 3)},
        {"num_classes": 4},
        {"pairs": ((3, 10),)},
        {"difficulty": torch.zeros(3)},
        {"difficulty": torch.full((10,), 2.0)},
    ],
)
def test_bad_input(options):
    with pytest.raises(ValueError):
        simulated_crowd(torch.arange(10), **options)
