"""lib.data against scikit-learn, plain Python and files written byte by byte."""

import gzip
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lib.data import (
    DIGIT_NAMES,
    CharTokenizer,
    cifar10_binary,
    cifar100_binary,
    data_path,
    digits,
    english_text,
    mnist_idx,
    random_windows,
    token_windows,
)

# --- digits


def rows(images, labels):
    """Each example as one tuple, to compare as multisets."""
    flat = images.flatten(1).mul(16).to(torch.uint8).tolist()
    return sorted(tuple(image) + (label,) for image, label in zip(flat, labels.tolist(), strict=True))


def test_parts_hold_every_digit_once():
    bunch = load_digits()
    parts = digits((300, 900, 597), seed=3)
    assert [len(labels) for _, labels in parts] == [300, 900, 597]
    together = sorted(sum((rows(*part) for part in parts), []))
    assert together == rows(torch.tensor(bunch.data) / 16, torch.tensor(bunch.target))


def test_shapes_types_and_range():
    images, labels = digits()[0]
    flat, same_labels = digits(flat=True)[0]
    assert images.shape == (1200, 1, 8, 8) and labels.shape == (1200,)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert images.min() == 0 and images.max() == 1
    assert torch.equal(flat, images.flatten(1)) and torch.equal(labels, same_labels)
    assert len(DIGIT_NAMES) == len(labels.unique()) == 10


def test_seed_decides_and_global_state_does_not():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = digits(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = digits(seed=5), digits(seed=6)
    assert torch.equal(first[1][1], again[1][1]) and torch.equal(first[1][0], again[1][0])
    assert not torch.equal(first[1][1], other[1][1])


def test_the_last_part_is_the_same_however_the_rest_is_cut():
    two, three = digits((1200, 597), seed=4), digits((300, 900, 597), seed=4)
    assert torch.equal(two[-1][0], three[-1][0])


@pytest.mark.parametrize(
    "parts, counts", [((0.7, 0.3), [1258, 539]), ((1.0,), [1797]), ((0.1, 0.2, 0.7), [180, 359, 1258])]
)
def test_fractions(parts, counts):
    assert [len(labels) for _, labels in digits(parts)] == counts


@pytest.mark.parametrize("parts", [(), (0,), (10, -1), (1200, 598), (0.9, 0.2), (1e-6,)])
def test_impossible_parts(parts):
    with pytest.raises(ValueError, match="parts must be positive"):
        digits(parts)


@pytest.mark.parametrize("parts", [(100, 0.5), ("a",), (True,)])
def test_parts_of_other_types(parts):
    with pytest.raises(TypeError, match="all integers"):
        digits(parts)


# --- text


def test_english_text_is_long_sorted_and_stable():
    text = english_text()
    assert len(text) > 300_000 and text == english_text()
    assert text.index('The "assert" statement') < text.index('The "yield" statement')
    assert 60 <= len(set(text)) <= 200


@settings(max_examples=30)
@given(st.text(alphabet="abc\n ß“", max_size=40))
def test_tokenizer_round_trip(text):
    tokenizer = CharTokenizer("“ß cba\naab")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text
    assert [tokenizer.vocabulary[token] for token in tokens.tolist()] == list(text)


def test_vocabulary_is_sorted_and_takes_several_texts():
    assert CharTokenizer("hello").vocabulary == ("e", "h", "l", "o")
    assert CharTokenizer(["one", "two"]).vocabulary == ("e", "n", "o", "t", "w")
    assert len(CharTokenizer("hello")) == 4


def test_tokenizer_names_what_it_does_not_know():
    tokenizer = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"'\?', 'z'$"):
        tokenizer.encode("az?z")
    with pytest.raises(ValueError, match=r"vocabulary of 3: \[-1, 3\]"):
        tokenizer.decode([0, 3, -1])
    with pytest.raises(ValueError, match="at least one character"):
        CharTokenizer("")


@pytest.mark.parametrize("n, length", [(13, 4), (12, 4), (5, 4), (9, 1)])
def test_token_windows_follow_the_stream(n, length):
    stream = list(range(100, 100 + n))
    inputs, targets = token_windows(torch.tensor(stream), length)
    starts = [start for start in range(0, n, length) if start + length + 1 <= n]
    assert inputs.tolist() == [stream[start : start + length] for start in starts]
    assert targets.tolist() == [stream[start + 1 : start + length + 1] for start in starts]


def test_random_windows_cover_every_start_and_follow_the_stream():
    tokens = torch.arange(50, 59)
    inputs, targets = random_windows(tokens, 4, 200, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (200, 4)
    assert torch.equal(targets, inputs + 1)  # the stream counts upwards
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(4))
    assert inputs[:, 0].unique().tolist() == [50, 51, 52, 53, 54]
    again = random_windows(tokens, 4, 200, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, again[0])


def test_windows_that_do_not_fit():
    for windows in (lambda *a: token_windows(*a), lambda *a: random_windows(*a, 2)):
        with pytest.raises(ValueError, match="at least 5 tokens, got 4"):
            windows(torch.arange(4), 4)
        with pytest.raises(ValueError, match="length >= 1"):
            windows(torch.arange(4), 0)
        with pytest.raises(ValueError, match="shape"):
            windows(torch.zeros(2, 9), 4)
    with pytest.raises(ValueError, match="batch"):
        random_windows(torch.arange(9), 4, 0)


# --- files


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_idx(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4), dtype=np.uint8)
    content = struct.pack(">IIII", 0x00000803, 3, 5, 4) + images.tobytes()
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(mnist_idx(path).numpy(), images)
    labels = tmp_path / "labels"
    labels.write_bytes(struct.pack(">II", 0x00000801, 3) + bytes([7, 0, 9]))
    assert mnist_idx(str(labels)).tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "magic number"),
        (b"\x89PNG....", "magic number is 0x89504e47"),
        (struct.pack(">II", 0x00000D01, 1) + b"\0\0\0\0", "magic number"),  # an IDX file of floats
        (struct.pack(">II", 0x00000803, 3), "within its header"),
        (struct.pack(">II", 0x00000801, 3) + b"ab", r"\(3,\), but 2 bytes"),
        (struct.pack(">II", 0x00000801, 3) + b"abcd", r"\(3,\), but 4 bytes"),
        (struct.pack(">IIII", 0x00000803, 2**31, 2**31, 2**31), "0 bytes follow"),
        # without a time stamp: each worker must collect the same test
        (gzip.compress(b"x" * 100, mtime=0)[:-9], "gzip stream is damaged"),
    ],
)
def test_mnist_idx_damaged(tmp_path, content, message):
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        mnist_idx(path)
    assert str(path) in str(caught.value)


def test_cifar10_binary(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(
        b"".join(bytes([label]) + image.tobytes() for label, image in zip([9, 0], images, strict=True))
    )
    loaded, labels = cifar10_binary(path)
    assert np.array_equal(loaded.numpy(), images) and labels.tolist() == [9, 0]
    assert loaded.is_contiguous() and labels.dtype == torch.int64


@pytest.mark.parametrize(
    "content, message", [(b"", "0 bytes"), (b"a" * 3072, "3072 bytes"), (b"\x0a" + b"a" * 3072, "label 10")]
)
def test_cifar10_binary_damaged(tmp_path, content, message):
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cifar10_binary(path)


def test_cifar100_binary(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    path = tmp_path / "test.bin"
    path.write_bytes(
        b"".join(bytes([19, label]) + image.tobytes() for label, image in zip([99, 0], images, strict=True))
    )
    loaded, labels = cifar100_binary(path)
    assert np.array_equal(loaded.numpy(), images) and labels.tolist() == [99, 0]
    assert loaded.is_contiguous() and labels.dtype == torch.int64
    for content, message in (
        (b"", "0 bytes"),
        (b"a" * 3073, "3073 bytes"),
        (b"\x00\x64" + b"a" * 3072, "label 100"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            cifar100_binary(path)


@pytest.mark.parametrize("load", [mnist_idx, cifar10_binary, cifar100_binary])
def test_missing_file(tmp_path, load):
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        load(tmp_path / "no-such-file")


def test_data_path_finds_plain_and_gzipped_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGIT_BOOK_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError, match=r"mnist/labels is missing.*LOGIT_BOOK_DATA.*holds mnist"):
        data_path("mnist", "labels")
    (tmp_path / "mnist" / "labels.gz").write_bytes(b"")
    assert data_path("mnist", "labels") == tmp_path / "mnist" / "labels.gz"
    (tmp_path / "mnist" / "labels").write_bytes(b"")
    assert data_path("mnist", "labels") == tmp_path / "mnist" / "labels"
    monkeypatch.delenv("LOGIT_BOOK_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/mnist/labels is missing"):
        data_path("mnist", "labels")
