"""Loaders for the public on-disk formats of the image data sets that `scale="full"` uses.

They read files that you have downloaded; nothing here fetches anything or executes a pickle.
"""

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch


def data_path(*parts: str) -> Path:
    """A file or folder of a full-scale data set, plain or gzipped.

    Args:
        parts: its path below the folder that the environment variable LOGIT_BOOK_DATA names, by default `data` in
            the working directory, such as `"mnist", "train-images-idx3-ubyte"`.

    Raises:
        FileNotFoundError: neither it nor its gzipped form is there; the message says what to do.
    """
    path = Path(os.environ.get("LOGIT_BOOK_DATA") or "data").joinpath(*parts)
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(
        f"{path} is missing: download the data set and set the environment variable LOGIT_BOOK_DATA to the folder "
        f"that holds {parts[0]}"
    )


def mnist_idx(path: str | Path) -> torch.Tensor:
    """An IDX file of bytes, the format of MNIST, Fashion-MNIST and EMNIST: images or labels.

    Args:
        path: the file, plain or gzipped.

    Returns:
        uint8, of the shape written in the file: (n, height, width) for images, (n,) for labels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an IDX file of bytes, or its length is not what its header says.
    """
    content = _read(path)
    magic = content[:4]
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] < 1:
        raise ValueError(
            f"{path}: the magic number is 0x{magic.hex()}; an IDX file of bytes starts with 0x000008 "
            "and the number of dimensions (images 0x00000803, labels 0x00000801)"
        )
    start = 4 + 4 * magic[3]
    if len(content) < start:
        raise ValueError(f"{path}: the file ends within its header, it is truncated")
    shape = struct.unpack(f">{magic[3]}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if len(values) != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path}: the header says shape {shape}, but {len(values)} bytes follow it")
    return torch.from_numpy(values.copy()).view(shape)


def cifar10_binary(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch file of CIFAR-10 in its binary version (`data_batch_1.bin` and its like).

    Args:
        path: the file, plain or gzipped.

    Returns:
        images, uint8, (n, 3, 32, 32), and labels, int64, (n,), in 0..9.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its length is not a multiple of 3073 bytes, or a label is above 9.
    """
    return _cifar_rows(path, "CIFAR-10", 1, 10)


def cifar100_binary(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """One file of CIFAR-100 in its binary version (`train.bin` or `test.bin`).

    Args:
        path: the file, plain or gzipped.

    Returns:
        images, uint8, (n, 3, 32, 32), and fine labels, int64, (n,), in 0..99. The coarse labels are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its length is not a multiple of 3074 bytes, or a label is above 99.
    """
    return _cifar_rows(path, "CIFAR-100", 2, 100)


def _cifar_rows(path, name, num_labels, num_classes):
    """Images and the last of `num_labels` labels before each of them, which must be below `num_classes`."""
    content, size = _read(path), num_labels + 3072
    if not content or len(content) % size:
        raise ValueError(
            f"{path}: {len(content)} bytes; a {name} binary file holds a positive multiple of {size}"
        )
    rows = torch.from_numpy(np.frombuffer(content, np.uint8).copy()).view(-1, size)
    images = rows[:, num_labels:].reshape(-1, 3, 32, 32).contiguous()
    labels = rows[:, num_labels - 1].long()
    if labels.max() >= num_classes:
        raise ValueError(
            f"{path}: the label {int(labels.max())} is above {num_classes - 1}; this is not {name}'s binary format"
        )
    return images, labels


def _read(path: str | Path) -> bytes:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; download the data set and give its path")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip stream is damaged ({error})") from error
    return content
