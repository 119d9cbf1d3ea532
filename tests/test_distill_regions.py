"""Stored soft labels of stored crops, their compression and their calibration."""

import pytest
import torch
import torch.nn.functional as F

from lib.distill import SoftLabelBank, calibrate_regions, compress_topk, recover_topk


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def distributions(*shape, seed=0):
    return (2 * torch.randn(*shape, generator=rng(seed))).softmax(-1)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("mode", ["smoothing", "renorm"])
def test_compression_against_a_loop(k, mode):
    labels = distributions(4, 5, 7)
    indices, values = compress_topk(labels, k)
    assert indices.shape == values.shape == (4, 5, k)
    recovered = recover_topk(indices.to(torch.int16), values, 7, mode)
    for label, got in zip(labels.flatten(0, 1).tolist(), recovered.flatten(0, 1).tolist(), strict=True):
        top = sorted(range(7), key=lambda j, label=label: -label[j])[:k]
        mass = sum(label[j] for j in top)
        for j in range(7):
            if mode == "renorm":
                expected = label[j] / mass if j in top else 0
            else:
                expected = label[j] if j in top else (1 - mass) / (7 - k)
            assert got[j] == pytest.approx(expected, abs=1e-6)
        assert sum(got) == pytest.approx(1, abs=1e-6)
    if k == 7:
        torch.testing.assert_close(recovered, labels)
    if mode == "smoothing":
        assert torch.equal(recovered.topk(k, -1).values, values)


def test_calibration_by_hand():
    labels = torch.tensor([[0.05, 0.9, 0.05], [0.4, 0.35, 0.25], [0.9, 0.06, 0.04], [0.95, 0.03, 0.02]])
    targets = torch.zeros(4, dtype=torch.long)
    options = dict(low=0.1, high=0.9, label_smoothing=0.3)
    out = calibrate_regions(labels[:, 0], labels, targets, **options)
    assert out.category.tolist() == [0, 1, 2, 2] and out.keep.all()
    torch.testing.assert_close(out.labels, torch.tensor([[0.8, 0.1, 0.1], *labels[1:].tolist()]))
    for share, kept in ((0.5, [1, 1, 1, 0]), (1.0, [1, 1, 0, 0]), (0.4, [1, 1, 1, 1])):
        out = calibrate_regions(labels[:, 0], labels, targets, drop_easy=share, **options)
        assert out.keep.tolist() == [bool(each) for each in kept]


def test_calibration_of_any_shape_leaves_its_input_alone():
    labels = distributions(6, 4, 5)
    targets = torch.randint(5, (6, 4), generator=rng(1))
    before = labels.clone()
    q = labels.gather(-1, targets[..., None])[..., 0]
    low, high = q.quantile(0.25).item(), q.quantile(0.75).item()
    out = calibrate_regions(q, labels, targets, low=low, high=high, drop_easy=1.0)
    flat = calibrate_regions(
        q.flatten(), labels.flatten(0, 1), targets.flatten(), low=low, high=high, drop_easy=1.0
    )
    assert torch.equal(labels, before)
    assert torch.equal(out.labels.flatten(0, 1), flat.labels) and torch.equal(out.keep.flatten(), flat.keep)
    assert torch.equal(out.keep, out.category != 2)
    context = out.category == 0
    assert (out.labels[context].argmax(-1) == targets[context]).all()
    assert torch.equal(out.labels[~context], labels[~context])
    torch.testing.assert_close(out.labels.sum(-1), torch.ones(6, 4))


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.seen = torch.nn.Linear(36, 5), 0

    def forward(self, x):
        self.seen += len(x)
        return self.layer(x.flatten(1))


@pytest.mark.parametrize("mode", ["full", "smoothing", "renorm"])
def test_bank_replays_crops_and_labels(mode):
    images, teacher = torch.rand(10, 1, 9, 9, generator=rng()), Counting()
    bank = SoftLabelBank(images, 3, size=6, k=5, mode=mode, generator=rng(1))
    with pytest.raises(RuntimeError, match="build"):
        bank.labels()
    assert bank.build(teacher, batch_size=4) is bank and teacher.seen == 30
    index = torch.tensor([7, 2])
    assert torch.equal(bank.crops(index), bank.crops()[index])
    assert torch.equal(bank.labels(index), bank.labels()[index])
    assert teacher.seen == 30
    with torch.no_grad():
        again = teacher(bank.crops().flatten(0, 1)).softmax(-1).reshape(10, 3, 5)
    torch.testing.assert_close(bank.labels(), again)
    assert not bank.labels().requires_grad
    parameters, label = bank.get(7, 1)
    assert torch.equal(parameters, bank.parameters[7, 1]) and torch.equal(label, bank.labels()[7, 1])
    assert 0 < bank.parameters[..., 4].sum() < 30 and len(bank) == 10


def test_bank_relabels_and_counts_its_bytes():
    images = torch.rand(4, 1, 9, 9, generator=rng())
    bank = SoftLabelBank(images, 2, size=6, k=3)
    labels = distributions(4, 2, 10)
    bank.relabel(labels)
    assert bank.nbytes == 8 * (5 * 2 + 1 + 3 * (2 + 4))
    torch.testing.assert_close(bank.labels(), recover_topk(*compress_topk(labels, 3), 10))
    hard = F.one_hot(torch.randint(10, (4, 2), generator=rng()), 10) * 0.9 + 0.01
    keep = torch.rand(4, 2, generator=rng()) < 0.5
    bank.relabel(hard, keep)
    torch.testing.assert_close(bank.labels(), hard)  # nothing is lost of a softened hard label
    assert torch.equal(bank.keep, keep)


def test_bad_input():
    labels, targets = distributions(3, 4), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match="k must"):
        compress_topk(labels, 5)
    with pytest.raises(ValueError, match="distributions"):
        compress_topk(labels * 2, 2)
    indices, values = compress_topk(labels, 2)
    for arguments in (
        (indices, values[:2], 4), (indices, values, 1), (indices + 3, values, 4), (indices, values, 4, "full"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            recover_topk(*arguments)
    q = labels.gather(1, targets[:, None])[:, 0]
    for change in ({"low": 0.9}, {"label_smoothing": 1.1}, {"drop_easy": -0.1}):
        with pytest.raises(ValueError):
            calibrate_regions(q, labels, targets, **{"low": 0.1, "high": 0.8, **change})
    for arguments in ((q[:2], labels, targets), (q, labels[:, :3], targets), (q, labels, targets + 1)):
        with pytest.raises(ValueError):
            calibrate_regions(*arguments, low=0.1, high=0.9)
    with pytest.raises(TypeError):
        calibrate_regions(q, labels, targets.float(), low=0.1, high=0.9)
    images = torch.rand(3, 1, 8, 8)
    for options in ({"k": 0}, {"mode": "half"}, {"area": (0, 1)}):
        with pytest.raises(ValueError):
            SoftLabelBank(images, 2, size=4, **options)
    with pytest.raises(ValueError):
        SoftLabelBank(images[0], 2, size=4)
    bank = SoftLabelBank(images, 2, size=4)
    with pytest.raises(ValueError, match="labels"):
        bank.relabel(distributions(3, 3, 4))
