"""SVHN, cropped digits: two MATLAB 5 files. Source of the format: http://ufldl.stanford.edu/housenumbers/."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from elle_fast.data.memory import Dataset, Split
from elle_fast.data.readers.decoding import DIGITS, decoding, existing, optional, split_of


def read(name: str, root: Path) -> Dataset:
    """`root` holds train_32x32.mat and test_32x32.mat."""
    files = [existing(root / f"{part}_32x32.mat", "SVHN's cropped digits") for part in ("train", "test")]
    train, test = (_split(file) for file in files)
    return Dataset(name, train, test, DIGITS, augment=False)


def _split(file: Path) -> Split:
    """The file's X is uint8 [32, 32, 3, N], its y [N, 1] in 1..10 with 10 for the digit 0."""
    scipy_io = optional("scipy.io")
    with decoding(f"{file} ({file.stat().st_size} bytes)"):
        content = scipy_io.loadmat(file, variable_names=("X", "y"))
    absent = [name for name in ("X", "y") if name not in content]
    if absent:
        raise ValueError(f"{file}: expected the variables X and y, got no {' and no '.join(absent)}")
    pixels, digits = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
    if pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(f"{file}: expected X of [32, 32, 3, N], got {list(pixels.shape)}")
    if digits.dtype.kind not in "iu":
        raise ValueError(f"{file}: expected integers in y, got {digits.dtype}")
    if digits.size and not (digits.min() >= 1 and digits.max() <= 10):
        raise ValueError(f"{file}: expected labels in 1 .. 10, got {digits.min()} .. {digits.max()}")
    return split_of(pixels.transpose(3, 2, 0, 1), digits % 10, len(DIGITS), file)
