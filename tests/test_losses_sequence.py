"""The edit-invariant loss against triple loops, a convolution with the identity, and cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F

from lib.book import load_reference
from lib.losses import eisl, ngram_match_map


def case(batch=3, outputs=7, length=6, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, outputs, tokens, dtype=torch.float64, generator=generator)
    return logits.log_softmax(-1), torch.randint(tokens, (batch, length), generator=generator)


def by_loops(log_probs, targets, ngrams, tau=1.0):
    total = 0.0
    for row, y in zip(log_probs, targets, strict=True):
        for n in ngrams:
            losses = []
            for i in range(len(y) - n + 1):
                g = torch.stack(
                    [sum(row[t + j, y[i + j]] for j in range(n)) / n for t in range(len(row) - n + 1)]
                )
                losses.append(-(torch.softmax(g / tau, 0) * g).sum())
            total = total + sum(losses) / len(losses) / len(ngrams)
    return total / len(targets)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_map_is_a_convolution_with_the_identity(n):
    log_probs, targets = case()
    gathered = log_probs.gather(2, targets[:, None].expand(-1, 7, -1))
    expected = F.conv2d(gathered[:, None], torch.eye(n, dtype=torch.float64)[None, None])[:, 0]
    torch.testing.assert_close(ngram_match_map(log_probs, targets, n), expected)


@pytest.mark.parametrize("ngrams, tau", [((2,), 1.0), ((1, 2, 3), 0.5), ((6,), 2.0)])
def test_values_and_gradients_by_loops(ngrams, tau):
    log_probs, targets = case()
    log_probs.requires_grad_()
    mine = eisl(log_probs, targets, ngrams=ngrams, tau=tau, gumbel=False)
    loops = by_loops(log_probs, targets, ngrams, tau)
    torch.testing.assert_close(mine, loops)
    torch.testing.assert_close(
        torch.autograd.grad(mine, log_probs)[0], torch.autograd.grad(loops, log_probs)[0]
    )


def test_reference_is_the_oracle():
    reference = load_reference("edit-invariant-loss", "edit_invariant_loss")
    log_probs, targets = case(batch=2)
    for ngrams in [(2,), (2, 3, 4)]:
        rows = [reference(p, y, ngrams) for p, y in zip(log_probs, targets, strict=True)]
        torch.testing.assert_close(
            eisl(log_probs, targets, ngrams=ngrams, gumbel=False, reduction="none"), torch.stack(rows)
        )


def test_whole_sequence_is_cross_entropy():
    log_probs, targets = case(outputs=6)
    torch.testing.assert_close(
        eisl(log_probs, targets, ngrams=(6,), gumbel=True),
        F.nll_loss(log_probs.flatten(0, 1), targets.flatten()),
    )


def test_padding_equals_cutting():
    log_probs, targets = case(outputs=8, length=8, tokens=6)
    targets = targets.clamp_min(1)
    lengths, outputs = torch.tensor([8, 5, 3]), torch.tensor([8, 6, 4])
    padded = targets.masked_fill(torch.arange(8) >= lengths[:, None], 0)
    options = dict(ngrams=(2, 3, 5), weights=(1, 2, 3), gumbel=False, reduction="none")
    together = eisl(log_probs, padded, pad_id=0, output_lengths=outputs, **options)
    alone = [
        eisl(log_probs[b : b + 1, :o], targets[b : b + 1, :s], **options)
        for b, (s, o) in enumerate(zip(lengths, outputs, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    naive = eisl(log_probs, padded, **options)
    assert (naive[1:] - together[1:]).abs().min() > 1e-3


def test_rows_without_ngrams_count_nothing():
    log_probs, targets = case()
    targets = targets.clamp_min(1)
    targets[1, 1:] = 0
    log_probs.requires_grad_()
    loss = eisl(log_probs, targets, pad_id=0, gumbel=False)
    torch.testing.assert_close(loss, eisl(log_probs[[0, 2]], targets[[0, 2]], pad_id=0, gumbel=False))
    loss.backward()
    assert log_probs.grad[1].abs().sum() == 0 and log_probs.grad.isfinite().all()
    short = eisl(log_probs, targets, output_lengths=torch.tensor([7, 7, 1]), gumbel=False, reduction="none")
    assert short[2] == 0 and short.isfinite().all()
    assert eisl(log_probs, targets, ngrams=(9,)) == 0


def test_gradcheck_and_floor():
    log_probs, targets = case(batch=2, outputs=4, length=4, tokens=3)
    log_probs.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: eisl(x, targets, ngrams=(2, 3), gumbel=False), log_probs)
    impossible = log_probs.detach().clone()
    impossible[:, :, 0] = -math.inf
    impossible.requires_grad_()
    loss = eisl(impossible, torch.zeros_like(targets), ngrams=(2,), gumbel=False)
    (gradient,) = torch.autograd.grad(loss, impossible)
    assert loss.item() == pytest.approx(20) and gradient.abs().sum() == 0


def test_detached_q_has_the_gradient_of_fixed_weights():
    log_probs, targets = case()
    log_probs.requires_grad_()
    q = (ngram_match_map(log_probs, targets, 2) / 2).softmax(1).detach()
    fixed = -(q * ngram_match_map(log_probs, targets, 2) / 2).sum(1).mean()
    detached = eisl(log_probs, targets, ngrams=(2,), gumbel=False, detach_q=True)
    torch.testing.assert_close(
        torch.autograd.grad(detached, log_probs)[0], torch.autograd.grad(fixed, log_probs)[0]
    )


def test_noise_is_seeded_and_off_means_off():
    log_probs, targets = case()
    seeded = [eisl(log_probs, targets, generator=torch.Generator().manual_seed(s)).item() for s in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    assert eisl(log_probs, targets, gumbel=False) == eisl(log_probs, targets, gumbel=False)
    cold = eisl(log_probs, targets, ngrams=(2,), tau=1e-6, gumbel=False)
    torch.testing.assert_close(cold, -(ngram_match_map(log_probs, targets, 2) / 2).amax(1).mean())


def test_non_contiguous_and_reductions():
    log_probs, targets = case()
    rows = eisl(log_probs, targets, gumbel=False, reduction="none")
    strided = eisl(
        log_probs.transpose(0, 1).contiguous().transpose(0, 1), targets.T.contiguous().T, gumbel=False
    )
    torch.testing.assert_close(strided, rows.mean())
    torch.testing.assert_close(eisl(log_probs, targets, gumbel=False, reduction="sum"), rows.sum())
    single = eisl(log_probs.float(), targets.int(), gumbel=False)
    assert single.dtype == torch.float32 and abs(single - rows.mean()) < 1e-5


def test_bad_input():
    log_probs, targets = case()
    for bad in [
        dict(ngrams=()), dict(ngrams=(0, 2)), dict(weights=(1,)), dict(weights=(0, 0, 0)), dict(tau=0),
        dict(reduction="median"), dict(output_lengths=torch.tensor([1])),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            eisl(log_probs, targets, **bad)
    for p, y, error in [
        (log_probs.long(), targets, TypeError),
        (log_probs, targets.double(), TypeError),
        (log_probs[0], targets, ValueError),
        (log_probs, targets[:2], ValueError),
        (log_probs[:, :0], targets, ValueError),
    ]:
        with pytest.raises(error):
            eisl(p, y)
    for n in (0, 7):
        with pytest.raises(ValueError):
            ngram_match_map(log_probs, targets, n)
