"""Surprise and entropy of tokens, and tests of authorship, against exact laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, entropy, norm

from lib.book import load_reference
from lib.information import entropy_from_logits, perplexity_test, source_test, token_stats
from lib.models import GPT, SmoothedLM

generator = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)
TOKENS = torch.randint(6, (3, 20), generator=generator)


def test_statistics_are_scipys_and_the_references():
    stats = token_stats(LOGITS, TOKENS)
    probs = LOGITS.softmax(-1).numpy()
    np.testing.assert_allclose(stats.entropy, entropy(probs, axis=-1), rtol=1e-12)
    surprise = -np.log(probs)
    own = np.take_along_axis(surprise, TOKENS[..., None].numpy(), -1)[..., 0]
    np.testing.assert_allclose(stats.nll, own, rtol=1e-12)
    second = (probs * surprise**2).sum(-1) - (probs * surprise).sum(-1) ** 2
    np.testing.assert_allclose(stats.varentropy, second, rtol=1e-10)
    reference = load_reference("log-perplexity-tests", "surprise_and_entropy")
    for mine, theirs in zip(stats, reference(LOGITS, TOKENS), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_impossible_tokens_and_half_precision():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    stats = token_stats(logits, torch.tensor([2]))
    assert stats.nll.isinf().all() and math.isclose(stats.entropy, math.log(2), rel_tol=1e-6)
    assert stats.varentropy.abs() < 1e-12
    assert math.isclose(entropy_from_logits(logits, 2), 1.0, rel_tol=1e-6)
    low = LOGITS.to(torch.bfloat16)
    exact = token_stats(low.double(), TOKENS)
    for mine, wide in zip(token_stats(low, TOKENS), exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), wide, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_entropy():
    z = LOGITS[0, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_stats(z, TOKENS[0, :3]), z)
    assert torch.autograd.gradcheck(entropy_from_logits, z)


def test_entropy_from_logits_has_units():
    np.testing.assert_allclose(
        entropy_from_logits(LOGITS, 2), entropy(LOGITS.softmax(-1).numpy(), axis=-1, base=2), rtol=1e-12
    )
    assert torch.allclose(entropy_from_logits(torch.full((4, 8), 5.0), 2), torch.tensor(3.0))


def coin(p, n):
    """Surprise and entropy for every number of ones in n throws, and the number's law."""
    logits = torch.tensor([1 - p, p], dtype=torch.float64).log().expand(n + 1, n, 2)
    tokens = (torch.arange(n) < torch.arange(n + 1)[:, None]).long()
    return token_stats(logits, tokens), binom.pmf(np.arange(n + 1), n, p)


@pytest.mark.parametrize(("p", "n"), itertools.product((0.5, 0.3, 0.1), (5, 40, 300)))
@pytest.mark.parametrize("method", ["azuma", "freedman"])
def test_type_one_error_and_p_values_hold_exactly_for_a_coin(p, n, method):
    stats, law = coin(p, n)
    bound = -math.log(p)
    for alpha in (0.3, 0.05):
        result = perplexity_test(
            stats.nll, stats.entropy, alpha=alpha, method=method, bound=bound, varentropy=stats.varentropy
        )
        assert law[result.reject.numpy()].sum() <= alpha
        # the threshold and the p-value bound speak of the same test
        clear = (result.p_bound - alpha).abs() > 1e-9
        assert torch.equal((result.p_bound < alpha)[clear], result.reject[clear])
    for k in range(n + 1):
        farther = result.statistic.abs() >= result.statistic.abs()[k] - 1e-12
        assert law[farther.numpy()].sum() <= result.p_bound[k].item() + 1e-12


def test_thresholds_are_the_closed_forms():
    nll, ent = torch.full((1, 50), 0.5), torch.full((1, 50), 0.4)
    var = torch.full((1, 50), 0.6)
    azuma = perplexity_test(nll, ent, bound=4.0, alpha=0.1)
    assert math.isclose(azuma.threshold, 4 * math.sqrt(math.log(20) / 100), rel_tol=1e-6)
    assert math.isclose(azuma.statistic, 0.1, rel_tol=1e-5)
    freedman = perplexity_test(nll, ent, bound=4.0, alpha=0.1, method="freedman", varentropy=var, levels=3)
    s, level = freedman.threshold.item(), 1.0  # of 4, 2 and 1 the smallest above 0.6
    assert math.isclose(3 * 2 * math.exp(-50 * s**2 / (2 * (level + 4 * s / 3))), 0.1, rel_tol=1e-5)
    normal = perplexity_test(nll, ent, alpha=0.1, method="normal", varentropy=var)
    assert math.isclose(normal.threshold, norm.ppf(0.95) * math.sqrt(0.6 / 50), rel_tol=1e-5)
    assert math.isclose(normal.p_bound, 2 * norm.sf(0.1 / math.sqrt(0.6 / 50)), rel_tol=1e-4)


def test_each_string_is_held_against_its_own_entropy():
    nll = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    ent = torch.tensor([[1.5, 0.5], [0.25, 0.25]])
    for options in ({"bound": 3.0}, {"method": "normal", "varentropy": torch.ones(2, 2)}):
        result = perplexity_test(nll, ent, **options)
        torch.testing.assert_close(result.statistic, torch.tensor([0.5, 0.25]))


def test_freedman_uses_the_next_level_above_the_variance():
    nll = ent = torch.zeros(1, 10)
    thresholds = [
        perplexity_test(
            nll, ent, bound=2.0, method="freedman", varentropy=torch.full((1, 10), v), levels=4
        ).threshold.item()
        for v in (0.01, 0.125, 0.126, 0.25, 0.3, 0.5, 0.7, 1.0, 9.0)
    ]
    a, b, c, d, e, f, g, h, i = thresholds
    assert a == b < c == d < e == f < g == h == i


def test_bounds_hold_on_a_chain_with_memory():
    chain = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]).log()
    n, runs = 30, 20_000
    states = [torch.zeros(runs, dtype=torch.long)]
    for _ in range(n):
        probs = chain[states[-1]].exp()
        states.append(torch.multinomial(probs, 1, generator=generator)[:, 0])
    strings = torch.stack(states, 1)
    stats = token_stats(chain[strings[:, :-1]], strings[:, 1:])
    for method in ("azuma", "freedman"):
        for alpha in (0.5, 0.1):
            result = perplexity_test(
                stats.nll,
                stats.entropy,
                alpha=alpha,
                method=method,
                bound=math.log(10),
                varentropy=stats.varentropy,
            )
            assert result.reject.double().mean() <= alpha
    assert abs(result.statistic.mean()) < 5 * result.statistic.std() / math.sqrt(runs)


def test_source_test_is_the_likelihood_ratio():
    other = torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)
    result = source_test(LOGITS, other, TOKENS)
    for row in range(3):
        ratio = [
            LOGITS[row, t].log_softmax(0)[TOKENS[row, t]] - other[row, t].log_softmax(0)[TOKENS[row, t]]
            for t in range(20)
        ]
        assert math.isclose(result.statistic[row], sum(ratio) / 20, rel_tol=1e-9)
    assert torch.equal(result.is_a, result.statistic > 0)


def test_bad_input():
    nll = ent = torch.zeros(2, 5)
    with pytest.raises(TypeError, match="floating"):
        token_stats(TOKENS, TOKENS)
    with pytest.raises(TypeError, match="integers"):
        token_stats(LOGITS, TOKENS.double())
    with pytest.raises(ValueError, match="logits must be"):
        token_stats(LOGITS, TOKENS[:, :3])
    with pytest.raises(ValueError, match=r"0\.\.5"):
        token_stats(LOGITS, TOKENS + 6)
    with pytest.raises(TypeError, match="floating"):
        entropy_from_logits(TOKENS)
    with pytest.raises(ValueError, match="base"):
        entropy_from_logits(LOGITS, 1)
    for bad, message in (
        (dict(method="hoeffding", bound=1.0), "method"),
        (dict(), "positive bound"),
        (dict(bound=0.0), "positive bound"),
        (dict(bound=1.0, alpha=1.0), "alpha"),
        (dict(bound=1.0, levels=0), "levels"),
        (dict(bound=1.0, method="freedman"), "varentropy"),
        (dict(method="normal"), "varentropy"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity_test(nll, ent, **bad)
    with pytest.raises(ValueError, match="must lie in"):
        perplexity_test(nll + 3, ent, bound=2.0)
    with pytest.raises(ValueError, match="nll and entropy"):
        perplexity_test(nll, ent[:, :2], bound=1.0)
    with pytest.raises(ValueError, match="one shape"):
        source_test(LOGITS, LOGITS[..., :3], TOKENS)
    never = torch.full((1, 2, 3), -torch.inf)
    never[..., 0] = 0
    with pytest.raises(ValueError, match="under both"):
        source_test(never, never, torch.tensor([[0, 1]]))


def test_smoothed_model_is_the_mixture_and_steps_like_the_whole():
    torch.manual_seed(0)
    inner = GPT(9, 6, dim=8, depth=2, num_heads=2).eval().double()
    model = SmoothedLM(inner, 0.2)
    tokens = torch.randint(9, (4, 6))
    expected = 0.8 * inner(tokens).softmax(-1) + 0.2 / 9
    torch.testing.assert_close(model(tokens).exp(), expected)
    assert -model(tokens).min() <= model.bound(9) and math.isclose(model.bound(9), math.log(45))
    state = model.start(4)
    for t in range(6):
        log_probs, state = model.step(tokens[:, t], state)
        torch.testing.assert_close(log_probs.exp(), expected[:, t])
    flat = SmoothedLM(inner, 1.0)(tokens)
    torch.testing.assert_close(flat, torch.full_like(flat, -math.log(9)))
    for eps in (0.0, 1.5):
        with pytest.raises(ValueError, match="eps"):
            SmoothedLM(inner, eps)
