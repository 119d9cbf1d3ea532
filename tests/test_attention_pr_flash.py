"""lib.attention.pr_flash against torch's attention with the block mask written out."""

import pytest
import torch
import torch.nn.functional as F

from lib.attention import draw_blocks, keep_probabilities, pr_flash_attention
from lib.book import load_reference

DOUBLE = {"dtype": torch.float64}


def draw(*shape, seed=0):
    return torch.randn(*shape, **DOUBLE, generator=torch.Generator().manual_seed(seed))


def far(r):
    return 1 / (1 + r)


def dense(q, k, v, block, seed, reweight, scale=None):
    queries, keys = q.shape[-2], k.shape[-2]
    blocks = -(-keys // block)
    kept = draw_blocks(blocks, far, seed=seed)
    bias = torch.full((queries, keys), -torch.inf, **DOUBLE)
    for i in range(queries):
        here = keys - queries + i
        for j in range(here + 1):
            if kept[here // block, j // block]:
                r = here // block - j // block
                bias[i, j] = -torch.tensor(far(r), **DOUBLE).log() if reweight else 0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


@pytest.mark.parametrize("reweight", [False, True])
@pytest.mark.parametrize("lengths", [(16, 16), (19, 19), (3, 19), (6, 18), (1, 1), (9, 17)])
@pytest.mark.parametrize("block", [1, 4, 32])
def test_values_and_gradients(lengths, block, reweight):
    queries, keys = lengths
    q, k, v = draw(2, 3, queries, 4), draw(2, 3, keys, 4, seed=1), draw(2, 3, keys, 5, seed=2)
    for x in (q, k, v):
        x.requires_grad_()
    out = pr_flash_attention(q, k, v, block=block, keep=far, seed=5, reweight=reweight)
    expected = dense(q, k, v, block, 5, reweight)
    torch.testing.assert_close(out, expected)
    probe = draw(*out.shape, seed=3)
    for a, b in zip(
        torch.autograd.grad((out * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_keeping_all_is_attention_with_shared_keys():
    q, k, v = draw(2, 4, 20, 6), draw(2, 1, 20, 6, seed=1), draw(1, 20, 6, seed=2)  # one head of keys
    out = pr_flash_attention(q, k, v, block=8, keep=lambda r: 1.0, seed=0, reweight=True, scale=0.3)
    expected = F.scaled_dot_product_attention(
        q, k.expand(2, 4, 20, 6), v.expand(2, 4, 20, 6), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(out, expected)
    low = pr_flash_attention(q.float() * 100, k.float(), v.float(), block=8, keep=lambda r: 1.0, seed=0)
    assert low.dtype == torch.float32 and low.isfinite().all()


def test_draws():
    kept = draw_blocks(40, far, seed=1)
    assert kept.diagonal().all() and not kept.triu(1).any()
    assert torch.equal(kept[:15, :15], draw_blocks(15, far, seed=1))  # a longer sequence only adds rows
    assert not torch.equal(kept, draw_blocks(40, far, seed=2))
    many = torch.stack([draw_blocks(10, far, seed=s) for s in range(400)]).double().mean(0)
    for r in range(10):
        p, n = far(r), 400 * (10 - r)
        assert abs(many.diagonal(-r).mean() - p) <= 4 * (p * (1 - p) / n) ** 0.5
    assert draw_blocks(0, far, seed=0).shape == (0, 0)


def test_bad_input():
    q = draw(1, 8, 4)
    for keep in (lambda r: 0.5, lambda r: 0.0):
        with pytest.raises(ValueError, match="diagonal block is always kept"):
            pr_flash_attention(q, q, q, keep=keep, seed=0)
    with pytest.raises(ValueError, match="probabilities"):
        keep_probabilities(3, lambda r: 1.0 + r)
    with pytest.raises(ValueError, match="block must be"):
        pr_flash_attention(q, q, q, block=0, keep=far, seed=0)
    with pytest.raises(ValueError, match="last positions"):
        pr_flash_attention(q, q[:, :4], q[:, :4], keep=far, seed=0)


@pytest.mark.parametrize("reweight", [False, True])
def test_reference_cell(reweight):
    reference = load_reference("probabilistic-flash-attention", "random_block_attention")
    q, k, v = draw(12, 4), draw(12, 4, seed=1), draw(12, 3, seed=2)
    chances = torch.tensor([far(r) for r in range(3)], **DOUBLE) if reweight else None
    expected = reference(q, k, v, draw_blocks(3, far, seed=4), 4, chances)
    out = pr_flash_attention(q, k, v, block=4, keep=far, seed=4, reweight=reweight)
    torch.testing.assert_close(out, expected)
