"""The file format: a header, a checksum, streams."""

import struct
import zlib
from typing import NamedTuple

MAGIC, VERSION = b"LBIC", 1
_HEADER = struct.Struct("<4sBBHHBI")  # magic, version, rate, height, width, number of streams, checksum
_LENGTH = struct.Struct("<I")


class Container(NamedTuple):
    """What a file holds: the image's size, the rate point of the codec, and the streams in order."""

    height: int
    width: int
    rate: int
    streams: tuple[bytes, ...]


def pack(height: int, width: int, rate: int, streams) -> bytes:
    """A file: 15 bytes of header with the CRC-32 of all the rest, 4 bytes a stream for its length, the streams.

    Raises:
        ValueError: a size, rate or number of streams that has no room in the header.
    """
    if not (1 <= height < 2**16 and 1 <= width < 2**16 and 0 <= rate < 256 and len(streams) < 256):
        raise ValueError(f"cannot store {height} x {width} pixels, rate {rate}, {len(streams)} streams")
    body = b"".join(_LENGTH.pack(len(stream)) for stream in streams) + b"".join(streams)
    fields = (MAGIC, VERSION, rate, height, width, len(streams))
    checksum = zlib.crc32(body, zlib.crc32(_HEADER.pack(*fields, 0)))
    return _HEADER.pack(*fields, checksum) + body


def unpack(file: bytes) -> Container:
    """Read what `pack` made.

    Raises:
        ValueError: another format or version, a wrong checksum, or too few or too many bytes.
    """
    if len(file) < _HEADER.size:
        raise ValueError(f"a file has at least {_HEADER.size} bytes, got {len(file)}")
    *fields, checksum = _HEADER.unpack_from(file)
    magic, version, rate, height, width, count = fields
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"not a file of this format: it starts with {magic!r}, version {version}")
    body = file[_HEADER.size :]
    if zlib.crc32(body, zlib.crc32(_HEADER.pack(*fields, 0))) != checksum:
        raise ValueError("the file is damaged: its checksum is wrong")
    start = count * _LENGTH.size
    lengths = [_LENGTH.unpack_from(body, i * _LENGTH.size)[0] for i in range(count)]
    if start + sum(lengths) != len(body):
        raise ValueError(f"streams of {sum(lengths)} bytes are promised, {len(body) - start} are there")
    streams = []
    for length in lengths:
        streams.append(body[start : start + length])
        start += length
    return Container(height, width, rate, tuple(streams))
