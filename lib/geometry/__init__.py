"""The geometry of features and classifiers: frames and collapse."""

from lib.geometry.collapse import UFMSolution, nc_metrics, target_gram, ufm_closed_form

__all__ = ["UFMSolution", "nc_metrics", "target_gram", "ufm_closed_form"]
