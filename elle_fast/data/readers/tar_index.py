"""The members of an uncompressed tar by its headers alone: their names, first bytes and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from elle_fast.data.readers.decoding import decoding
from elle_fast.data.readers.limits import TooLargeError

_BLOCK = 512
_FILE = (b"0", b"\0", b"7")
_FOLDER, _LONG_NAME, _PAX, _PAX_OF_ALL = b"5", b"L", b"x", b"g"
_MOST_EXTRA = 1 << 20  # bytes of a long name, or of a member's pax fields
_SPACES = 8 * 32  # the field of the checksum counts as such
_GZIP = b"\x1f\x8b"


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in its order (ustar, pax or GNU); folders are left out.

    Raises:
        ValueError: naming the tar, if it is compressed, empty, damaged or cut off, or holds links or sparse files.
        OSError: if it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        end = os.fstat(file).st_size
        if end == 0:
            raise ValueError(f"{path}: expected a tar, got an empty file")
        with decoding(path):
            yield from _walk(file, end)
    finally:
        os.close(file)


def _walk(file: int, end: int) -> Iterator[Member]:
    place, name, size = 0, "", -1  # of the next member, if a header before it says so
    while True:
        header = os.pread(file, _BLOCK, place)
        if len(header) < _BLOCK:
            expected = f"expected an end-of-archive block of {_BLOCK} zero bytes at byte {place}"
            raise ValueError(f"{expected}, got {len(header)} bytes: the tar is cut off")
        if not header.strip(b"\0"):
            return
        if header.startswith(_GZIP):
            raise ValueError("expected an uncompressed tar, to be read in any order, got a compressed one")
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + _SPACES:
            raise ValueError(f"expected a header at byte {place}, got one with another checksum")
        kind, own = header[156:157], _number(header[124:136])
        data, place = place + _BLOCK, place + _BLOCK
        if kind in (_LONG_NAME, _PAX):
            if own > _MOST_EXTRA:
                raise TooLargeError(f"expected a name of at most {_MOST_EXTRA} bytes, got {own} at byte {data}")
            extra = os.pread(file, own, data)
            if kind == _PAX:
                name, size = _pax(extra, name, size)
            else:
                name = os.fsdecode(extra.rstrip(b"\0"))
        else:
            named, length = name or _name(header), own if size < 0 else size
            own, name, size = length, "", -1
            if data + length > end:
                raise ValueError(
                    f"{named}: expected {length} bytes from byte {data}, got {max(0, end - data)}: cut off"
                )
            if kind in _FILE:
                yield Member(named, data, length)
            elif kind not in (_FOLDER, _PAX_OF_ALL):
                raise ValueError(f"{named}: expected regular files alone, got a member of type {kind!r}")
        place += -(-own // _BLOCK) * _BLOCK


def _number(field: bytes) -> int:
    """Octal, or of GNU in base 256 with the first bit set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _pax(extra: bytes, name: str, size: int) -> tuple[str, int]:
    """Name and size in pax fields, each of the form ``LENGTH KEY=VALUE`` and a line break."""
    while extra.strip(b"\0"):
        length = int(extra.split(b" ", 1)[0])
        key, _, value = extra[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if length < 1:
            raise ValueError("expected pax fields with a length, got 0")
        extra = extra[length:]
        if key == b"path":
            name = os.fsdecode(value)
        elif key == b"size":
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ValueError(f"{name}: expected files that are there as a whole, got a sparse one")
    return name, size
