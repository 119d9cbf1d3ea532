"""How well two segmentations agree: overlap of the volumes, distance of the surfaces."""

import numpy as np
from scipy.ndimage import binary_erosion, distance_transform_edt


def dice_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Twice the intersection over the sum of the sizes, in [0, 1]; two empty masks agree, 1.

    Args:
        predicted: mask, any shape; nonzero is foreground.
        truth: mask of that shape.

    Raises:
        ValueError: shapes differ.
    """
    predicted, truth = _masks(predicted, truth)
    size = predicted.sum() + truth.sum()
    return float(2 * (predicted & truth).sum() / size) if size else 1.0


def jaccard(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union, in [0, 1]; two empty masks agree, 1. Arguments as `dice_score`."""
    dice = dice_score(predicted, truth)
    return dice / (2 - dice)


def surface_distances(
    predicted: np.ndarray, truth: np.ndarray, *, spacing: float | tuple[float, ...] = 1.0
) -> np.ndarray:
    """Distances of the surface voxels of each mask to the nearest surface voxel of the other, all in one array.

    A surface voxel is a voxel of the mask with a face neighbour outside, or at the border of the array.

    Args:
        predicted: mask, any number of axes; nonzero is foreground.
        truth: mask of that shape.
        spacing: of the voxels, one length or one for each axis.

    Returns:
        Lengths in the unit of `spacing`, the surface of `predicted` first. Empty if both masks are; infinite if only
        one is.

    Raises:
        ValueError: shapes differ.
    """
    predicted, truth = _masks(predicted, truth)
    if not predicted.any() or not truth.any():
        return np.full(int(predicted.any() or truth.any()), np.inf)
    first, second = (mask & ~binary_erosion(mask) for mask in (predicted, truth))
    to_first, to_second = (distance_transform_edt(~edge, sampling=spacing) for edge in (first, second))
    return np.concatenate([to_second[first], to_first[second]])


def hd95(predicted: np.ndarray, truth: np.ndarray, *, spacing: float | tuple[float, ...] = 1.0) -> float:
    """95th percentile of `surface_distances`: the Hausdorff distance without its worst outliers. 0 for two empty masks."""
    distances = surface_distances(predicted, truth, spacing=spacing)
    return _summary(distances, lambda d: np.percentile(d, 95))


def average_surface_distance(
    predicted: np.ndarray, truth: np.ndarray, *, spacing: float | tuple[float, ...] = 1.0
) -> float:
    """Mean of `surface_distances`, both directions together. 0 for two empty masks, infinite if only one is."""
    return _summary(surface_distances(predicted, truth, spacing=spacing), np.mean)


def _summary(distances, statistic):
    if not distances.size:
        return 0.0
    return float(statistic(distances)) if np.isfinite(distances).all() else float("inf")


def _masks(predicted, truth):
    predicted, truth = np.asarray(predicted) != 0, np.asarray(truth) != 0
    if predicted.shape != truth.shape:
        raise ValueError(f"both masks need one shape, got {predicted.shape} and {truth.shape}")
    return predicted, truth
