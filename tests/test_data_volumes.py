"""lib.data.volumes, lib.models.UNet3D, lib.train.sliding_window_predict and lib.geometry.surfaces."""

import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from torch import nn

from lib.data import cutmix3d, nrrd, paired_crops, phantoms
from lib.geometry import average_surface_distance, dice_score, hd95, jaccard, surface_distances
from lib.models import UNet3D
from lib.train import sliding_window_predict


def inside(crop, box):
    return crop[(..., *(slice(*edge) for edge in box.tolist()))]


def test_paired_crops_by_coordinates():
    """Every voxel carries its own coordinates, so the overlap can be computed as a set."""
    shape, size = (9, 11, 8), (4, 5, 3)
    volume = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"))  # (3, 9, 11, 8)
    generator = torch.Generator().manual_seed(0)
    empty, starts = 0, set()
    for _ in range(1000):
        a, b, box_a, box_b = paired_crops(volume, size, generator=generator)
        assert a.shape == b.shape == (3, *size)
        assert torch.equal(inside(a, box_a), inside(b, box_b))
        both = {tuple(v) for v in a.reshape(3, -1).T.tolist()} & {
            tuple(v) for v in b.reshape(3, -1).T.tolist()
        }
        assert both == {tuple(v) for v in inside(a, box_a).reshape(3, -1).T.tolist()}
        empty += not both
        starts.add(tuple(a[:, 0, 0, 0].tolist()))
        if not both:
            assert not box_a.any() and not box_b.any()
    assert 0 < empty < 1000
    assert [max(s[k] for s in starts) for k in range(3)] == [5, 6, 5] and min(starts) == (0, 0, 0)


def test_paired_crops_of_a_whole_volume_and_bad_input():
    a, b, box_a, box_b = paired_crops(torch.rand(4, 4, 4), 4)
    assert torch.equal(a, b) and box_a.tolist() == box_b.tolist() == [[0, 4]] * 3
    for volume, size in (
        (torch.rand(4, 4), 2),
        (torch.rand(4, 4, 4), 5),
        (torch.rand(4, 4, 4), (2, 2)),
        (a, 0),
    ):
        with pytest.raises(ValueError, match="must be"):
            paired_crops(volume, size)


@pytest.mark.parametrize("full_depth", [True, False])
def test_cutmix_pastes_one_box_into_all(full_depth):
    volumes = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 6, 8, 10)
    shares = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        image, label = cutmix3d(volumes, volumes[:, 0], full_depth=full_depth, generator=generator)
        assert torch.equal(image[:, 0], image[:, 1]) and torch.equal(image[:, 0], label)
        for i in range(5):
            pasted = label[i] != i
            assert len(label[i][pasted].unique()) <= 1
            if pasted.any():
                shares.append(pasted.double().mean().item())
                edges = [len(pasted.nonzero()[:, k].unique()) for k in range(3)]
                assert np.prod(edges) == pasted.sum() and (not full_depth or edges[2] == 10)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert volumes[1].eq(1).all()  # the input is left alone
    for bad in (lambda: cutmix3d(volumes, alpha=0), lambda: cutmix3d(volumes, volumes[:3])):
        with pytest.raises(ValueError):
            bad()


def test_phantoms():
    images, labels = phantoms(6, seed=3)
    assert images.shape == (6, 1, 16, 16, 16) and labels.shape == (6, 16, 16, 16)
    assert images.dtype == torch.float32 and set(labels.unique().tolist()) == {0, 1}
    assert torch.equal(images, phantoms(6, seed=3)[0]) and not torch.equal(images, phantoms(6, seed=4)[0])
    assert images.mean((1, 2, 3, 4)).abs().max() < 1e-5
    centers = {
        context: torch.stack([mask.nonzero().double().mean(0) for mask in phantoms(6, context=context)[1]])
        for context in ("normal", "moved")
    }
    assert (centers["normal"][:, 1] < 6).all() and (centers["moved"][:, 2] < 6).all()
    assert (centers["moved"][:, 1] > 5).all()
    assert phantoms(1, size=24)[0].shape[-1] == 24
    for arguments in ({"context": "odd"}, {"size": 8}, {"n": 0}):
        with pytest.raises(ValueError):
            phantoms(**{"n": 1} | arguments)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd(tmp_path, encoding):
    voxels = np.arange(24, dtype="<i2").reshape(2, 3, 4, order="F")
    data = voxels.tobytes(order="F")
    head = f"NRRD0004\n# a comment\ntype: short\ndimension: 3\nsizes: 2 3 4\nendian: little\nencoding: {encoding}\n\n"
    path = tmp_path / "scan.nrrd"
    path.write_bytes(head.encode() + (gzip.compress(data) if encoding == "gzip" else data))
    assert np.array_equal(nrrd(path).numpy(), voxels)
    for broken in (
        b"PNG" + head.encode(), head.replace("2 3 4", "2 3 5").encode() + data, head.replace("short", "block").encode()
    ):  # fmt: skip
        path.write_bytes(broken if b"2 3 5" not in broken or encoding == "raw" else head.encode()[:-60])
        with pytest.raises(ValueError):
            nrrd(path)


def test_unet():
    model = UNet3D(2, 3, width=4, depth=2)
    volumes = torch.randn(2, 2, 8, 4, 12)
    assert model(volumes).shape == (2, 3, 8, 4, 12)
    model(volumes).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    for bad in (torch.zeros(2, 2, 6, 4, 4), torch.zeros(2, 4, 4, 4)):
        with pytest.raises(ValueError, match="4 divides"):
            model(bad)
    with pytest.raises(ValueError, match="at least 1"):
        UNet3D(depth=0)


class Position(nn.Module):
    """Logits that know where in the window a voxel is."""

    def forward(self, x):
        ramp = torch.arange(x.shape[-1]).expand_as(x[:, 0]).float()
        return torch.stack([ramp, x[:, 0]], 1)


def test_sliding_window_against_loops():
    volumes = torch.randn(3, 1, 5, 7, 4)
    model = Position().train()
    result = sliding_window_predict(model, volumes, (3, 4, 4), stride=(2, 2, 1), batch_size=2)
    total, seen = torch.zeros(3, 2, 5, 7, 4), torch.zeros(5, 7, 4)
    for i in (0, 2):
        for j in (0, 2, 3):
            total[:, :, i : i + 3, j : j + 4] += model(volumes[:, :, i : i + 3, j : j + 4]).softmax(1)
            seen[i : i + 3, j : j + 4] += 1
    torch.testing.assert_close(result, total / seen)
    assert model.training
    torch.testing.assert_close(result.sum(1), torch.ones(3, 5, 7, 4))
    for size, stride in ((8, 2), (3, 4), (3, 0), ((3, 3), 1)):
        with pytest.raises(ValueError, match="must be"):
            sliding_window_predict(model, volumes, size, stride=stride)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, (1.0, 2.0, 0.5)]))
def test_surface_distances_against_point_sets(seed, spacing):
    rng = np.random.default_rng(seed)
    masks = rng.random((2, 5, 6, 4)) < rng.uniform(0.2, 0.8)
    if not masks.any((1, 2, 3)).all():
        return
    points = []
    for mask in masks:
        padded = np.pad(mask, 1)
        neighbours = [np.roll(padded, step, axis) for axis in range(3) for step in (-1, 1)]
        edge = padded & ~np.logical_and.reduce(neighbours)
        points.append((np.argwhere(edge) - 1) * np.asarray(spacing))
    table = cdist(*points)
    expected = np.concatenate([table.min(1), table.min(0)])
    distances = surface_distances(*masks, spacing=spacing)
    assert np.allclose(np.sort(distances), np.sort(expected))
    assert hd95(*masks, spacing=spacing) == pytest.approx(np.percentile(expected, 95))
    assert average_surface_distance(*masks, spacing=spacing) == pytest.approx(expected.mean())


def test_overlap_scores():
    first, second = np.zeros((2, 6, 6, 6))
    first[:4], second[2:] = 1, 1
    assert dice_score(first, second) == 0.5 and jaccard(first, second) == pytest.approx(1 / 3)
    nothing = np.zeros((6, 6, 6))
    assert dice_score(nothing, nothing) == jaccard(nothing, nothing) == 1 and hd95(nothing, nothing) == 0
    assert hd95(first, nothing) == average_surface_distance(nothing, first) == np.inf
    assert dice_score(first, nothing) == 0
    with pytest.raises(ValueError, match="one shape"):
        dice_score(first, first[:2])
