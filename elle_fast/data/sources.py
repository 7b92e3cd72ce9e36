"""Where the pictures of a stream are: by index, their encoded bytes, label and name; in memory only an index of them.

The index is a few arrays, not a Python object for each sample: worker processes share its pages with the process that
forked them, as long as nobody writes there, and a count of references would.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elle_fast._core.digests import digest_of
from elle_fast.data.readers.limits import LARGEST_FILE, at_most

_OPEN_FILES = 64


class Names:
    """Strings as one run of bytes; names of files need not be UTF-8."""

    def __init__(self, names: Iterable[str]) -> None:
        text, ends, end = bytearray(), [], 0
        for name in names:
            encoded = os.fsencode(name)
            text += encoded
            end += len(encoded)
            ends.append(end)
        self._text, self._ends = bytes(text), np.array([0, *ends], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]])

    def digest(self) -> str:
        """A fingerprint of all, in order."""
        return digest_of(self._text, torch.from_numpy(self._ends))


class Source(ABC):
    """Pictures with labels, by their places 0 .. N-1; N >= 1.

    Attributes:
        labels: int64 [N] on the CPU, in [0, len(classes)).
        classes: their names.
        where: the folder or file they are from, for messages.

    Raises:
        ValueError: for no samples, or a label out of range; it names ``where``.
    """

    def __init__(self, where: str, labels: Tensor, classes: Sequence[str]) -> None:
        self.where, self.labels, self.classes = where, labels, tuple(classes)
        if len(labels) == 0:
            raise ValueError(f"{where}: expected pictures, got none")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            worst = int((labels == (low if low < 0 else high)).nonzero()[0])
            got = f"got {int(labels[worst])} of {self.name(worst)}"
            raise ValueError(f"{where}: expected labels in [0, {len(self.classes)}), {got}")

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What a message calls a picture."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """A picture as its file has it; OSError or ValueError if it cannot be read."""

    @abstractmethod
    def digest(self) -> str:
        """A fingerprint of the names, sizes and labels of the files, not of what is in them."""


class FileSource(Source):
    """A file for each picture, ``names`` below the folder ``root``."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], classes: Sequence[str]) -> None:
        self._root, self._names = root, Names(names)
        super().__init__(str(root), torch.tensor(labels, dtype=torch.int64, device="cpu"), classes)

    def name(self, index: int) -> str:
        """The path below ``root``."""
        return f"{self._root}: {self._names[index]}"

    def read(self, index: int) -> bytes:
        """All of the file."""
        path = os.path.join(self._root, self._names[index])  # noqa: PTH118  # a tenth of the time of a Path
        with open(path, "rb") as file:  # noqa: PTH123
            at_most(self.name(index), os.fstat(file.fileno()).st_size, LARGEST_FILE)
            return file.read()

    def digest(self) -> str:
        """Of names, sizes and labels."""
        root, names = f"{self._root}/", self._names
        sizes = np.fromiter((os.stat(root + names[k]).st_size for k in range(len(names))), np.int64, len(names))  # noqa: PTH116
        return digest_of(names.digest().encode(), torch.from_numpy(sizes), self.labels)


class TarSource(Source):
    """Members of uncompressed tars, read in any order.

    ``places`` int64 [3, N]: which of ``tars``, the member's first byte there, and its size.
    """

    def __init__(
        self, tars: Sequence[Path], places: NDArray[np.int64], names: Names, labels: Tensor, classes: Sequence[str]
    ) -> None:
        self._tars, self._places, self._names = tuple(tars), places, names
        self._open: OrderedDict[int, int] = OrderedDict()  # by number of the tar; shared with forked processes
        where = tars[0] if len(tars) == 1 else tars[0].parent
        super().__init__(str(where), labels, classes)

    def name(self, index: int) -> str:
        """The tar and the member's name there."""
        return f"{self._tars[self._places[0, index]]}: {self._names[index]}"

    def read(self, index: int) -> bytes:
        """All of the member; no place is kept in the file, so that processes may share it."""
        tar, offset, size = self._places[:, index].tolist()
        at_most(self.name(index), size, LARGEST_FILE)
        file = self._opened(tar)
        data, rest = b"", size
        while rest and (more := os.pread(file, rest, offset + size - rest)):
            data, rest = data + more, rest - len(more)
        if rest:
            raise ValueError(f"expected {size} bytes at byte {offset}, got {size - rest}: the tar is cut off")
        return data

    def _opened(self, tar: int) -> int:
        if tar not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(self._tars[tar], os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._open.move_to_end(tar)
        return self._open[tar]

    def __del__(self) -> None:
        for file in self.__dict__.get("_open", {}).values():
            os.close(file)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def digest(self) -> str:
        """Of the tars' names and sizes, the members' names, places and sizes, and the labels."""
        tars = "\0".join(f"{tar.name} {tar.stat().st_size}" for tar in self._tars)
        return digest_of(os.fsencode(tars), self._names.digest().encode(), torch.from_numpy(self._places), self.labels)
