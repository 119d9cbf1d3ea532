"""Entropy coding with integer frequency tables: many tables, one stream, symbols of any size."""

from collections.abc import Sequence

import constriction
import numpy as np

Categorical, Uniform = constriction.stream.model.Categorical, constriction.stream.model.Uniform
AnsCoder = constriction.stream.stack.AnsCoder

PRECISION = 16  # a table's frequencies add up to 2**PRECISION
_HALF = 2**16  # an escaped symbol is sent as two uniform numbers below this


def integer_frequencies(probabilities, *, precision: int = PRECISION) -> np.ndarray:
    """Positive integers that add up to 2**precision and are nearly proportional to the probabilities.

    Every symbol gets 1; what is left is shared in proportion, rounded down, and the rest goes to the largest
    remainders, the first one in a tie. The result depends on nothing but the numbers given, so encoder and decoder
    make the same table.

    Args:
        probabilities: (n,), not negative, with a positive sum; computed in float64.
        precision: bits.

    Raises:
        ValueError: probabilities that are not such numbers, or more of them than 2**precision.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or (p < 0).any() or p.sum() <= 0:
        raise ValueError("probabilities must be a vector of finite numbers >= 0 with a positive sum")
    spare = 2**precision - len(p)
    if spare < 0:
        raise ValueError(f"{len(p)} symbols do not fit into 2**{precision} frequencies")
    share = p / p.sum() * spare
    frequencies = np.floor(share).astype(np.int64)
    order = np.argsort(-(share - frequencies), kind="stable")
    frequencies[order[: spare - frequencies.sum()]] += 1
    return frequencies + 1


class Tables:
    """Frequency tables for integer symbols around zero; the last entry of each table is the escape.

    Args:
        frequencies: for each table a vector of positive integers that add up to 2**16: of the symbols
            `offset`, `offset` + 1, ..., and then of the escape, which stands for all other integers.
        offsets: the first symbol of each table.

    Raises:
        ValueError: frequencies that do not add up, or numbers of tables and offsets that differ.
    """

    def __init__(self, frequencies: Sequence[np.ndarray], offsets: Sequence[int]):
        if len(frequencies) != len(offsets):
            raise ValueError(f"{len(frequencies)} tables, but {len(offsets)} offsets")
        self.frequencies = [np.asarray(table, dtype=np.int64) for table in frequencies]
        for i, table in enumerate(self.frequencies):
            if len(table) < 2 or table.min() < 1 or table.sum() != 2**PRECISION:
                raise ValueError(f"table {i} must hold two or more integers >= 1 that sum to 2**{PRECISION}")
        self.offsets = [int(offset) for offset in offsets]
        # dyadic fractions are exact in float64, so constriction's own table is the same everywhere
        self.models = [Categorical(table / 2.0**PRECISION, perfect=False) for table in self.frequencies]

    def __len__(self) -> int:
        return len(self.frequencies)

    def bits(self, symbols, indexes) -> float:
        """The information content of symbols under their tables, in bits: what an ideal coder would need."""
        total = 0.0
        for index, places in _groups(np.asarray(indexes).ravel(), len(self)):
            entries, excess = self._entries(np.asarray(symbols).ravel()[places], index)
            total += np.sum(PRECISION - np.log2(self.frequencies[index][entries])) + 32.0 * len(excess)
        return float(total)

    def _entries(self, symbols: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the table, and the symbols that escape."""
        escape = len(self.frequencies[index]) - 1
        entries = symbols.astype(np.int64) - self.offsets[index]
        outside = (entries < 0) | (entries >= escape)
        return np.where(outside, escape, entries).astype(np.int32), symbols[outside].astype(np.int64)


class SymbolEncoder:
    """Collects symbols in coding order; `finish` makes the bytes.

    An ANS coder is a stack: what is encoded last is decoded first. So the symbols are kept until the end and then encoded
    backwards.
    """

    def __init__(self):
        self._pushed = []

    def push(self, symbols, indexes, tables: Tables) -> None:
        """Append integer symbols, each with the table of that index.

        Args:
            symbols: integers of any shape, each of magnitude below 2**31.
            indexes: of the same shape, of the tables.
            tables: that the decoder has too.

        Raises:
            ValueError: shapes that differ, numbers that are no integers, an index without a table, too large a symbol.
        """
        symbols, indexes = np.asarray(symbols), np.asarray(indexes)
        if symbols.shape != indexes.shape:
            raise ValueError(f"symbols are {symbols.shape}, indexes {indexes.shape}")
        if symbols.dtype.kind not in "iu" or indexes.dtype.kind not in "iu":
            raise ValueError(f"symbols and indexes must be integers, got {symbols.dtype} and {indexes.dtype}")
        if symbols.size and np.abs(symbols.astype(np.int64)).max() >= 2**31:
            raise ValueError("symbols must lie within 32 bits")
        for index, places in _groups(indexes.ravel(), len(tables)):
            entries, excess = tables._entries(symbols.ravel()[places], index)
            self._pushed.append((entries, tables.models[index]))
            if len(excess):
                words = np.where(excess < 0, -2 * excess - 1, 2 * excess)  # zigzag: 0, -1, 1, -2, ...
                halves = np.stack([words // _HALF, words % _HALF], 1).ravel().astype(np.int32)
                self._pushed.append((halves, Uniform(_HALF)))

    def finish(self) -> bytes:
        """The stream, whole 32-bit words, least significant byte first."""
        coder = AnsCoder()
        for entries, model in reversed(self._pushed):
            coder.encode_reverse(entries, model)
        return coder.get_compressed().astype("<u4").tobytes()


class SymbolDecoder:
    """Reads what a `SymbolEncoder` wrote.

    Raises:
        ValueError: bytes that are not a stream.
    """

    def __init__(self, stream: bytes):
        if len(stream) % 4:
            raise ValueError(f"a stream consists of words of 4 bytes, got {len(stream)} bytes")
        self._coder = AnsCoder(np.frombuffer(stream, dtype="<u4").astype(np.uint32))

    def pull(self, indexes, tables: Tables) -> np.ndarray:
        """The next symbols, int64, in the shape of `indexes`, which must be those they were pushed with."""
        indexes = np.asarray(indexes)
        symbols = np.empty(indexes.size, dtype=np.int64)
        for index, places in _groups(indexes.ravel(), len(tables)):
            entries = self._coder.decode(tables.models[index], len(places)).astype(np.int64)
            values = entries + tables.offsets[index]
            escaped = np.flatnonzero(entries == len(tables.frequencies[index]) - 1)
            if len(escaped):
                halves = self._coder.decode(Uniform(_HALF), 2 * len(escaped)).astype(np.int64).reshape(-1, 2)
                words = halves[:, 0] * _HALF + halves[:, 1]
                values[escaped] = np.where(words % 2, -(words + 1) // 2, words // 2)
            symbols[places] = values
        return symbols.reshape(indexes.shape)

    def is_finished(self) -> bool:
        """Whether nothing is left to read, as it must be after the last symbol of an undamaged stream."""
        return bool(self._coder.is_empty())


def _groups(indexes: np.ndarray, count: int):
    """Each index that occurs, ascending, with its places: symbols of one table are coded in one call."""
    if indexes.size and not 0 <= indexes.min() <= indexes.max() < count:
        raise ValueError(f"indexes must lie in 0 ... {count - 1}, got {indexes.min()} ... {indexes.max()}")
    order = np.argsort(indexes, kind="stable")
    values, starts = np.unique(indexes[order], return_index=True)
    return [
        (int(value), places)
        for value, places in zip(values, np.split(order, starts[1:]), strict=False)
        if len(places)
    ]
