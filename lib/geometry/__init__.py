"""The geometry of features, classifiers and segmentations: frames, collapse, diversity, overlap and surfaces."""

from lib.geometry.collapse import UFMSolution, nc_metrics, target_gram, ufm_closed_form
from lib.geometry.diversity import feature_diversity
from lib.geometry.equiangular import equiangular_basis, extend_basis, largest_cosine, welch_bound
from lib.geometry.surfaces import (
    average_surface_distance,
    dice_score,
    hd95,
    jaccard,
    surface_distances,
)

__all__ = [
    "UFMSolution",
    "average_surface_distance",
    "dice_score",
    "equiangular_basis",
    "extend_basis",
    "feature_diversity",
    "hd95",
    "jaccard",
    "largest_cosine",
    "nc_metrics",
    "surface_distances",
    "target_gram",
    "ufm_closed_form",
    "welch_bound",
]
