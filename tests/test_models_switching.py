"""lib.models.switching against full forward passes without caches, and speculative decoding against the large model's law."""

import itertools
import math

import pytest
import torch
from scipy.stats import entropy as scipy_entropy

from lib.book import load_reference
from lib.models import GPT, entropy_adaptive, replay_switching, scheduled_switching, speculative

VOCAB, END = 7, 6


def model(seed, dim=8, depth=1, spread=6.0):
    """An untrained GPT in double precision with decided opinions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gpt = GPT(VOCAB, 40, dim=dim, depth=depth, num_heads=2).double().eval()
        for parameter in gpt.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=spread * 0.1)
    return gpt.requires_grad_(False)


SMALL, LARGE = model(0), model(1, dim=12, depth=2)
PROMPT = torch.randint(VOCAB - 1, (6, 4), generator=torch.Generator().manual_seed(2))


def without_caches(row, *, tau, window, min_stay, max_new, end):
    """One row by the rule, each token from a full forward pass."""
    text, path, entropies, read = row.tolist(), [], [], []
    large, stayed = tau < math.log2(VOCAB), 0
    seen = {False: 0, True: 0}
    for _ in range(max_new):
        logits = (LARGE if large else SMALL)(torch.tensor([text]))[0, -1]
        read.append(len(text) - 1 - seen[large])
        seen[large] = len(text)
        entropies.append(scipy_entropy(logits.softmax(-1).numpy(), base=2))
        path.append(large)
        text.append(int(logits.argmax()))
        if text[-1] == end:
            break
        stayed += 1
        recent = entropies[-window:]
        wanted = tau <= 0 or (tau < math.log2(VOCAB) and sum(recent) / len(recent) > tau)
        if wanted != large and stayed >= min_stay:
            large, stayed = wanted, 0
    return text[len(row) :], path, entropies, read


@pytest.mark.parametrize("window,min_stay", [(5, 5), (1, 1), (3, 2)])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.6, 9.0])
def test_entropy_adaptive_equals_full_passes(tau, window, min_stay):
    call = dict(tau=tau, window=window, min_stay=min_stay, max_new=24)
    tokens, trace = entropy_adaptive(SMALL, LARGE, PROMPT, end=END, **call)
    for i, row in enumerate(PROMPT):
        text, path, entropies, read = without_caches(row, end=END, **call)
        n = len(text)
        assert tokens[i, :n].tolist() == text and (tokens[i, n:] == END).all()
        assert trace.large[i, :n].tolist() == path and trace.prefill[i, :n].tolist() == read
        assert trace.written[i].sum() == n and not trace.large[i, n:].any()
        torch.testing.assert_close(trace.entropy[i, :n], torch.tensor(entropies, dtype=torch.float64))
        mean = [sum(entropies[max(0, t + 1 - window) : t + 1]) / min(window, t + 1) for t in range(n)]
        torch.testing.assert_close(trace.rolling[i, :n], torch.tensor(mean, dtype=torch.float64))


def test_the_test_models_switch():
    _, trace = entropy_adaptive(SMALL, LARGE, PROMPT, tau=1.6, window=3, min_stay=2, max_new=24)
    assert trace.switches().float().mean() > 1 and 0.1 < trace.share().mean() < 0.9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_extremes_are_the_single_models(temperature):
    def call(function, *args, **kwargs):
        generator = torch.Generator().manual_seed(3)
        return function(SMALL, LARGE, PROMPT, *args, temperature=temperature, generator=generator, **kwargs)

    for tau, large in ((0.0, True), (-1.0, True), (math.log2(VOCAB), False), (math.inf, False)):
        tokens, trace = call(entropy_adaptive, tau=tau, max_new=20)
        alone, _ = call(scheduled_switching, torch.full((6, 20), large))
        assert torch.equal(tokens, alone)
        assert (trace.large == large).all() and (trace.prefill[:, 1:] == 0).all()
        assert (trace.cost(1.0, 10.0) == (1.0 if large else 0.1)).all()
        torch.testing.assert_close(
            trace.cost(1.0, 10.0, prefill=True).double(), trace.cost(1.0, 10.0).double()
        )
        if temperature == 0:
            text = PROMPT
            for _ in range(20):
                logits = (LARGE if large else SMALL)(text)[:, -1]
                text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
            assert torch.equal(tokens, text[:, 4:])


def test_rows_are_independent_and_have_thresholds_of_their_own():
    tau = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    tokens, trace = entropy_adaptive(SMALL, LARGE, PROMPT, tau=tau, max_new=15)
    for i in range(6):
        one, alone = entropy_adaptive(SMALL, LARGE, PROMPT[i : i + 1], tau=float(tau[i]), max_new=15)
        assert torch.equal(one[0], tokens[i]) and torch.equal(alone.large[0], trace.large[i])


def test_replay_gives_the_same_path():
    call = dict(tau=1.6, window=3, min_stay=2)
    tokens, trace = entropy_adaptive(SMALL, LARGE, PROMPT, max_new=20, **call)
    text = torch.cat([PROMPT, tokens], 1)[:, :-1]
    laws = [m(text)[:, 3:].softmax(-1) for m in (SMALL, LARGE)]
    entropies = [torch.special.entr(law).sum(-1) / math.log(2) for law in laws]
    assert torch.equal(replay_switching(*entropies, VOCAB, **call), trace.large)


def test_cost_by_hand():
    schedule = torch.tensor([[True, False, False, True, True]])
    _, trace = scheduled_switching(SMALL, LARGE, PROMPT[:1], schedule)
    assert trace.prefill.tolist() == [[3, 4, 0, 2, 0]]
    assert trace.switches().tolist() == [2]
    assert trace.cost(1.0, 10.0).item() == pytest.approx((3 * 10 + 2) / 50)
    # large reads 3 + 1 + 2 + 1 + 1, small 4 + 1 + 1, large alone 3 + 5
    assert trace.cost(1.0, 10.0, prefill=True).item() == pytest.approx((8 * 10 + 6) / 80)


@pytest.mark.parametrize("draft", [1, 3, 8])
def test_speculative_is_greedy_large_at_temperature_zero(draft):
    for end in (None, END):
        tokens, trace = speculative(SMALL, LARGE, PROMPT, draft=draft, max_new=18, end=end)
        alone, plain = scheduled_switching(SMALL, LARGE, PROMPT, torch.ones(6, 18, dtype=torch.bool), end=end)
        assert torch.equal(tokens, alone)
        assert torch.equal(trace.written, plain.written.sum(1))
        assert (trace.accepted <= trace.drafted).all() and (trace.passes <= trace.written).all()
    same, trace = speculative(LARGE, LARGE, PROMPT, draft=draft, max_new=18)
    assert torch.equal(trace.accepted, trace.drafted) and (trace.passes == -(-18 // (draft + 1))).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_speculative_has_the_law_of_the_large_model(temperature):
    count, length = 4000, 3
    prompt = PROMPT[:1].expand(count, -1)
    generator = torch.Generator().manual_seed(4)
    tokens, _ = speculative(
        SMALL, LARGE, prompt, draft=2, temperature=temperature, max_new=length, generator=generator
    )
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=length)))
    whole = torch.cat([PROMPT[:1].expand(len(texts), -1), texts], 1)

    def law(model):
        log_probs = (model(whole)[:, 3:-1] / temperature).log_softmax(-1)
        return log_probs.gather(2, texts.unsqueeze(2)).sum((1, 2)).exp()

    index = (tokens * torch.tensor([49, 7, 1])).sum(1)
    seen = torch.bincount(index, minlength=len(texts)) / count
    noise = (law(LARGE) / count).sqrt().sum()  # about the mean total deviation of an exact sampler
    assert (seen - law(LARGE)).abs().sum() < 1.2 * noise
    assert (seen - law(SMALL)).abs().sum() > 3 * noise


def test_reference_and_library_agree():
    rule = load_reference("entropy-adaptive-decoding", "entropy_adaptive_decoding")
    forward = [lambda text, m=m: m(torch.tensor([text]))[0, -1] for m in (SMALL, LARGE)]
    for row, tau in itertools.product(PROMPT, (0.0, 1.3, 1.6, 9.0)):
        text, path = rule(*forward, row.tolist(), tau=tau, window=3, min_stay=2, max_new=16, vocab_size=VOCAB)
        tokens, trace = entropy_adaptive(SMALL, LARGE, row[None], tau=tau, window=3, min_stay=2, max_new=16)
        assert tokens[0].tolist() == text and trace.large[0].tolist() == path


def test_bad_input():
    call = dict(tau=1.0, max_new=4)
    other = GPT(5, 20, dim=4, depth=1, num_heads=1)
    for error, arguments, changes in (
        (ValueError, (SMALL, other, PROMPT), {}),
        (TypeError, (SMALL, LARGE, PROMPT.float()), {}),
        (ValueError, (SMALL, LARGE, PROMPT[0]), {}),
        (ValueError, (SMALL, LARGE, PROMPT[:, :0]), {}),
        (ValueError, (SMALL, LARGE, PROMPT), dict(window=0)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(min_stay=0)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(tau=torch.ones(3))),
        (ValueError, (SMALL, LARGE, PROMPT), dict(tau=math.nan)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(temperature=-1.0)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(max_new=0)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(max_new=60)),
        (ValueError, (SMALL, LARGE, PROMPT), dict(end=VOCAB)),
    ):
        with pytest.raises(error):
            entropy_adaptive(*arguments, **(call | changes))
    with pytest.raises(ValueError, match="draft"):
        speculative(SMALL, LARGE, PROMPT, draft=0, max_new=3)
    with pytest.raises(ValueError, match="schedule"):
        scheduled_switching(SMALL, LARGE, PROMPT, torch.ones(6, 3))
    with pytest.raises(ValueError, match="entropies"):
        replay_switching(torch.ones(2, 3), torch.ones(2, 4), VOCAB, tau=1.0)
    _, trace = entropy_adaptive(SMALL, LARGE, PROMPT, **call)
    with pytest.raises(ValueError, match="positive"):
        trace.cost(0.0, 1.0)
