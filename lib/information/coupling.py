"""Couplings of discrete laws: minimum entropy coupling, entropy-bounded encoders, and both behind a bottleneck.

All entropies are in bits. Laws are float64 numpy arrays (anything `numpy.asarray` takes); `0 log 0` is 0.
The formulas are those of Ebrahimi, Chen and Khisti, "Minimum Entropy Coupling with Bottleneck"
(arXiv 2410.21666), and of Cicalese, Gargano and Vaccaro (arXiv 1901.07530) for the majorisation bound.
"""

import functools
import heapq
import itertools
import math
from bisect import insort

import numpy as np

SPENT = 1e-15  # mass below which an entry of a marginal counts as used up
ROUNDING = 1e-12  # slack of `entropy <= rate`, so that a rate of exactly H(g(X)) is met by g


def entropy_bits(p, axis: int | tuple[int, ...] | None = -1) -> np.ndarray | float:
    """Entropy of non-negative masses along `axis` (None: of all entries), `-sum p log2 p`, in bits."""
    p = np.asarray(p, dtype=np.float64)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=axis)


def binary_entropy_bits(probability) -> np.ndarray | float:
    """Entropy of a coin in bits: `h(x) = -x log2 x - (1 - x) log2 (1 - x)`."""
    x = np.asarray(probability, dtype=np.float64)
    return entropy_bits(np.stack([x, 1 - x]), axis=0)


def mutual_information_bits(joint) -> np.ndarray | float:
    """Mutual information `H(row) + H(column) - H(joint)` in bits of joint laws of shape (..., n, m)."""
    joint = np.asarray(joint, dtype=np.float64)
    rows, columns = entropy_bits(joint.sum(-1)), entropy_bits(joint.sum(-2))
    return rows + columns - entropy_bits(joint, (-2, -1))


def _law(p, name: str, batched: bool = False) -> np.ndarray:
    law = np.array(p, dtype=np.float64)  # a copy: the algorithms consume it
    if law.ndim == 0 or (law.ndim > 1 and not batched) or law.shape[-1] == 0:
        expected = "(..., n)" if batched else "(n,)"
        raise ValueError(f"{name} must have shape {expected} with n >= 1, got {law.shape}")
    if not np.isfinite(law).all() or (law < 0).any():
        raise ValueError(f"{name} must hold finite probabilities >= 0")
    if np.abs(law.sum(-1) - 1).max(initial=0) > 1e-9:
        raise ValueError(f"{name} must sum to 1 within 1e-9; its sums differ from 1 by up to "
                         f"{np.abs(law.sum(-1) - 1).max():.2g}")  # fmt: skip
    return law


def _rates(rate) -> np.ndarray:
    rates = np.atleast_1d(np.asarray(rate, dtype=np.float64))
    if rates.ndim != 1 or not (rates >= 0).all():
        raise ValueError(f"a rate must be a number of bits >= 0, or several of shape (r,), got {rate}")
    return rates


# --- the decoder's problem: minimum entropy coupling


def minimum_entropy_coupling(p, q, method: str = "max") -> np.ndarray:
    """A joint law of small entropy with marginals `p` and `q`; equivalently of large mutual information.

    `"max"` matches the largest remaining entries of `p` and `q` again and again and puts the smaller of the two
    into their cell. `"zero"` takes, at each step, the pair that comes nearest to using up both its entries:
    the one with the largest `min(p_i, q_j) / max(p_i, q_j)`, ties going to the larger mass. Both leave at most
    n + m - 1 cells occupied. `"brute"` enumerates the vertices of the transport polytope and is exact, for tiny
    sizes. Ties go to the lowest index, so two parties that call this function get the same coupling.

    Args:
        p: law of the rows, shape (n,); for `"max"` also a batch (..., n).
        q: law of the columns, shape (m,); for `"max"` also a batch (..., m) that broadcasts against `p`.
        method: `"max"`, `"zero"` or `"brute"`.

    Returns:
        The joint law, shape (..., n, m). Its marginals are `p` and `q` up to rounding, about 1e-15 an entry
        (or up to the difference of their sums).

    Raises:
        ValueError: not laws, an unknown method, a batch for a method that takes none, or a brute force over
            more than 200 000 candidate bases.
    """
    if method not in ("max", "zero", "brute"):
        raise ValueError(f"method must be 'max', 'zero' or 'brute', got {method!r}")
    p, q = _law(p, "p", method == "max"), _law(q, "q", method == "max")
    if method == "brute":
        return _vertex_coupling(p, q)
    if method == "zero":
        return _zero_seeking(p, q)
    batch = np.broadcast_shapes(p.shape[:-1], q.shape[:-1])
    p = np.array(np.broadcast_to(p, (*batch, p.shape[-1]))).reshape(-1, p.shape[-1])
    q = np.array(np.broadcast_to(q, (*batch, q.shape[-1]))).reshape(-1, q.shape[-1])
    return _max_seeking(p, q).reshape(*batch, p.shape[-1], q.shape[-1])


def _max_seeking(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Greedy couplings of the rows of `p` (N, n) with those of `q` (N, m); consumes both."""
    joint = np.zeros((*p.shape, q.shape[1]))
    rows = np.arange(len(p))
    for _ in range(p.shape[1] + q.shape[1]):  # each pass uses up an entry of every row
        i, j = p.argmax(1), q.argmax(1)
        p_max, q_max = p[rows, i], q[rows, j]
        mass = np.minimum(p_max, q_max)
        if mass.max(initial=0) <= SPENT:
            break
        joint[rows, i, j] += mass
        p[rows, i] = p_max - mass
        q[rows, j] = q_max - mass
    return joint


def _zero_seeking(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    joint = np.zeros((len(p), len(q)))
    for _ in range(len(p) + len(q)):
        low, high = np.minimum.outer(p, q), np.maximum.outer(p, q)
        if low.max() <= SPENT:
            break
        ratio = np.where(low > SPENT, low / np.where(high > 0, high, 1.0), -1.0)
        best = np.where(ratio >= ratio.max() - ROUNDING, low, -1.0)
        i, j = np.unravel_index(best.argmax(), best.shape)
        mass = low[i, j]
        joint[i, j] += mass
        p[i], q[j] = p[i] - mass, q[j] - mass
    return joint


@functools.lru_cache(maxsize=16)
def _transport_bases(n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Bases of the n x m transport polytope: cells (bases, n + m - 1) and the maps from (p, q) to their masses."""
    size = n + m - 1
    if math.comb(n * m, size) > 200_000:
        raise ValueError(f"method='brute' is for tiny laws, such as 4 x 5; got {n} x {m}")
    incidence = np.zeros((n + m, n * m))
    for cell in range(n * m):
        incidence[cell // m, cell] = incidence[n + cell % m, cell] = 1
    cells = np.array(list(itertools.combinations(range(n * m), size)))
    square = incidence[:-1][:, cells].transpose(1, 0, 2)  # the last equation follows from the others
    keep = np.abs(np.linalg.det(square)) > 0.5  # determinants are 0 or +-1
    return cells[keep], np.linalg.inv(square[keep])


def _vertex_coupling(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    cells, inverse = _transport_bases(len(p), len(q))
    masses = inverse @ np.concatenate([p, q])[:-1]
    masses = np.where((masses >= -ROUNDING).all(1, keepdims=True), masses.clip(0), np.nan)
    best = np.nanargmin(entropy_bits(masses))
    joint = np.zeros(len(p) * len(q))
    joint[cells[best]] = masses[best]
    return joint.reshape(len(p), len(q))


def majorisation_meet(p, q) -> np.ndarray:
    """The largest law below `p` and `q` in the majorisation order; its entropy bounds that of every coupling below.

    Any coupling, read as one long vector, is majorised by both marginals, hence by their meet, and entropy is
    Schur-concave: `H(T, Y) >= H(p meet q) >= max(H(p), H(q))` (Cicalese, Gargano and Vaccaro).

    Returns:
        The meet, sorted downwards, of shape (max(n, m),).
    """
    p, q = _law(p, "p"), _law(q, "q")
    size = max(len(p), len(q))
    sums = [np.cumsum(np.pad(np.sort(law)[::-1], (0, size - len(law)))) for law in (p, q)]
    return np.diff(np.minimum(*sums), prepend=0.0)


# --- the encoder's problem: entropy-bounded information maximisation


def set_partitions(n: int) -> np.ndarray:
    """All partitions of n symbols as restricted growth strings: shape (Bell(n), n), cells numbered from 0.

    Raises:
        ValueError: n is not in 1..10 (Bell(10) is 115 975).
    """
    if not 1 <= n <= 10:
        raise ValueError(f"n must be in 1..10, got {n}")
    strings = np.zeros((1, 1), dtype=np.int64)
    for _ in range(n - 1):
        choices = strings.max(1) + 2
        offsets = np.arange(choices.sum()) - np.repeat(np.cumsum(choices) - choices, choices)
        strings = np.column_stack([np.repeat(strings, choices, axis=0), offsets])
    return strings


def cell_masses(p, assign) -> np.ndarray:
    """Masses of the cells of one or more maps: `p` of shape (n,), `assign` (..., n) to masses (..., n)."""
    p, assign = np.asarray(p, dtype=np.float64), np.asarray(assign)
    masses = np.zeros(assign.shape)
    flat, cells = masses.reshape(-1, len(p)), assign.reshape(-1, len(p))
    rows = np.arange(len(flat))
    for symbol, mass in enumerate(p):
        flat[rows, cells[:, symbol]] += mass
    return masses


def ebim(p, rate, method: str = "best") -> dict:
    """A deterministic encoder T = g(X) of large information I(X; T) = H(T) under H(T) <= rate.

    Four ways, all of which merge cells of the finest partition:

    - `"absorb"`: the least likely symbols join the likeliest one, one after the other, until the rate is met.
      Within h(p_2) bits of the optimum over all encoders, p_2 the second largest probability.
    - `"search"`: merge the two largest cells again and again; stop when merging the two smallest, or else the
      two largest, meets the rate. Within h(p_2) bits as well.
    - `"huffman"`: always the two smallest cells, which is the merge that loses least.
    - `"best"`: the best of the three, improved by moving and swapping symbols; it inherits the guarantee.

    Args:
        p: law of X, shape (n,).
        rate: bound on H(T) in bits, or several of shape (r,), which are solved together.
        method: one of the above.

    Returns:
        `assign` (n,), the cell of each symbol, numbered by first appearance; `H` and `I`, equal, in bits;
        `gap_bound`, h(p_2), which does not hold for `"huffman"`. With several rates `assign` has shape (r, n), `H` and
        `I` have shape (r,).

    Raises:
        ValueError: not a law, a negative rate, or an unknown method.
    """
    p = _law(p, "p")
    if method not in _PATHS and method != "best":
        raise ValueError(f"method must be 'best' or one of {tuple(_PATHS)}, got {method!r}")
    limits = _rates(rate) + ROUNDING
    finest = np.arange(len(p))
    assigns = []
    for limit in limits:
        if entropy_bits(p) <= limit:
            assigns.append(finest[None])
        elif method == "best":
            assigns.append(np.stack([path(p, limit) for path in _PATHS.values()]))
        else:
            assigns.append(_PATHS[method](p, limit)[None])
    if method == "best":
        assigns = _improve_all(p, assigns, limits)
    assign = np.stack([_canonical(cells) for cells in (found[0] for found in assigns)])
    information = entropy_bits(cell_masses(p, assign))
    second = np.sort(p)[-2] if len(p) > 1 else 0.0
    bound = float(binary_entropy_bits(second))
    if np.ndim(rate) == 0:
        assign, information = assign[0], float(information[0])
    return {"assign": assign, "H": information, "I": information, "gap_bound": bound}


def _improve_all(p: np.ndarray, starts: list[np.ndarray], limits: np.ndarray) -> list[np.ndarray]:
    """Improve the starts of every rate, in chunks that fit in memory, and keep the best of each."""
    chosen, chunk = [], max(1, 1_000_000 // len(p) ** 2)
    for first in range(0, len(starts), chunk):
        part = starts[first : first + chunk]
        counts = [len(found) for found in part]
        improved = _improve(p, np.concatenate(part), np.repeat(limits[first : first + chunk], counts))
        score = entropy_bits(cell_masses(p, improved)).round(12)
        for end, count in zip(np.cumsum(counts), counts, strict=True):
            best = end - count + score[end - count : end].argmax()
            chosen.append(improved[best : best + 1])
    return chosen


def _canonical(assign: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(assign, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _plogp(mass: float) -> float:
    return mass * math.log2(mass) if mass > 0 else 0.0


def _absorb(p: np.ndarray, limit: float) -> np.ndarray:
    order = np.argsort(-p, kind="stable")
    terms = -p[order] * np.log2(np.where(p[order] > 0, p[order], 1.0))
    tail = np.concatenate([[0.0], np.cumsum(p[order][:0:-1])])  # mass of the j least likely symbols
    heavy = p[order[0]] + tail
    kept = np.concatenate([[0.0], np.cumsum(terms[1:])])[::-1]  # entropy terms of the symbols still alone
    entropies = kept - heavy * np.log2(np.where(heavy > 0, heavy, 1.0))
    entropies[-1] = 0.0
    merged = int(np.argmax(entropies <= limit))
    assign = np.arange(len(p))
    assign[order[len(p) - merged :]] = order[0]
    return assign


def _huffman(p: np.ndarray, limit: float) -> np.ndarray:
    entropy, assign = float(entropy_bits(p)), np.arange(len(p))
    heap = [(mass, symbol) for symbol, mass in enumerate(p.tolist())]
    heapq.heapify(heap)
    while entropy > limit and len(heap) > 1:
        (a, i), (b, j) = heapq.heappop(heap), heapq.heappop(heap)
        entropy -= _plogp(a + b) - _plogp(a) - _plogp(b)
        assign[assign == i] = j
        heapq.heappush(heap, (a + b, j))
    return assign


def _search(p: np.ndarray, limit: float) -> np.ndarray:
    entropy, assign = float(entropy_bits(p)), np.arange(len(p))
    cells = sorted((mass, symbol) for symbol, mass in enumerate(p.tolist()))
    while entropy > limit and len(cells) > 1:
        for pair in (slice(0, 2), slice(-2, None)):
            (a, i), (b, j) = cells[pair]
            loss = _plogp(a + b) - _plogp(a) - _plogp(b)
            if entropy - loss <= limit:
                break  # the two smallest cells suffice, or else the two largest do
        del cells[pair]
        entropy -= loss
        assign[assign == i] = j
        insort(cells, (a + b, j))
    return assign


_PATHS = {"absorb": _absorb, "search": _search, "huffman": _huffman}


def _improve(p: np.ndarray, starts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Move single symbols, or swap two, while the entropy rises and stays within the limits; `starts` (s, n)."""

    def term(mass):
        return -mass * np.log2(np.where(mass > 0, mass, 1.0))

    assigns, n, limit = starts.copy(), len(p), limits[:, None, None]
    rows = np.arange(len(assigns))
    shift = (
        p[None, :] - p[:, None]
    )  # what the row's cell gains when the row's symbol is swapped for the column's
    for _ in range(10 * n):
        masses = cell_masses(p, assigns)
        entropy = term(masses).sum(1)[:, None, None]
        own = np.take_along_axis(masses, assigns, axis=1)
        leave = term((own - p).clip(0)) - term(own)
        gain = leave[:, :, None] + term(masses[:, None, :] + p[:, None]) - term(masses)[:, None, :]
        np.put_along_axis(gain, assigns[:, :, None], 0.0, axis=2)
        gain[entropy + gain > limit] = 0.0
        flat = gain.reshape(len(rows), -1).argmax(1)
        best = gain.reshape(len(rows), -1)[rows, flat]
        symbol, cell = np.divmod(flat, n)
        other, other_cell = symbol, cell
        if n <= 64:
            swap = term((own[:, :, None] + shift).clip(0)) - term(own)[:, :, None]
            swap = swap + swap.transpose(0, 2, 1)
            swap[(assigns[:, :, None] == assigns[:, None, :]) | (entropy + swap > limit)] = 0.0
            flat = swap.reshape(len(rows), -1).argmax(1)
            best_swap = swap.reshape(len(rows), -1)[rows, flat]
            i, j = np.divmod(flat, n)
            use = best_swap > best
            best = np.where(use, best_swap, best)
            symbol, cell = np.where(use, i, symbol), np.where(use, assigns[rows, j], cell)
            other, other_cell = np.where(use, j, other), np.where(use, assigns[rows, i], other_cell)
        go = best > ROUNDING
        if not go.any():
            break
        assigns[rows[go], symbol[go]] = cell[go]
        assigns[rows[go], other[go]] = other_cell[go]
    return assigns


def ebim_curve(p, rates, maps=None) -> tuple[np.ndarray, np.ndarray]:
    """The information an encoder can keep at each rate, between and around the deterministic maps (Theorem 3).

    From every deterministic map two rays start. Upwards: in the smallest cell relative to its column, part of
    the mass moves to a new column. Downwards: of the smallest cell in the smallest column, part of the mass
    moves to the largest column. Mass stays in its row, so the law of X is kept. Along a ray H(T) is monotone, so
    each rate is met by bisection. The best ray wins; a lower rate's encoder serves a higher rate too. The rays are
    optimal near their partitions; further away the result is what they reach, a lower bound of I_EBIM.

    Args:
        p: law of X, shape (n,).
        rates: bounds on H(T) in bits, shape (r,), in any order.
        maps: deterministic maps to start from, shape (maps, n); by default all partitions for n <= 8, and the
            partitions that `ebim` finds at the given rates beyond.

    Returns:
        I(X; T) at each rate, shape (r,), and the joint laws of (X, T), shape (r, n, n + 1).

    Raises:
        ValueError: not a law, a negative rate, or maps of another shape.
    """
    p = _law(p, "p")
    n = len(p)
    rates = _rates(rates)
    if maps is None:
        if n <= 8:
            maps = set_partitions(n)
        else:
            constant = np.zeros((1, n), dtype=np.int64)
            maps = np.unique(np.concatenate([ebim(p, rates)["assign"], constant]), axis=0)
    maps = np.asarray(maps)
    if maps.ndim != 2 or maps.shape[1] != n or maps.min() < 0 or maps.max() >= n:
        raise ValueError(f"maps must have shape (maps, {n}) and cells in 0..{n - 1}, got {maps.shape}")
    masses = cell_masses(p, maps)
    base = entropy_bits(masses)
    own = np.take_along_axis(masses, maps, axis=1)  # (maps, n): mass of each symbol's column
    index = np.arange(len(maps))

    # upwards: symbol with the smallest p_x / P_t, to a new column of mass 0; ties to the smaller, cheaper column
    relative = np.where(p > 0, p / np.where(own > 0, own, 1.0), np.inf)
    up = (relative.round(12) + 1e-12 * own).argmin(1)
    # downwards: smallest column, its smallest cell, to the largest column; ties to the smaller cell
    down = (np.where(p > 0, own, np.inf).round(12) + 1e-12 * p).argmin(1)
    smallest, largest = maps[index, down], masses.argmax(1)
    single = smallest == largest  # the masses are equal or there is one only: take another where there is one
    other = masses.copy()
    other[index, smallest] = -1.0
    largest = np.where(single, other.argmax(1), largest)

    symbol = np.concatenate([up, down])
    source = np.concatenate([maps[index, up], smallest])
    target = np.concatenate([np.full(len(maps), n), largest])
    padded = np.concatenate([masses, np.zeros((len(maps), 1))], axis=1)
    both = np.concatenate([padded, padded])
    rows = np.arange(len(both))
    first, second, row_mass = both[rows, source], both[rows, target], p[symbol]
    start = np.concatenate([base, base])

    def term(mass):
        return -mass * np.log2(np.where(mass > 0, mass, 1.0))

    def entropy_at(moved):  # (rays, r) -> H(T) with `moved` of the symbol's mass in its new column
        fixed = start - term(first) - term(second)
        return fixed[:, None] + term((first[:, None] - moved).clip(0)) + term(second[:, None] + moved)

    sign = np.where(rows < len(maps), 1.0, -1.0)[:, None]
    low = np.zeros((len(both), len(rates)))
    high = np.broadcast_to(row_mass[:, None], low.shape).copy()
    for _ in range(60):  # keep `low` on the near side: entropy between the map's and the rate
        middle = (low + high) / 2
        near = sign * (entropy_at(middle) - rates) <= 0
        low, high = np.where(near, middle, low), np.where(near, high, middle)
    rising = sign > 0
    ends = np.broadcast_to(row_mass[:, None], low.shape)
    feasible_start = start[:, None] <= rates + ROUNDING
    whole = np.where(first > row_mass + SPENT, row_mass, 0.0)[
        :, None
    ]  # past the ray's end: the next partition
    moved = np.where(
        rising,
        np.where(entropy_at(ends) <= rates + ROUNDING, whole, low),
        np.where(feasible_start, 0.0, high),
    )
    entropy = entropy_at(moved)
    inner = np.where(row_mass > 0, row_mass, 1.0)[:, None]
    information = entropy - row_mass[:, None] * binary_entropy_bits((moved / inner).clip(0, 1))
    information = np.where(entropy <= rates + 1e-9, information, -np.inf)
    best = information.argmax(0)

    joints = np.zeros((len(rates), n, n + 1))
    for r, ray in enumerate(best):
        joints[r, np.arange(n), maps[ray % len(maps)]] = p
        joints[r, symbol[ray], source[ray]] -= moved[ray, r]
        joints[r, symbol[ray], target[ray]] += moved[ray, r]
    values = information[best, np.arange(len(rates))]
    order = np.argsort(rates, kind="stable")
    for previous, current in itertools.pairwise(order):  # a smaller code is allowed at a larger rate
        if values[previous] > values[current]:
            values[current], joints[current] = values[previous], joints[previous]
    return values, joints


# --- both: minimum entropy coupling with a bottleneck


def mec_bottleneck(p_x, p_y, rate: float, method: str = "max") -> dict:
    """Encoder and decoder for X - T - Y with H(T) <= rate and prescribed laws of X and Y, I(X; Y) made large.

    The encoder is `ebim`, the decoder a minimum entropy coupling of the code's law with `p_y`: the two terms of
    the lower bound I(X; Y) >= I(X; T) + I(Y; T) - rate.

    Args:
        p_x: law of X, shape (n,).
        p_y: law of Y, shape (m,).
        rate: bound on H(T) in bits.
        method: of `minimum_entropy_coupling`.

    Returns:
        `encoder` p(t | x) of shape (n, k), `decoder` p(y | t) of shape (k, m), `joint` law of (X, Y) of shape
        (n, m), and `I`, I(X; Y) in bits. Codes of mass 0 decode to the law of Y.

    Raises:
        ValueError: not laws, a negative rate or an unknown method.
    """
    p_x, p_y = _law(p_x, "p_x"), _law(p_y, "p_y")
    assign = ebim(p_x, rate)["assign"]
    encoder = np.eye(assign.max() + 1)[assign]
    p_t = p_x @ encoder
    coupling = minimum_entropy_coupling(p_t, p_y, method)
    weight = coupling.sum(1, keepdims=True)
    decoder = np.where(weight > 0, coupling / np.where(weight > 0, weight, 1.0), p_y)
    joint = p_x[:, None] * (encoder @ decoder)
    information = max(float(mutual_information_bits(joint)), 0.0)
    return {"encoder": encoder, "decoder": decoder, "joint": joint, "I": information}
