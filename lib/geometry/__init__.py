"""The geometry of features and classifiers: frames and collapse."""

from lib.geometry.collapse import UFMSolution, nc_metrics, target_gram, ufm_closed_form
from lib.geometry.equiangular import equiangular_basis, extend_basis, largest_cosine, welch_bound

__all__ = [
    "UFMSolution",
    "equiangular_basis",
    "extend_basis",
    "largest_cosine",
    "nc_metrics",
    "target_gram",
    "ufm_closed_form",
    "welch_bound",
]
