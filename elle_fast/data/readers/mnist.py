"""MNIST from its idx files, plain or gzipped, or from an .npz. Source: http://yann.lecun.com/exdb/mnist/."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elle_fast.data.memory import Dataset, Split
from elle_fast.data.readers.decoding import DIGITS, decoding, existing, split_of

# An idx magic is 2048 (unsigned bytes) plus the number of dimensions.
_UNSIGNED_BYTES = 2048


def read(name: str, root: Path) -> Dataset:
    """`root` is a folder of idx files with their standard names, plain or with .gz, or an .npz."""
    existing(root, "a folder of MNIST's idx files, or an .npz")
    if root.is_dir():
        train, test = _idx_split(root, "train"), _idx_split(root, "t10k")
    elif root.suffix == ".npz":
        train, test = _npz_splits(root)
    else:
        raise ValueError(f"{root}: expected a folder of idx files, or an .npz")
    return Dataset(name, train, test, DIGITS, augment=False)


def _idx_split(root: Path, part: str) -> Split:
    files = [_plain_or_gz(root / f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")]
    images, labels = (_idx(file, ndim) for file, ndim in zip(files, (3, 1), strict=True))
    return split_of(images[:, None], labels, len(DIGITS), files[0])


def _plain_or_gz(file: Path) -> Path:
    zipped = file.with_name(f"{file.name}.gz")
    return file if file.exists() else existing(zipped, f"{file.name} or {zipped.name}")


def _idx(file: Path, ndim: int) -> NDArray[np.uint8]:
    """One array of unsigned bytes: a big-endian magic, `ndim` sizes of 32 bits, and the elements."""
    data = file.read_bytes()
    if file.suffix == ".gz":
        with decoding(f"{file} ({len(data)} bytes)"):
            data = gzip.decompress(data)
    header = 4 * (1 + ndim)
    if len(data) < header:
        raise ValueError(f"{file}: expected a header of {header} bytes, got {len(data)} bytes in all")
    magic, *shape = struct.unpack(f">{1 + ndim}I", data[:header])
    if magic != _UNSIGNED_BYTES + ndim:
        raise ValueError(f"{file}: expected the magic number {_UNSIGNED_BYTES + ndim}, got {magic}")
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{file}: expected {expected} bytes for the sizes {shape} of its header, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _npz_splits(file: Path) -> tuple[Split, Split]:
    """The arrays x_train, y_train, x_test, y_test; object arrays, which are pickles, are refused."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    arrays: dict[str, NDArray[Any]] = {}
    with decoding(f"{file} ({file.stat().st_size} bytes)"), file.open("rb") as stream:
        content = np.load(stream, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("expected an archive of arrays, got a single array")
        with content:
            absent = [key for key in keys if key not in content]
            if absent:
                raise ValueError(f"expected the arrays {', '.join(keys)}, got no {', '.join(absent)}")
            arrays = {key: content[key] for key in keys}
    for key in ("x_train", "x_test"):
        if arrays[key].ndim != 3:
            raise ValueError(f"{file}: expected {key} of [N, H, W], got {list(arrays[key].shape)}")
    train, test = (
        split_of(arrays[f"x_{part}"][:, None], arrays[f"y_{part}"], len(DIGITS), f"{file} ({part})")
        for part in ("train", "test")
    )
    return train, test
