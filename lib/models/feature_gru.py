"""A recurrent classifier that reads the features of a table row one after the other."""

import torch
import torch.nn.functional as F
from torch import nn


class FeatureSequenceGRU(nn.Module):
    """A GRU over binned features, one feature a time step, with a linear head (Agarap 2017, section 2.3).

    Each feature is the index of its bin; step t of the sequence is the one-hot vector of feature t.

    Args:
        num_features: length of the sequence.
        num_bins: of every feature.
        hidden: width of the state.
        num_classes: number of logits.
        dropout: probability that an input entry is dropped, as in the authors' code (they drop 0.15).

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        num_features: int,
        num_bins: int,
        *,
        hidden: int = 32,
        num_classes: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        sizes = {
            "num_features": num_features,
            "num_bins": num_bins,
            "hidden": hidden,
            "num_classes": num_classes,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_features, self.num_bins, self.dropout = num_features, num_bins, dropout
        self.gru = nn.GRU(num_bins, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_classes)

    def features(self, bins: torch.Tensor) -> torch.Tensor:
        """The last state, (batch, hidden), of bin indices (batch, num_features).

        Raises:
            TypeError: bins that are not integers.
            ValueError: another number of features.
            RuntimeError: an index that is negative or not below `num_bins`.
        """
        if bins.is_floating_point():
            raise TypeError(f"bins must be integer indices, got {bins.dtype}")
        if bins.dim() != 2 or bins.shape[1] != self.num_features:
            raise ValueError(f"bins must be (batch, {self.num_features}), got {tuple(bins.shape)}")
        inputs = F.one_hot(bins.long(), self.num_bins).to(self.head.weight.dtype)
        _, last = self.gru(F.dropout(inputs, self.dropout, self.training))
        return last[0]

    def forward(self, bins: torch.Tensor) -> torch.Tensor:
        """Logits, (batch, num_classes), of bin indices (batch, num_features)."""
        return self.head(self.features(bins))
