"""A reader for IDX, the format that MNIST is published in.

An IDX file is a header and raw numbers, all big-endian:

    byte 0, 1   zero
    byte 2      type of the numbers (0x08: unsigned byte, the only type MNIST uses)
    byte 3      number of dimensions, d
    then        d sizes, 4 bytes each
    then        the numbers themselves, the last dimension running fastest

Source: the data set's own page, http://yann.lecun.com/exdb/mnist/, "The IDX file format".
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch

from convext.errors import UserError

_UNSIGNED_BYTE = 0x08


class DataError(UserError):
    """A data file that is missing, unreadable, broken or not the one expected."""


def read_idx(path: str | Path, sha256: str | None = None) -> torch.Tensor:
    """Reads one IDX file of unsigned bytes, gzip-compressed or plain.

    Args:
        path: the file. Compression is told from its first two bytes, not from its name.
        sha256: the SHA-256 that the *uncompressed* content must have, in hexadecimal.
            Compressed files differ from one gzip to the next; their content does not.

    Returns:
        A uint8 tensor with the shape that the header gives.

    Raises:
        DataError: naming the file and the reason: it can't be read, the gzip stream is
            broken, the magic number is wrong, there are fewer or more bytes than the
            header promises, or the checksum differs.
    """
    path = Path(path)
    content = _read_content(path)
    shape, start = _parse_header(path, content)
    expected, found = math.prod(shape), len(content) - start
    data = f"{' x '.join(map(str, shape))} data"
    if found < expected:
        raise DataError(f"{path}: truncated: {found:,} of {expected:,} bytes of {data}")
    if found > expected:
        raise DataError(f"{path}: {found - expected:,} bytes too many after {data}")
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path}: checksum mismatch: not the published file (SHA-256 of content)")
    if expected == 0:  # frombuffer refuses an empty view
        return torch.empty(shape, dtype=torch.uint8)
    # A bytearray, since a tensor over read-only memory would be a trap.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _read_content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise DataError(f"{path}: truncated: the gzip stream ends early") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: broken gzip stream: {error}") from error


def _parse_header(path: Path, content: bytes) -> tuple[tuple[int, ...], int]:
    """Returns the shape and the offset of the first number."""
    if len(content) < 4:
        raise DataError(f"{path}: truncated: {len(content)} bytes, an IDX header has at least 4")
    zero, kind, dims = struct.unpack(">HBB", content[:4])
    if zero != 0 or dims == 0:
        raise DataError(f"{path}: not an IDX file: its magic number is 0x{content[:4].hex()}")
    if kind != _UNSIGNED_BYTE:
        raise DataError(f"{path}: IDX type 0x{kind:02x}; only 0x08, unsigned byte, is read here")
    start = 4 + 4 * dims
    if len(content) < start:
        raise DataError(f"{path}: truncated: {len(content)} bytes, its header alone has {start}")
    return struct.unpack(f">{dims}I", content[4:start]), start
