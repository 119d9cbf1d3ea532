"""The elementwise recurrence h_t = a_t h_{t-1} + b_t over the middle dimension."""

import torch

SIZES = {
    "cpu": [{"batch": 2, "length": 512, "channels": 2048}],
    "cuda": [
        {"batch": 8, "length": 2048, "channels": 1024},
        {"batch": 8, "length": 4096, "channels": 4096},
        {"batch": 2, "length": 2048, "channels": 32768},
    ],
}


def inputs(device, dtype, batch, length, channels):
    shape = (batch, length, channels)
    return {
        "decay": torch.sigmoid(torch.randn(shape, device=device, dtype=dtype) + 3).requires_grad_(),
        "inputs": torch.randn(shape, device=device, dtype=dtype, requires_grad=True),
    }


def peers(device, batch, length, channels):
    from lib.attention import diagonal_scan

    def doubling(decay, inputs):
        """After each sweep a step has absorbed twice as many before it; a loop over the steps cannot be compiled."""
        shift = 1
        while shift < length:
            inputs = torch.cat(
                [inputs[:, :shift], inputs[:, shift:] + decay[:, shift:] * inputs[:, :-shift]], 1
            )
            decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], 1)
            shift *= 2
        return inputs

    def book(impl):
        return lambda decay, inputs: diagonal_scan(decay, inputs, impl=impl)

    impls = ("torch", "triton") if device == "cuda" else ("torch",)
    return {"torch": doubling} | {f"book, {impl}": book(impl) for impl in impls}


def work(element_bytes, batch, length, channels):
    count = batch * length * channels
    return {
        "forward_bytes": 3 * count * element_bytes,
        "forward_flops": 2 * count,
        "backward_bytes": 5 * count * element_bytes,
        "backward_flops": 3 * count,
    }
