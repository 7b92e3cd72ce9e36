"""The checks the readers share. Every error names the file, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elle_fast.data.dataset import Split


def optional(module: str) -> ModuleType:
    """A module of the `recipes` extra; ImportError says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is missing: pip install 'elle-fast[recipes]'") from error


def existing(path: Path, what: str) -> Path:
    """`path` itself; FileNotFoundError says `what` was looked for if nothing is there."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (looked for {what})")
    return path


@contextmanager
def decoding(file: Path | str) -> Iterator[None]:
    """Turns what a decoder raises on a broken file into a ValueError that names the file.

    Decoders of archives and images raise a dozen unrelated types, which change between versions; so the types that are
    not about the content are listed instead.
    """
    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{file} is truncated, corrupt or of another format: {error}") from error


def split_of(images: NDArray[Any], labels: NDArray[Any], n_classes: int, source: Path | str) -> Split:
    """A split that owns its memory, from images uint8 [N, C, H, W] and integer labels [N] in [0, n_classes).

    Raises ValueError, naming `source`, if the arrays are not of that form.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{source}: expected uint8 images [N, C, H, W], got {images.dtype} {list(images.shape)}")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(f"{source}: expected integer labels [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise ValueError(f"{source}: expected one label per image, got {len(images)} images, {len(labels)} labels")
    if len(images) == 0:
        raise ValueError(f"{source}: expected at least one image, got none")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= n_classes:
        raise ValueError(f"{source}: expected labels in [0, {n_classes}), got {low} .. {high}")
    # A copy, because the array may be a read-only view of a file's bytes.
    return Split(torch.from_numpy(np.array(images, order="C")), torch.from_numpy(labels.astype(np.int64)))
