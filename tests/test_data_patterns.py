"""Patterns on a sphere: the label is invariant, and the loader reads the original's format."""

import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from lib.data import szt_file, szt_patterns
from lib.data.patterns import _icosahedron


def test_icosahedron():
    points = _icosahedron()
    cosine = (points @ points.T).round(decimals=9)
    assert len(cosine.unique()) == 4 and ((cosine == round(5**-0.5, 9)).sum(1) == 5).all()


def test_label_is_the_same_for_turned_patterns():
    patterns, labels = szt_patterns(generator=torch.Generator().manual_seed(1))
    assert patterns.shape == (4096, 12) and len(patterns.unique(dim=0)) == 4096
    assert 0.4 < labels.double().mean() < 0.6
    points = _icosahedron().numpy()
    place = 2 ** np.arange(11, -1, -1)
    turns = [Rotation.create_group("I").as_matrix()[k] for k in range(60)] + [-np.eye(3)]
    frame = None  # the group of scipy may stand turned against these vertices: find a frame that fits
    for quarter in (np.eye(3), Rotation.from_euler("z", 90, degrees=True).as_matrix()):
        moved = [points @ quarter @ turn.T @ quarter.T for turn in turns]
        nearest = [np.linalg.norm(m[:, None] - points[None], axis=-1) for m in moved]
        if max(distance.min(1).max() for distance in nearest) < 1e-9:
            frame = [distance.argmin(1) for distance in nearest]
    assert frame is not None
    for order in frame:
        turned = patterns.numpy()[:, order]
        assert np.array_equal(labels.numpy(), labels.numpy()[(turned @ place).astype(int)])


def test_sizes_and_generator():
    patterns, labels = szt_patterns(6, torch.Generator().manual_seed(0))
    assert patterns.shape == (64, 6) and patterns.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(labels, szt_patterns(6, torch.Generator().manual_seed(0))[1])
    for bad in (1, 21):
        with pytest.raises(ValueError, match="n_inputs"):
            szt_patterns(bad)


def test_file(tmp_path):
    patterns, labels = np.eye(3, dtype=np.uint8), np.array([[1, 0, 1]], dtype=np.uint8)
    savemat(tmp_path / "var_u.mat", {"F": patterns, "y": labels})
    x, y = szt_file(tmp_path / "var_u.mat")
    assert torch.equal(x, torch.eye(3)) and y.tolist() == [1, 0, 1] and y.dtype == torch.int64
    savemat(tmp_path / "bad.mat", {"F": patterns})
    with pytest.raises(ValueError, match="F and y"):
        szt_file(tmp_path / "bad.mat")
    savemat(tmp_path / "short.mat", {"F": patterns, "y": labels[:, :2]})
    with pytest.raises(ValueError, match="labels"):
        szt_file(tmp_path / "short.mat")
    with pytest.raises(FileNotFoundError):
        szt_file(tmp_path / "none.mat")
