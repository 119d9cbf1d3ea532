"""The wide layer of a mixture of hidden dimensions: each token computes some of the groups."""

import torch

SIZES = {
    "cpu": [{"tokens": 2048, "dim": 512, "groups": 8, "size": 256, "chosen": 2}],
    "cuda": [
        {"tokens": 4096, "dim": 1024, "groups": 16, "size": 128, "chosen": 4},
        {"tokens": 16384, "dim": 4096, "groups": 16, "size": 1024, "chosen": 4},
        {"tokens": 16384, "dim": 4096, "groups": 16, "size": 1024, "chosen": 8},
    ],
}


def inputs(device, dtype, tokens, dim, groups, size, chosen):
    scores = torch.rand(tokens, groups, device=device)
    return {
        "x": torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True),
        "weight": (torch.randn(groups, size, dim, device=device, dtype=dtype) / dim**0.5).requires_grad_(),
        "choice": scores.topk(min(chosen, groups), sorted=False).indices,
    }


def dense(x, weight, choice):
    """All groups, of which the chosen ones are taken."""
    y = (x @ weight.flatten(0, 1).T).unflatten(-1, weight.shape[:2])
    return y.gather(1, choice[..., None].expand(-1, -1, weight.shape[1]))


def sorted_copies(x, weight, choice):
    """Rows copied into the order of the groups, and PyTorch's grouped product, as in mixtures of experts."""
    order = choice.flatten().argsort(stable=True)
    counts = torch.zeros(len(weight), dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, choice.flatten(), torch.ones_like(choice.flatten(), dtype=torch.int32))
    y = torch.nn.functional.grouped_mm(
        x[order // choice.shape[1]], weight.mT, offs=counts.cumsum(0, dtype=torch.int32)
    )
    return y[order.argsort()].view(*choice.shape, -1)


def peers(device, **size):
    from lib.models import grouped_gather_linear

    impl = "triton" if device == "cuda" else "torch"
    result = {
        "torch": dense,
        f"book, {impl}": lambda x, weight, choice: grouped_gather_linear(x, weight, choice, impl=impl),
    }
    if device == "cuda" and hasattr(torch.nn.functional, "grouped_mm"):
        result["grouped_mm"] = sorted_copies
    return result


def work(element_bytes, tokens, dim, groups, size, chosen):
    words = tokens * dim + groups * size * dim + tokens * chosen * size
    flops = 2 * tokens * chosen * size * dim
    return {
        "forward_bytes": words * element_bytes,
        "forward_flops": flops,
        "backward_bytes": (2 * words + 2 * tokens * chosen * dim) * element_bytes,
        "backward_flops": 2 * flops,
    }
