"""A classifier without trained parameters: cosines to fixed basis vectors."""

import torch
import torch.nn.functional as F
from torch import nn


class EBVHead(nn.Module):
    """Logits are the cosines of the features with fixed unit vectors, divided by a temperature (Shen et al. 2023).

    The vectors are a buffer: they move with the module and are saved with it, but no optimizer sees them.

    Args:
        basis: unit rows, one a class, (C, d), as `lib.geometry.equiangular_basis` makes them.
        temperature: of the softmax, positive.

    Raises:
        ValueError: rows that are not of length one, or a temperature that is not positive.
    """

    def __init__(self, basis: torch.Tensor, temperature: float = 0.07):
        super().__init__()
        if basis.ndim != 2 or ((basis.norm(dim=1) - 1).abs() > 1e-4).any():
            raise ValueError(f"basis must be unit rows of shape (C, d), got shape {tuple(basis.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.register_buffer("basis", basis.clone())
        self.temperature = temperature

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, d) to (batch, C).

        Raises:
            ValueError: features of another dimension than the basis.
        """
        if features.shape[-1] != self.basis.shape[1]:
            raise ValueError(f"features must end in {self.basis.shape[1]}, got shape {tuple(features.shape)}")
        return F.normalize(features, dim=-1) @ self.basis.T / self.temperature

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """The class whose vector is nearest on the sphere, (batch, d) to (batch,)."""
        return self(features).argmax(-1)
