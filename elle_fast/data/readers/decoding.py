"""Checks that the readers share. Each error names the file, what was expected and what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elle_fast.data.memory import Split
from elle_fast.data.readers.limits import TooLargeError

# Labels are below: as many names of classes are made of unnamed ones.
MOST_CLASSES = 1 << 20
_ADDRESS = re.compile(r" <[^<>]* object at 0x[0-9a-fA-F]+>")
DIGITS = tuple(map(str, range(10)))  # the classes of every data set of digits


def optional(module: str, extra: str = "recipes") -> ModuleType:
    """A module of an extra; ImportError says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'elle-fast[{extra}]'") from error


def existing(path: Path, what: str) -> Path:
    """`path` itself, a file or a folder; FileNotFoundError says `what` was expected if nothing is there.

    ValueError for anything else: reading a FIFO or a device may never end.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected {what}, got nothing there")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: expected {what}, got neither a file nor a folder")
    return path


@contextmanager
def decoding(file: Path | str) -> Iterator[None]:
    """Turn what a decoder raises on a broken file into a ValueError that names the file.

    Decoders of archives and images raise a dozen unrelated types, which change between versions. So this lists the
    types that are not about the content.
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError, PermissionError, TooLargeError):
        raise
    except Exception as error:
        raise ValueError(f"{file}: truncated, corrupt or in another format: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """A library's message in one line, without the address of an object in memory."""
    return _ADDRESS.sub("", " ".join(str(error).split()))  # tarfile's has a line for each compression


def split_of(images: NDArray[Any], labels: NDArray[Any], n_classes: int, source: Path | str) -> Split:
    """A split that owns its memory, from images uint8 [N, C, H, W] and integer labels [N] in [0, n_classes).

    Raises ValueError, naming `source`, for arrays of another form.
    """
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{source}: labels: expected integers, got {labels.dtype}")
    try:
        # A copy, because the array may be a read-only view of a file's bytes.
        split = Split(torch.from_numpy(np.array(images, order="C")), torch.from_numpy(labels.astype(np.int64)))
    except (TypeError, ValueError) as error:  # TypeError: a dtype that torch does not have
        raise ValueError(f"{source}: {error}") from error
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{source}: labels: expected integers in [0, {n_classes}), got {low} .. {high}")
    return split
