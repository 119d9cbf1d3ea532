"""English text and source code that ship with Python, characters as tokens, and windows of tokens for language models."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch


def english_text() -> str:
    """Some 450,000 characters of technical English: the topics of Python's own reference manual.

    They are joined in alphabetical order of their names. The wording belongs to the running Python version.
    """
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def code_text() -> str:
    """Some 500,000 characters of Python: the source of thirteen modules of the standard library.

    They are joined in alphabetical order; lines with characters other than ASCII are left out. The wording belongs to the
    running Python version.
    """
    sources = (Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in _CODE)
    lines = (line for source in sources for line in source.split("\n"))
    return "\n".join(line for line in lines if line.isascii()) + "\n"


_CODE = (
    "argparse", "csv", "difflib", "fractions", "functools", "heapq", "random",
    "shutil", "statistics", "tempfile", "textwrap", "threading", "tokenize",
)  # fmt: skip


class CharTokenizer:
    """Characters as tokens.

    Args:
        text: a string, or several, with the characters to know; the vocabulary is the sorted set of them.

    Raises:
        ValueError: `text` is empty.
    """

    def __init__(self, text: str | Iterable[str]):
        self._vocabulary = tuple(sorted(set("".join(text))))
        self._ids = {character: number for number, character in enumerate(self._vocabulary)}
        if not self._vocabulary:
            raise ValueError("a tokenizer needs at least one character")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The known characters; the position of a character is its token."""
        return self._vocabulary

    def __len__(self) -> int:
        return len(self._vocabulary)

    def encode(self, text: str) -> torch.Tensor:
        """Tokens of `text`: int64, shape (len(text),).

        Raises:
            ValueError: `text` holds characters outside the vocabulary; the message names them.
        """
        if unknown := sorted(set(text) - self._ids.keys()):
            raise ValueError(f"characters outside the vocabulary: {', '.join(map(repr, unknown))}")
        return torch.tensor([self._ids[character] for character in text], dtype=torch.long)

    def decode(self, tokens: torch.Tensor | Sequence[int]) -> str:
        """The text of a one-dimensional tensor or a sequence of tokens.

        Raises:
            ValueError: a token outside the vocabulary.
        """
        tokens = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        if unknown := sorted({token for token in tokens if not 0 <= token < len(self)}):
            raise ValueError(f"tokens outside the vocabulary of {len(self)}: {unknown}")
        return "".join(self._vocabulary[token] for token in tokens)


def token_windows(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All adjacent windows of a token stream, with the next token of each position as target.

    Args:
        tokens: shape (n,).
        length: of a window. What does not fill a window at the end is dropped.

    Returns:
        inputs and targets, both (windows, length), where `targets[i, j]` follows `inputs[i, j]` in the stream.

    Raises:
        ValueError: `tokens` is not one-dimensional, or shorter than one window and its last target.
    """
    _check_window(tokens, length)
    count = (len(tokens) - 1) // length
    inputs, targets = tokens[: count * length], tokens[1 : count * length + 1]
    return inputs.view(count, length), targets.view(count, length)


def random_windows(
    tokens: torch.Tensor, length: int, batch: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of a token stream that start anywhere, with the next token of each position as target.

    Args:
        tokens: shape (n,).
        length: of a window.
        batch: how many windows, drawn with replacement.
        generator: where the starts come from; the global random state without it.

    Returns:
        inputs and targets, both (batch, length).

    Raises:
        ValueError: as `token_windows`, or a batch below 1.
    """
    _check_window(tokens, length)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    index = (starts + torch.arange(length)).to(tokens.device)  # (batch, length)
    return tokens[index], tokens[index + 1]


def _check_window(tokens: torch.Tensor, length: int) -> None:
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape (n,), got {tuple(tokens.shape)}")
    if length < 1 or len(tokens) < length + 1:
        raise ValueError(
            f"a window of length {length} and its targets need length >= 1 and at least {max(length, 1) + 1} "
            f"tokens, got {len(tokens)}"
        )
