"""Two language models that write one text: switching by entropy, switching by a plan, and speculative decoding.

The models share one vocabulary and keep caches as `lib.models.GPT` does: `start(batch)` makes an empty one, with the positions in
dimension 4, and `extend(tokens, cache)` reads further tokens. Rows of a batch are independent texts. Each has its own active model,
and each model reads a row's tokens only when that row needs it.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from lib.information import entropy_from_logits


class GenerationTrace(NamedTuple):
    """What happened at each of the T tokens that n rows wrote.

    Attributes:
        large: bool, (n, T), whether the large model wrote the token.
        entropy: (n, T), bits, of the model that wrote it, before any temperature.
        rolling: (n, T), bits, the mean of the last `window` entropies, this token's included.
        prefill: int64, (n, T), tokens that the writing model had to read first, beyond the one before the token. At its first use the
            prompt is among them.
        written: bool, (n, T), False after the end token; the other entries are zero there.
        prompt: the number of tokens of the prompt.
    """

    large: torch.Tensor
    entropy: torch.Tensor
    rolling: torch.Tensor
    prefill: torch.Tensor
    written: torch.Tensor
    prompt: int

    def share(self) -> torch.Tensor:
        """The large model's share of each row's tokens, (n,)."""
        return self.large.sum(1) / self.written.sum(1)

    def switches(self) -> torch.Tensor:
        """How often each row changed its model, int64, (n,)."""
        return ((self.large[:, 1:] != self.large[:, :-1]) & self.written[:, 1:]).sum(1)

    def cost(self, small: float, large: float, *, prefill: bool = False) -> torch.Tensor:
        """Cost of each row as a fraction of that of the large model alone, (n,).

        Args:
            small, large: cost of one token, such as the number of parameters.
            prefill: False for the paper's cost, share * large + (1 - share) * small. True to pay for every token that a model reads,
                the prompt and the other model's tokens among them; the large model alone then pays for the prompt as well.

        Raises:
            ValueError: a cost that is not positive.
        """
        if not (small > 0 and large > 0):
            raise ValueError(f"costs must be positive, got {small} and {large}")
        length = self.written.sum(1)
        read = self.written.long()
        if prefill:
            read, length = read + self.prefill, length + self.prompt - 1
        price = torch.where(self.large, float(large), float(small))
        return (read * price).sum(1) / (length * large)


class SpeculativeTrace(NamedTuple):
    """What speculative decoding did for each row, all int64, (n,).

    Attributes:
        passes: of the large model.
        drafted: tokens that the small model proposed.
        accepted: those of them that were kept.
        written: tokens in the result, the end token included.
    """

    passes: torch.Tensor
    drafted: torch.Tensor
    accepted: torch.Tensor
    written: torch.Tensor


@torch.no_grad()
def entropy_adaptive(
    small: nn.Module,
    large: nn.Module,
    prompt: torch.Tensor,
    *,
    tau: float | torch.Tensor,
    window: int = 5,
    min_stay: int = 5,
    temperature: float = 0.0,
    max_new: int,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, GenerationTrace]:
    """Write with the large model while the rolling entropy is above `tau`, else with the small one (Simonds 2025).

    After each token the entropies of the last `window` tokens, each of the model that wrote it, are averaged; the mean decides who
    writes the *next* token. The window survives a switch. A model that took over writes at least `min_stay` tokens. Before the first
    token nothing is known, which counts as the highest entropy, log2 V. So `tau <= 0` is the large model alone and
    `tau >= log2 V` the small one alone.

    Args:
        small, large: models over one vocabulary, in evaluation mode.
        prompt: int64, (n, length >= 1).
        tau: threshold in bits, one for all rows or (n,).
        window: tokens averaged, at least 1; fewer at the beginning.
        min_stay: tokens between two switches, at least 1.
        temperature: of sampling; 0 takes the most probable token. The entropies never see it.
        max_new: the most tokens to write.
        end: a token that closes a row, which is then padded with it.
        generator: source of the randomness; one uniform number a row and token is drawn.

    Returns:
        The new tokens, (n, T <= max_new), and their trace.

    Raises:
        TypeError: a prompt that is not of integers.
        ValueError: models of different vocabularies, or an argument out of range.
    """
    rule = _Rule(tau, window, min_stay, len(prompt), _vocabulary(small, large), prompt.device)
    return _generate(
        small, large, prompt, lambda step: rule.active, rule, temperature, max_new, end, generator
    )


@torch.no_grad()
def scheduled_switching(
    small: nn.Module,
    large: nn.Module,
    prompt: torch.Tensor,
    schedule: torch.Tensor,
    *,
    temperature: float = 0.0,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, GenerationTrace]:
    """Write with the large model where `schedule` says so: random and periodic switching, or either model alone.

    Args:
        schedule: bool, (n, max_new), True for the large model.

    Returns:
        As `entropy_adaptive`; the window of `rolling` is one token.

    Raises:
        TypeError, ValueError: as `entropy_adaptive`, or a schedule that is not (n, max_new) of bool.
    """
    if schedule.dtype != torch.bool or schedule.ndim != 2 or len(schedule) != len(prompt):
        raise ValueError(
            f"schedule must be bool, ({len(prompt)}, max_new), got {schedule.dtype}, {tuple(schedule.shape)}"
        )
    rule = _Rule(0.0, 1, 1, len(prompt), _vocabulary(small, large), prompt.device)
    return _generate(
        small,
        large,
        prompt,
        lambda step: schedule[:, step],
        rule,
        temperature,
        schedule.shape[1],
        end,
        generator,
    )


def replay_switching(
    small_entropy: torch.Tensor,
    large_entropy: torch.Tensor,
    num_classes: int,
    *,
    tau: float | torch.Tensor,
    window: int = 5,
    min_stay: int = 5,
) -> torch.Tensor:
    """Which model `entropy_adaptive` would have had at each token of given texts: bool, (n, T), True for the large one.

    Args:
        small_entropy, large_entropy: bits, (n, T), of each model before each token, given the text before it.
        num_classes: the size of the vocabulary.
        tau, window, min_stay: as in `entropy_adaptive`.

    Raises:
        ValueError: shapes that differ, or an argument out of range.
    """
    if small_entropy.ndim != 2 or small_entropy.shape != large_entropy.shape:
        raise ValueError(
            f"entropies must both be (n, T), got {tuple(small_entropy.shape)}, {tuple(large_entropy.shape)}"
        )
    rows, length = small_entropy.shape
    rule = _Rule(tau, window, min_stay, rows, num_classes, small_entropy.device)
    path = []
    for t in range(length):
        path.append(rule.active)
        rule.update(torch.where(rule.active, large_entropy[:, t], small_entropy[:, t]))
    return torch.stack(path, 1)


@torch.no_grad()
def speculative(
    small: nn.Module,
    large: nn.Module,
    prompt: torch.Tensor,
    *,
    draft: int = 4,
    temperature: float = 0.0,
    max_new: int,
    end: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, SpeculativeTrace]:
    """Let the small model propose `draft` tokens and the large one check them in one pass (Leviathan et al. 2023).

    A proposed token x is kept with probability min(1, p(x) / q(x)), p of the large model and q of the small one; at the first
    refusal a token is drawn from max(p - q, 0), normalised. If all are kept, one more is drawn from p. The law of the text is the
    large model's; at temperature 0 the text is the large model's.

    Args:
        draft: tokens proposed at a time, at least 1.
        small, large, prompt, temperature, max_new, end, generator: as in `entropy_adaptive`.

    Returns:
        The new tokens, (n, T <= max_new), and counts; a row shorter than T is padded with `end`.

    Raises:
        TypeError, ValueError: as `entropy_adaptive`, or `draft` below 1.
    """
    _vocabulary(small, large)
    _check_call(prompt, temperature, max_new, end, large)
    if draft < 1:
        raise ValueError(f"draft must be at least 1, got {draft}")
    rows, start = prompt.shape
    goal = start + max_new
    text = torch.cat([prompt, prompt.new_zeros(rows, max_new)], 1)
    readers = [_Reader(model, rows, goal) for model in (small, large)]
    length = torch.full((rows,), start, device=prompt.device)
    counts = [torch.zeros_like(length) for _ in range(3)]
    passes, drafted, accepted = counts
    done = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
    while not bool(done.all()):
        live = (~done).nonzero()[:, 0]
        # nobody proposes past the goal: the large model adds one token itself
        wish = (goal - length[live] - 1).clamp(max=draft)
        for size in wish.unique().tolist():
            group = live[wish == size]
            base = length[group]
            proposals, laws = [], []
            for k in range(size):
                law = _law(readers[0].read(group, text, base + k)[:, -1], temperature)
                token = _draw(law, generator)
                text[group, base + k] = token
                proposals.append(token)
                laws.append(law)
            target = _law(readers[1].read(group, text, base + size, last=size + 1), temperature)
            kept, token = _verify(proposals, laws, target, generator)
            text[group, base + kept] = token
            new_length = base + kept + 1
            passes[group] += 1
            drafted[group] += size
            accepted[group] += kept
            for reader in readers:  # what was refused is forgotten
                reader.filled[group] = torch.minimum(reader.filled[group], base + kept)
            if end is not None:
                for index, row in enumerate(group.tolist()):
                    fresh = text[row, base[index] : new_length[index]]
                    hits = (fresh == end).nonzero()
                    if len(hits):
                        new_length[index] = base[index] + hits[0, 0] + 1
                        done[row] = True
            length[group] = new_length
            done[group] |= new_length >= goal
    written = length - start
    tokens = text[:, start : start + int(written.max())]
    past = torch.arange(tokens.shape[1], device=prompt.device) >= written[:, None]
    return tokens.masked_fill(past, 0 if end is None else end), SpeculativeTrace(*counts, written)


class _Rule:
    """The switching rule, one token at a time; `active` is True where the large model writes next."""

    def __init__(self, tau, window, min_stay, rows, num_classes, device):
        if window < 1 or min_stay < 1:
            raise ValueError(f"window and min_stay must be at least 1, got {window} and {min_stay}")
        tau = torch.as_tensor(tau, dtype=torch.float64, device=device)
        if tau.shape not in ((), (rows,)) or bool(tau.isnan().any()):
            raise ValueError(f"tau must be one number or ({rows},), got {tau}")
        self.tau, self.window, self.min_stay, self.highest = tau, window, min_stay, math.log2(num_classes)
        self.recent = []
        self.active = self._wants_large(torch.full((rows,), self.highest, device=device).double())
        self.stayed = torch.zeros(rows, dtype=torch.long, device=device)

    def _wants_large(self, rolling):
        # an entropy can round to zero or, of a uniform law, to just above log2 V: both extremes are decided exactly
        return ((rolling > self.tau) | (self.tau <= 0)) & (self.tau < self.highest)

    def update(self, entropy):
        """Take the entropy of the token just written; returns the rolling mean."""
        self.recent = [*self.recent, entropy][-self.window :]
        rolling = torch.stack(self.recent).double().mean(0)
        self.stayed = self.stayed + 1
        switch = (self._wants_large(rolling) != self.active) & (self.stayed >= self.min_stay)
        self.active = self.active ^ switch
        self.stayed = self.stayed.masked_fill(switch, 0)
        return rolling.to(entropy.dtype)


class _Reader:
    """A model with the caches of all rows, each filled to its own length."""

    def __init__(self, model, rows, capacity):
        self.model = model
        empty = model.start(rows)
        self.cache = empty.new_zeros(*empty.shape[:4], capacity, *empty.shape[5:])
        self.filled = torch.zeros(rows, dtype=torch.long, device=empty.device)

    def read(self, rows, text, length, last=1):
        """Read the first `length` (one number a row) tokens of `text[rows]`; logits (rows, last, V) at the last ones."""
        result = None
        spans = torch.stack([self.filled[rows], length], 1)
        for begin, stop in spans.unique(dim=0).tolist():
            here = ((spans[:, 0] == begin) & (spans[:, 1] == stop)).nonzero()[:, 0]
            who = rows[here]
            logits, cache = self.model.extend(text[who, begin:stop], self.cache[who][..., :begin, :])
            self.cache[who, ..., begin:stop, :] = cache[..., begin:, :]
            self.filled[who] = stop
            if result is None:
                result = logits.new_empty(len(rows), last, logits.shape[-1])
            result[here] = logits[:, -last:]
        return result


def _generate(small, large, prompt, choose, rule, temperature, max_new, end, generator):
    _check_call(prompt, temperature, max_new, end, large)
    rows, start = prompt.shape
    text = torch.cat([prompt, prompt.new_zeros(rows, max_new)], 1)
    readers = [_Reader(model, rows, start + max_new) for model in (small, large)]
    done = torch.zeros(rows, dtype=torch.bool, device=prompt.device)
    columns = []
    for step in range(max_new):
        active, length = choose(step), start + step
        logits = None
        prefill = torch.zeros_like(prompt[:, 0])
        for reader, writes in zip(readers, (~active, active), strict=True):
            who = (writes & ~done).nonzero()[:, 0]
            if not len(who):
                continue
            prefill[who] = length - 1 - reader.filled[who]
            got = reader.read(who, text, torch.full_like(who, length))[:, 0]
            logits = got.new_zeros(rows, got.shape[1]) if logits is None else logits
            logits[who] = got.to(logits.dtype)
        token = _draw(_law(logits, temperature), generator)
        if end is not None:
            token = token.masked_fill(done, end)
        text[:, length] = token
        entropy = entropy_from_logits(logits, 2).masked_fill(done, 0.0)
        rolling = rule.update(entropy).masked_fill(done, 0.0)
        columns.append((active & ~done, entropy, rolling, prefill, ~done))
        if end is not None:
            done = done | (token == end)
            if bool(done.all()):
                break
    stacked = [torch.stack(column, 1) for column in zip(*columns, strict=True)]
    return text[:, start : start + len(columns)], GenerationTrace(*stacked, prompt=start)


def _law(logits, temperature):
    """Probabilities at a temperature; 0 puts all on the largest logit."""
    if temperature == 0:
        return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return torch.softmax(logits.float() / temperature, -1)


def _draw(law, generator):
    """One token a row by inverting the distribution function: row i uses the i-th uniform number whatever the others do."""
    u = torch.rand(len(law), 1, generator=generator, device=law.device, dtype=torch.float64)
    cumulative = law.double().cumsum(-1)
    return torch.searchsorted(cumulative / cumulative[:, -1:], u, right=True)[:, 0].clamp(
        max=law.shape[-1] - 1
    )


def _verify(proposals, laws, target, generator):
    """How many proposals stand, and the large model's token after them."""
    rows = len(target)
    index = torch.arange(rows, device=target.device)
    standing = torch.ones(rows, dtype=torch.bool, device=target.device)
    kept = torch.zeros(rows, dtype=torch.long, device=target.device)
    final = target[:, len(proposals)].clone()
    for k, (token, law) in enumerate(zip(proposals, laws, strict=True)):
        u = torch.rand(rows, generator=generator, device=target.device, dtype=target.dtype)
        stands = u * law[index, token] < target[index, k, token]
        refused = standing & ~stands
        final[refused] = (target[refused, k] - law[refused]).clamp(min=0)
        standing = standing & stands
        kept += standing
    return kept, _draw(final, generator)


def _vocabulary(small, large):
    if small.vocab_size != large.vocab_size:
        raise ValueError(
            f"both models need one vocabulary, got {small.vocab_size} and {large.vocab_size} tokens"
        )
    return large.vocab_size


def _check_call(prompt, temperature, max_new, end, model):
    if prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise TypeError(f"prompt must be integers, got {prompt.dtype}")
    if prompt.ndim != 2 or not prompt.numel():
        raise ValueError(f"prompt must be (n >= 1, length >= 1), got {tuple(prompt.shape)}")
    if not temperature >= 0 or max_new < 1:
        raise ValueError(
            f"temperature must not be negative and max_new at least 1, got {temperature} and {max_new}"
        )
    if end is not None and not 0 <= end < model.vocab_size:
        raise ValueError(f"end must be a token below {model.vocab_size}, got {end}")
