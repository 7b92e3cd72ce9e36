"""MNIST from its idx files, plain or gzipped, or from an .npz. Source: http://yann.lecun.com/exdb/mnist/."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from elle_fast.data.memory import Dataset, Split
from elle_fast.data.readers.decoding import DIGITS, decoding, existing, split_of
from elle_fast.data.readers.limits import RATIO, fits_memory

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
    return existing(file if file.exists() else zipped, f"{file.name} or {zipped.name}")


def _idx(file: Path, ndim: int) -> NDArray[np.uint8]:
    """One array of unsigned bytes: a big-endian magic, `ndim` sizes of 32 bits, and the elements."""
    size, header = file.stat().st_size, 4 * (1 + ndim)
    opener: Any = gzip.open if file.suffix == ".gz" else Path.open
    with opener(file, "rb") as stream:
        read = partial(_read, stream, f"{file} ({size} bytes)")
        start = read(header)
        if len(start) < header:
            raise ValueError(f"{file}: expected a header of {header} bytes, got {len(start)} bytes in all")
        magic, *shape = struct.unpack(f">{1 + ndim}I", start)
        if magic != _UNSIGNED_BYTES + ndim:
            raise ValueError(f"{file}: expected the magic number {_UNSIGNED_BYTES + ndim}, got {magic}")
        expected, most = math.prod(shape), size * RATIO if file.suffix == ".gz" else size
        fits_memory(str(file), min(expected, most))
        data = read(min(expected, most) + 1)  # one more than there should be: then there is too much
    if len(data) != expected:
        got = f"got {header + len(data)}{' or more' * (len(data) > expected)}"
        raise ValueError(f"{file}: expected {header + expected} bytes for the sizes {shape} of its header, {got}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read(stream: IO[bytes], what: str, size: int) -> bytes:
    with decoding(what):
        return stream.read(size)


def _npz_splits(file: Path) -> tuple[Split, Split]:
    """The arrays x_train, y_train, x_test, y_test; object arrays, which are pickles, are refused."""
    keys = ("x_train", "y_train", "x_test", "y_test")
    with decoding(f"{file} ({file.stat().st_size} bytes)"), file.open("rb") as stream:
        if stream.read(6) == np.lib.format.MAGIC_PREFIX:
            raise ValueError("expected an archive of arrays, got a single array")
        with zipfile.ZipFile(stream) as content:
            absent = [key for key in keys if f"{key}.npy" not in content.namelist()]
            if absent:
                raise ValueError(f"expected the arrays {', '.join(keys)}, got no {', '.join(absent)}")
            arrays = {key: _npy(content, f"{key}.npy") for key in keys}
    for key in ("x_train", "x_test"):
        if arrays[key].ndim != 3:
            raise ValueError(f"{file}: expected {key} of [N, H, W], got {list(arrays[key].shape)}")
    train, test = (
        split_of(arrays[f"x_{part}"][:, None], arrays[f"y_{part}"], len(DIGITS), f"{file} ({part})")
        for part in ("train", "test")
    )
    return train, test


def _npy(content: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an .npz, whose size must be what its header says before any memory is taken for it."""
    size = content.getinfo(name).file_size
    fits_memory(name, size)
    with content.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = header[version](stream)
        expected = stream.tell() + math.prod(shape) * dtype.itemsize
        if size != expected and not dtype.hasobject:  # objects are refused below
            raise ValueError(f"{name}: expected {expected} bytes for the sizes {list(shape)} of its header, got {size}")
        stream.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array
