"""Bounds for files that claim, or unpack to, more than a machine holds: each is an error before the memory is taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

# Of one encoded picture, or of anything that an archive has read at once.
LARGEST_FILE = 1 << 30
# gzip packs no tighter than this; bzip2 and xz do, and a tar of theirs may unpack to so many times its size at most.
RATIO = 1032
_UNPACKED = 1 << 30  # and any tar to this much


class TooLargeError(ValueError):
    """What a file claims to hold, or unpacks to, is beyond a bound."""


def memory() -> int:
    """Bytes of memory that this machine, or this container, has; 2**63 where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 1 << 63
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total


def fits_memory(what: str, size: int) -> None:
    """Raise ValueError if `size` bytes for `what` are more than there is memory."""
    if size > (most := memory()):
        got = f"got {_gib(size)} when decoded"
        raise TooLargeError(f"{what}: expected at most {_gib(most)}, this machine's memory, {got}")


def at_most(what: str, size: int, most: int) -> None:
    """Raise ValueError if a file of `size` bytes is larger than `most`."""
    if size > most:
        raise TooLargeError(f"{what}: expected a file of at most {_gib(most)}, got {_gib(size)}")


def unpacked(size: int) -> int:
    """The most bytes that a compressed file of `size` bytes may unpack to."""
    return max(_UNPACKED, RATIO * size)


class Bounded:
    """A readable, seekable file: no place beyond `most` is read or sought, and no more than LARGEST_FILE at once."""

    def __init__(self, file: IO[bytes], most: float, what: str) -> None:
        self._file, self._most, self._what = file, most, what

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        if size > LARGEST_FILE:  # as many bytes would be allocated, whatever the file holds
            got = f"got a header that claims {_gib(size)}"
            raise TooLargeError(f"{self._what}: expected at most {_gib(LARGEST_FILE)} in one piece, {got}")
        self._check(self._file.tell())
        return self._file.read(size)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """As of a file."""
        if whence == os.SEEK_SET:
            self._check(place)
        return self._file.seek(place, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()

    def _check(self, place: int) -> None:
        if place > self._most:
            expected = f"expected to unpack to at most {_gib(self._most)}, {RATIO} times its size"
            raise TooLargeError(f"{self._what}: {expected}, got more")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"
