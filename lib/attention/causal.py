"""Who sees whom in causal attention."""

import torch


def causal_mask(queries: int, keys: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Which keys each query sees, boolean (queries, keys): those up to its own place, the queries being the last tokens.

    Raises:
        ValueError: more queries than keys.
    """
    if queries > keys:
        raise ValueError(f"causal attention needs at least as many keys as queries, got {keys} and {queries}")
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
