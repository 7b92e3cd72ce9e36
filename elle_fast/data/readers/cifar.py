"""CIFAR-10 and CIFAR-100 from the binary distribution: fixed-size records of label bytes and 3072 pixels.

Source of the format: https://www.cs.toronto.edu/~kriz/cifar.html. The python distribution is pickles, which run code
when loaded, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from elle_fast.data.memory import Dataset, Split
from elle_fast.data.readers.archives import Archive, Files, Folder, astray
from elle_fast.data.readers.decoding import existing, split_of
from elle_fast.data.readers.limits import memory

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


class _Format(NamedTuple):
    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    label_bytes: int  # the last of them is the label used
    n_classes: int


_BATCHES = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
_FORMATS = {
    "cifar10": _Format(
        "cifar-10-batches-bin", "cifar-10-binary.tar.gz", _BATCHES, "test_batch.bin", "batches.meta.txt", 1, 10
    ),
    "cifar100": _Format(
        "cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin", "fine_label_names.txt", 2, 100
    ),
}
# The files and folders of the python distribution.
_PICKLES = {"data_batch_1", "test_batch", "batches.meta", "cifar-10-batches-py", "train", "test", "meta"}
_PICKLES |= {"cifar-100-python"}


def read(name: str, root: Path) -> Dataset:
    """`name`: cifar10, or cifar100 with its 100 fine labels. Without their list of names, classes are numbers."""
    form = _FORMATS[name]
    existing(root, f"the folder {form.folder} or the archive {form.archive}")
    files, folder = _open(root, form)
    needed = (*form.train, form.test)
    missing = [file for file in needed if folder + file not in files.files]
    if missing:
        # The train/ and test/ of an image folder are named like two of the pickles.
        _refuse_pickles(root, [*files.files, *(files.folders - {"train", "test"})], form)
        raise FileNotFoundError(
            f"{root}: expected {', '.join(missing)} (from {form.archive}), got no such file{astray(files)}"
        )
    wanted = [folder + file for file in (*needed, form.names) if folder + file in files.files]
    content = {file.removeprefix(folder): data for file, data in files.read(wanted, memory() // 8)}  # copied twice

    train = _split({file: content[file] for file in form.train}, root, form)
    test = _split({form.test: content[form.test]}, root, form)
    return Dataset(name, train, test, _classes(content.get(form.names), root, form), augment=True)


def _open(root: Path, form: _Format) -> tuple[Files, str]:
    """The files, and the prefix of their names."""
    if root.is_dir():
        inner = root / form.folder
        return Folder(inner if inner.is_dir() else root, depth=1), ""
    _refuse_pickles(root, [root.name], form)
    archive = Archive(root)
    return archive, f"{form.folder}/" if form.folder in archive.folders else ""


def _refuse_pickles(root: Path, paths: Iterable[str], form: _Format) -> None:
    """Raise ValueError if one of `paths` is named like a file of the python distribution."""
    names = {PurePosixPath(path).name for path in paths}
    pickles = sorted(name for name in names if name in _PICKLES or name.endswith((".pkl", ".pickle")))
    if pickles:
        got = f"python pickles ({', '.join(pickles)}), which can run code and are never loaded"
        raise ValueError(f"{root}: expected the binary version, {form.archive}, got {got}")


def _split(content: dict[str, bytes], root: Path, form: _Format) -> Split:
    record = form.label_bytes + _PIXELS
    for file, data in content.items():
        if len(data) == 0 or len(data) % record:
            raise ValueError(f"{root}: {file}: expected a multiple of {record} bytes, at least one, got {len(data)}")
    records = np.frombuffer(b"".join(content.values()), np.uint8).reshape(-1, record)
    images = records[:, form.label_bytes :].reshape(-1, *_SHAPE)
    return split_of(images, records[:, form.label_bytes - 1], form.n_classes, f"{root}: {', '.join(content)}")


def _classes(listing: bytes | None, root: Path, form: _Format) -> tuple[str, ...]:
    if listing is None:
        return tuple(str(label) for label in range(form.n_classes))
    names = tuple(listing.decode("utf-8", errors="replace").split())
    if len(names) != form.n_classes:
        raise ValueError(f"{root}: {form.names}: expected {form.n_classes} class names, got {len(names)}")
    return names
