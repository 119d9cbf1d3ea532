"""Decisions about sequences: greedy, beam search, exact search, sampling, minimum Bayes risk.

All of them drive a *step function* and know nothing else of the model:

    step(tokens, state) -> logits, new_state

`tokens` (n,) are the last tokens of n hypotheses, `logits` (n, V) score their next token (log-probabilities do as well).
`state` is a tensor, or a tuple or list of such states, with the hypotheses in dimension 0 of every tensor; the search selects
rows of it, and what they hold is the model's affair. A recurrent network keeps its hidden vectors there
(`lib.models.gru.Seq2Seq.step`), a transformer its keys and values (`lib.models.gpt.GPT.step`). For a network without
such a method the prefix is the state:

    def step(tokens, prefix):
        prefix = torch.cat([prefix, tokens[:, None]], 1)
        return model(prefix)[:, -1], prefix

with `tokens.new_empty(n, 0)` as the first state. `start` is the token given at the first step (one for all, or (n,)), `end` the one
that closes a sequence. A sequence may be empty: the end token can come first. Results hold the end token and are padded with it.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

State = Any
Step = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]


class Decoded(NamedTuple):
    """One sequence for each row.

    Attributes:
        tokens: int64, (n, length), padded with the end token; a row without one was cut at `max_length`.
        log_prob: (n,), total log-probability under the step function at temperature 1, the end token's included.
    """

    tokens: torch.Tensor
    log_prob: torch.Tensor


def select_rows(state: State, rows: torch.Tensor) -> State:
    """The state of the given hypotheses, in that order, repetitions allowed.

    Raises:
        TypeError: the state is not made of tensors, tuples and lists.
    """
    if isinstance(state, torch.Tensor):
        return state.index_select(0, rows)
    if isinstance(state, (tuple, list)):
        return tuple(select_rows(part, rows) for part in state)
    raise TypeError(f"a state is a tensor or a tuple or list of states, got {type(state).__name__}")


def transform_step(step: Step, transform: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    """The step function whose logits go through `transform`, for example a fitted calibrator's."""

    def new_step(tokens, state):
        logits, state = step(tokens, state)
        return transform(logits), state

    return new_step


def strip_end(tokens: torch.Tensor, end: int) -> list[tuple[int, ...]]:
    """The rows of (n, length) as tuples without the end token and what follows it."""
    return [tuple(itertools.takewhile(lambda token: token != end, row)) for row in tokens.tolist()]


@torch.no_grad()
def greedy(step: Step, state: State, *, start: int | torch.Tensor, end: int, max_length: int) -> Decoded:
    """Take the most probable token at every step.

    Args:
        step: the step function.
        state: its first state, one row for each sequence wanted.
        start: first input token, an integer or (n,).
        end: the token that closes a sequence.
        max_length: the most tokens, the end token counted.

    Raises:
        ValueError: `max_length` below 1, `start` of another length than the state, or `end` outside the logits.
    """
    return _roll_out(step, state, lambda log_probs: log_probs.argmax(1), start, end, max_length)


@torch.no_grad()
def ancestral_sample(
    step: Step,
    state: State,
    *,
    temperature: float = 1.0,
    num_samples: int = 1,
    start: int | torch.Tensor,
    end: int,
    max_length: int,
    generator: torch.Generator | None = None,
) -> Decoded:
    """Draw token by token from softmax(logits / temperature).

    At temperature 1 this samples whole sequences from the model. At another one it samples neither from the model nor from its
    renormalised power: the power is taken, and normalised, at every step.

    Args:
        num_samples: for each row of the state; the samples of row 0 come first.
        temperature: above 0.
        generator: source of the randomness.

    Returns:
        n * num_samples rows; `log_prob` is the model's own, at temperature 1.

    Raises:
        ValueError: as `greedy`, or a temperature or number of samples that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive (greedy is the limit 0), got {temperature}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    count, device = _rows(state)
    rows = torch.arange(count, device=device).repeat_interleave(num_samples)
    if isinstance(start, torch.Tensor) and start.ndim:
        start = _first_tokens(start, count, device)[rows]

    def choose(log_probs):
        probabilities = torch.softmax(log_probs / temperature, 1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return _roll_out(step, select_rows(state, rows), choose, start, end, max_length)


@torch.no_grad()
def beam_search(
    step: Step,
    state: State,
    k: int,
    *,
    start: int | torch.Tensor,
    end: int,
    max_length: int,
    length_penalty: float | None = None,
) -> Decoded:
    """Keep the k best hypotheses of each row, finished ones among them, and return the best at the end.

    A finished hypothesis keeps its score and its place in the beam until k better ones push it out. With k = 1 this is `greedy`.
    With `length_penalty` a, hypotheses are compared at every step by log-probability / length^a (the end token counted). That is another
    objective: it no longer searches for the most probable sequence.

    Args:
        k: the width of the beam, at least 1.
        length_penalty: None for the plain log-probability.

    Returns:
        The best finished hypothesis; where none of the beam is finished at `max_length`, the best unfinished one.
        `log_prob` is never divided by a length.

    Raises:
        ValueError: as `greedy`, or k below 1.
    """
    if k < 1:
        raise ValueError(f"k, the width of the beam, must be at least 1, got {k}")
    count, device = _rows(state)
    tokens = _first_tokens(start, count, device)
    _check_length(max_length)
    width, total = 1, None
    history = torch.empty(count, 1, 0, dtype=torch.long, device=device)  # (n, width, length)
    done = torch.zeros(count, 1, dtype=torch.bool, device=device)
    length = torch.zeros(count, 1, device=device)

    def score(total, length):
        return total if length_penalty is None else total / length.clamp(min=1) ** length_penalty

    for _ in range(max_length):
        logits, state = step(tokens, state)
        _check_end(end, logits)
        log_probs = torch.log_softmax(logits, 1).view(count, width, -1)
        size = log_probs.shape[2]
        if total is None:
            total = log_probs.new_zeros(count, 1)
        # a finished hypothesis has one continuation, itself
        stay = torch.full_like(log_probs, -torch.inf)
        stay[..., end] = 0.0
        totals = total.unsqueeze(2) + torch.where(done.unsqueeze(2), stay, log_probs)
        lengths = (length + (~done).to(length)).unsqueeze(2).expand_as(totals)
        kept = min(k, width * size)
        best = score(totals, lengths).flatten(1).topk(kept, 1).indices  # (n, kept), best first
        total, length = totals.flatten(1).gather(1, best), lengths.flatten(1).gather(1, best)
        parent, token = best // size, best % size
        history = torch.cat(
            [history.gather(1, parent.unsqueeze(2).expand(-1, -1, history.shape[2])), token.unsqueeze(2)], 2
        )
        done = done.gather(1, parent) | (token == end)
        rows = (torch.arange(count, device=device).unsqueeze(1) * width + parent).flatten()
        state, tokens, width = select_rows(state, rows), token.flatten(), kept
        if bool(((done | (total == -torch.inf)).all(1)).all()):
            break
    final = score(total, length)
    finished = final.masked_fill(~done, -torch.inf)
    use = torch.where((finished > -torch.inf).any(1), finished.argmax(1), final.argmax(1)).unsqueeze(1)
    sequences = history.gather(1, use.unsqueeze(2).expand(-1, -1, history.shape[2]))[:, 0]
    return Decoded(sequences, total.gather(1, use)[:, 0])


@torch.no_grad()
def exact_map(
    step: Step,
    state: State,
    *,
    start: int | torch.Tensor,
    end: int,
    max_length: int,
    max_expansions: int = 10_000,
) -> Decoded:
    """The most probable sequence, exactly, by uniform-cost search.

    A prefix is at least as probable as every sequence that begins with it. So if the open prefixes are taken up in order of their probability, the
    first finished sequence to come up is the best there is. The search opens only prefixes more probable than the answer.
    Prefixes less probable than a finished sequence already seen are dropped unopened. All rows are searched side by side, one
    expansion each at a time. Among equally probable sequences any one may be returned.

    Args:
        max_length: the most tokens, the end token counted; longer sequences are not considered.
        max_expansions: for each row.

    Returns:
        One sequence for each row; `log_prob` is float64.

    Raises:
        ValueError: as `greedy`, or a row in which no sequence ends within `max_length`.
        RuntimeError: a row needs more than `max_expansions`.
    """
    count, device = _rows(state)
    _check_length(max_length)
    first = _first_tokens(start, count, device).tolist()
    order = itertools.count()  # breaks ties of equal cost, so that the heap never compares states
    rows = [select_rows(state, torch.tensor([row], device=device)) for row in range(count)]
    # (cost, number, sequence, state before its last token)
    open_prefixes = [[(0.0, next(order), (), rows[row])] for row in range(count)]
    answers: list[tuple[float, tuple[int, ...]] | None] = [None] * count
    cheapest = [math.inf] * count  # cost of the best finished sequence seen
    for expansion in itertools.count():
        batch = {}  # by the shapes of their states, since prefixes that serve as states differ in length
        for row in range(count):
            if answers[row] is not None:
                continue
            if not open_prefixes[row]:
                raise ValueError(f"row {row}: no sequence ends within max_length = {max_length}")
            cost, _, sequence, before = heapq.heappop(open_prefixes[row])
            if sequence and sequence[-1] == end:
                answers[row] = (cost, sequence)
            else:
                batch.setdefault(_shapes(before), []).append((row, cost, sequence, before))
        if all(answer is not None for answer in answers):
            break
        if expansion >= max_expansions:
            waiting = [row for row in range(count) if answers[row] is None]
            raise RuntimeError(f"rows {waiting} need more than max_expansions = {max_expansions}")
        if not batch:
            continue
        for group in batch.values():
            last = [sequence[-1] if sequence else first[row] for row, _, sequence, _ in group]
            logits, after = step(torch.tensor(last, device=device), _stack([item[3] for item in group]))
            _check_end(end, logits)
            costs = -torch.log_softmax(logits.double(), 1)
            for index, (row, cost, sequence, _) in enumerate(group):
                cheapest[row] = min(cheapest[row], cost + float(costs[index, end]))
                own = select_rows(after, torch.tensor([index], device=device))
                room = len(sequence) + 1 < max_length
                for token in (cost + costs[index] <= cheapest[row]).nonzero()[:, 0].tolist():
                    total = cost + float(costs[index, token])
                    if total < math.inf and (token == end or room):
                        heapq.heappush(open_prefixes[row], (total, next(order), (*sequence, token), own))
    longest = max(len(sequence) for _, sequence in answers)
    tokens = torch.tensor(
        [sequence + (end,) * (longest - len(sequence)) for _, sequence in answers], device=device
    )
    return Decoded(tokens, torch.tensor([-cost for cost, _ in answers], dtype=torch.float64, device=device))


def edit_similarity(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """1 minus the edit distance over the longer length: 1 for equal sequences, 0 for nothing in common."""
    if first == second:
        return 1.0
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - row[-1] / max(len(first), len(second))


def minimum_bayes_risk(
    samples: Sequence[Hashable], gain: Callable[[Any, Any], float] = edit_similarity
) -> Hashable:
    """The sample that gains most on average over the samples themselves (minimum Bayes risk by Monte Carlo).

    Args:
        samples: drawn sequences as hashable values, such as the tuples of `strip_end`; repetitions carry their weight.
        gain: of deciding for the first argument when the second is true.

    Returns:
        The best sample, the first drawn among equals.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("minimum Bayes risk needs at least one sample")
    counts = Counter(samples)  # in order of first appearance
    return max(counts, key=lambda one: sum(count * gain(one, other) for other, count in counts.items()))


def _roll_out(step, state, choose, start, end, max_length):
    count, device = _rows(state)
    tokens = _first_tokens(start, count, device)
    _check_length(max_length)
    done, chosen, total = torch.zeros(count, dtype=torch.bool, device=device), [], 0.0
    for _ in range(max_length):
        logits, state = step(tokens, state)
        _check_end(end, logits)
        log_probs = torch.log_softmax(logits, 1)
        tokens = choose(log_probs).masked_fill(done, end)
        total = total + log_probs.gather(1, tokens.unsqueeze(1))[:, 0].masked_fill(done, 0.0)
        chosen.append(tokens)
        done = done | (tokens == end)
        if bool(done.all()):
            break
    return Decoded(torch.stack(chosen, 1), total)


def _rows(state: State) -> tuple[int, torch.device]:
    """How many hypotheses a state holds, and where."""
    if isinstance(state, torch.Tensor):
        if not state.ndim or not len(state):
            raise ValueError("a state needs at least one hypothesis in dimension 0")
        return len(state), state.device
    if isinstance(state, (tuple, list)) and state:
        return _rows(state[0])
    raise TypeError(f"a state is a tensor or a tuple or list of states, got {type(state).__name__}")


def _shapes(state):
    if isinstance(state, torch.Tensor):
        return state.shape[1:]
    return tuple(_shapes(part) for part in state)


def _stack(states: list[State]) -> State:
    if isinstance(states[0], torch.Tensor):
        return torch.cat(states)
    return tuple(_stack(list(parts)) for parts in zip(*states, strict=True))


def _first_tokens(start, count, device):
    tokens = torch.as_tensor(start, device=device)
    if tokens.ndim and tokens.shape != (count,):
        raise ValueError(f"start must be one token or ({count},), got {tuple(tokens.shape)}")
    return tokens.long().expand(count).clone()


def _check_length(max_length):
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")


def _check_end(end, logits):
    if not 0 <= end < logits.shape[1]:
        raise ValueError(f"end must be a token below {logits.shape[1]}, got {end}")
