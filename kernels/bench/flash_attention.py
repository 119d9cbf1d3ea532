"""Attention without its weights: entropy, softplus, Hopfield steps, sampled blocks, linear biases."""

import math

import torch
import torch.nn.functional as F

SIZES = {
    "cpu": [
        {"kind": "entropy", "batch": 1, "heads": 1, "length": 4096, "dim": 64},
        {"kind": "softplus", "batch": 1, "heads": 1, "length": 4096, "dim": 64},
        {"kind": "softplus", "batch": 1, "heads": 1, "length": 4096, "dim": 64, "p": 15.0},
        {"kind": "hopfield", "batch": 1, "heads": 1, "length": 4096, "dim": 64, "states": 1024},
        {"kind": "pr_flash", "batch": 1, "heads": 1, "length": 4096, "dim": 64},
    ],
    "cuda": [
        {"kind": "entropy", "batch": 8, "heads": 16, "length": 1024, "dim": 64},
        *(
            {"kind": kind, "batch": 4, "heads": 16, "length": 4096, "dim": 64, **more}
            for kind, more in (
                ("entropy", {}),
                ("softplus", {}),
                ("softplus", {"p": 15.0}),
                ("hopfield", {"states": 64}),
                ("hopfield", {"states": 4096}),
                ("pr_flash", {}),
                ("alibi", {}),
            )
        ),
        {"kind": "entropy", "batch": 2, "heads": 16, "length": 8192, "dim": 128},
        {"kind": "softplus", "batch": 2, "heads": 16, "length": 8192, "dim": 128},
    ],
}
STEPS = 3  # of the Hopfield network
BLOCK = 64  # of pr_flash


def _keep(distance):
    return 1.0 if distance < 4 else 4 / (distance + 1)


def inputs(device, dtype, kind, batch, heads, length, dim, states=None, p=None):
    def randn(rows):
        return torch.randn(batch, heads, rows, dim, device=device, dtype=dtype, requires_grad=True)

    if kind == "hopfield":
        return {"state": randn(states), "stored": randn(length)}
    return {"q": randn(length), "k": randn(length), "v": randn(length)}


def _hidden(q):
    length = q.shape[-2]
    return torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)


def _entropy(q, k, v):
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(_hidden(q), -math.inf)
    weights, logs = scores.softmax(-1), scores.log_softmax(-1)
    entropy = -(weights * logs.masked_fill(_hidden(q), 0.0)).sum(-1, keepdim=True)
    return weights @ v + entropy


def _softplus(p):
    def attend(q, k, v):
        seen = torch.arange(1, q.shape[-2] + 1, device=q.device, dtype=torch.float32)[:, None]
        cosines = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).mT
        weights = F.softplus(math.log(q.shape[-1]) * seen.log() * cosines).masked_fill(_hidden(q), 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
        if p is not None:
            excess = torch.relu(weights * seen - (seen > 3).float())
            excess = (excess / excess.amax(-1, keepdim=True).detach().clamp_min(1e-5)) ** p
            weights = excess / excess.sum(-1, keepdim=True)
        return weights.to(v.dtype) @ v

    return attend


def _hopfield(state, stored):
    for _ in range(STEPS):
        state = (state @ stored.mT * stored.shape[-1] ** -0.5).softmax(-1) @ stored
    return state


def _sampled(kept):
    def attend(q, k, v):
        length = q.shape[-2]
        seen = kept.to(q.device).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        seen = seen[:length, :length] & ~_hidden(q)
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf).softmax(-1) @ v

    return attend


def _alibi(q, k, v):
    from lib.attention import alibi_slopes, distance_bias

    length = q.shape[-2]
    bias = distance_bias(length, length, alibi_slopes(q.shape[1]).to(q), bias="linear", causal=True)
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


def peers(device, kind, batch, heads, length, dim, states=None, p=None):
    from lib.attention import (
        entropy_attention,
        hopfield_retrieve,
        pr_flash_attention,
        rope_alibi,
        softplus_attention,
    )

    cuda = device == "cuda"
    name = f"book, {'triton' if cuda else 'chunked'}"
    impl = "triton" if cuda else "torch"
    flex = _flex() if cuda else None
    if kind == "entropy":

        def book(q, k, v):
            out, entropy = entropy_attention(q, k, v, causal=True, block_size=256, impl=impl)
            return out + entropy[..., None].to(out.dtype)

        return {"torch": _entropy, name: book}
    if kind == "softplus":
        block = None if cuda else 256
        return {
            "torch": _softplus(p),
            name: lambda q, k, v: softplus_attention(q, k, v, causal=True, p=p, block_size=block, impl=impl),
        }
    if kind == "hopfield":

        def fused(state, stored):
            for _ in range(STEPS):
                state = F.scaled_dot_product_attention(state, stored, stored)
            return state

        chunked = "triton" if cuda else "streaming"
        return {
            "torch": _hopfield,
            "SDPA": fused,
            name: lambda state, stored: hopfield_retrieve(state, stored, steps=STEPS, impl=chunked)[0],
        }
    if kind == "pr_flash":
        from lib.attention import draw_blocks

        kept = draw_blocks(math.ceil(length / BLOCK), _keep, seed=0)
        result = {
            "torch": _sampled(kept),
            name: lambda q, k, v: pr_flash_attention(q, k, v, block=BLOCK, keep=_keep, seed=0, impl=impl),
        }
        if flex:
            result["FlexAttention"] = _flex_sampled(flex, kept)
        return result
    result = {"torch": _alibi, "SDPA": _sdpa_alibi}
    if cuda:
        result[name] = lambda q, k, v: rope_alibi(
            q, k, v, bias="linear", rotate=False, causal=True, impl=impl
        )
    if flex:
        result["FlexAttention"] = _flex_alibi(flex)
    return result


def _sdpa_alibi(q, k, v):
    from lib.attention import alibi_slopes, distance_bias

    length = q.shape[-2]
    bias = distance_bias(length, length, alibi_slopes(q.shape[1]).to(q), bias="linear", causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _flex():
    try:
        from torch.nn.attention.flex_attention import flex_attention
    except ImportError:
        return None
    return torch.compile(flex_attention)


def _flex_mask(q, rule):
    from torch.nn.attention.flex_attention import create_block_mask

    length = q.shape[-2]
    return create_block_mask(rule, None, None, length, length, device=q.device)


def _flex_alibi(flex):
    from lib.attention import alibi_slopes

    made = {}

    def attend(q, k, v):
        if not made:  # once: the mask is no part of the work
            made["slopes"] = alibi_slopes(q.shape[1]).to(q.device)
            made["mask"] = _flex_mask(q, lambda batch, head, i, j: i >= j)
        slopes = made["slopes"]
        score = lambda s, batch, head, i, j: s - slopes[head] * (i - j)  # noqa: E731
        return flex(q, k, v, score_mod=score, block_mask=made["mask"])

    return attend


def _flex_sampled(flex, kept):
    made = {}

    def attend(q, k, v):
        if not made:
            listed = kept.to(q.device)
            rule = lambda batch, head, i, j: (i >= j) & listed[i // BLOCK, j // BLOCK]  # noqa: E731
            made["mask"] = _flex_mask(q, rule)
        return flex(q, k, v, block_mask=made["mask"])

    return attend


def work(element_bytes, kind, batch, heads, length, dim, states=None, p=None):
    rows = length if states is None else states
    row, column = batch * heads * rows * dim, batch * heads * length * dim
    pairs = batch * heads * rows * length
    if kind == "hopfield":
        return {
            "forward_bytes": ((STEPS + 1) * row + column) * element_bytes,
            "forward_flops": STEPS * 4 * pairs * dim,
            "backward_bytes": STEPS * (5 * row + 4 * column) * element_bytes,
            "backward_flops": STEPS * 14 * pairs * dim,
        }
    pairs /= 2
    if kind == "pr_flash":
        blocks = math.ceil(length / BLOCK)
        kept = sum((blocks - r) * _keep(r) for r in range(blocks))
        pairs = batch * heads * BLOCK * BLOCK * kept
    powers = p is not None
    return {
        "forward_bytes": (2 * row + 2 * column + powers * column) * element_bytes,
        "forward_flops": (6 if powers else 4) * pairs * dim,
        "backward_bytes": (5 * row + 6 * column) * element_bytes,
        "backward_flops": (16 if powers else 14) * pairs * dim,
    }
