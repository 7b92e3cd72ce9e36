"""Parquet as the `datasets` library writes it: encoded pictures and labels in columns, in a local folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elle_fast._core.digests import digest_of
from elle_fast.data.readers.decoding import MOST_CLASSES, decoding, existing, optional, reason_of
from elle_fast.data.sources import Source

_TEST = ("test", "validation", "valid", "val")
_PICTURES = ("image", "img")
_LABELS = ("label", "labels", "fine_label")


class ParquetSource(Source):
    """The rows of a split's files, through the memory-mapped copy that `datasets` makes of them."""

    def __init__(self, root: Path, files: Sequence[Path], classes: Sequence[str], columns: tuple[str, str]) -> None:
        self._files, self._picture = tuple(files), columns[0]
        reader = optional("pyarrow.parquet", "streaming")
        counts = []
        for file in files:
            with decoding(file):
                counts.append(reader.read_metadata(file).num_rows)
        self._ends = np.cumsum(counts)
        library = optional("datasets", "streaming")
        with _naming_the_broken(root, files, reader, columns):
            self._rows: Any = library.Dataset.from_parquet([str(file) for file in files], columns=list(columns))
            labels = torch.from_numpy(self._rows.data.column(columns[1]).to_numpy().astype(np.int64))
        super().__init__(str(root), labels, classes)

    def name(self, index: int) -> str:
        """The file, and the row there from 0."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[file - 1]) if file else 0)
        return f"{self._files[file]}: row {row}"

    def read(self, index: int) -> bytes:
        """The bytes of the row's picture."""
        found = self._rows.data.column(self._picture)[index]
        data = (found["bytes"] if hasattr(found, "keys") else found).as_py()
        if not isinstance(data, bytes):
            raise ValueError("expected the picture's bytes in the row, got none")
        return data

    def digest(self) -> str:
        """Of the files' names and sizes, and the labels."""
        files = "\0".join(f"{file.name} {file.stat().st_size}" for file in self._files)
        return digest_of(os.fsencode(files), self.labels)


def sources(root: Path) -> tuple[Source, Source]:
    """The pictures of train-*.parquet and of test-*.parquet (or validation-), in ``root`` or its folder data/.

    The column of pictures is ``image`` or ``img``, that of labels ``label``, ``labels`` or ``fine_label``. The classes
    are named in the file; without names they are the numbers up to the largest of the training, which is
    below 2^20. A test split without
    labels is passed over. `datasets` copies the files, once, to its cache (HF_DATASETS_CACHE, by default
    ~/.cache/huggingface/datasets), where they are mapped into memory; nothing is written to ``root``.
    """
    existing(root, "a folder of train-*.parquet and test-*.parquet or validation-*.parquet")
    reader = optional("pyarrow.parquet", "streaming")
    train = _files(root, "train")
    if not train:
        raise FileNotFoundError(f"{root}: expected train-*.parquet, there or in data/, got none")
    columns, classes = _columns(reader, train[0])
    unlabelled: list[str] = []
    for split in _TEST:
        if not (files := _files(root, split)):
            continue
        if _labels(reader, files, columns[1]).max() >= 0:
            break
        unlabelled.append(f"{split} without labels")
    else:
        expected = " or ".join(f"{split}-*.parquet" for split in _TEST)
        raise FileNotFoundError(f"{root}: expected {expected}, with labels, got {', '.join(unlabelled) or 'none'}")
    for file in (*train, *files):
        if (found := _columns(reader, file)) != (columns, classes):
            raise ValueError(f"{file}: expected columns and classes as in {train[0].name}, got others: {found[0]}")
    classes = classes or [str(label) for label in range(int(_labels(reader, train, columns[1]).max()) + 1)]
    made = [ParquetSource(root, each, classes, columns) for each in (train, files)]
    return made[0], made[1]


@contextmanager
def _naming_the_broken(root: Path, files: Sequence[Path], reader: ModuleType, columns: Sequence[str]) -> Iterator[None]:
    """If `datasets` fails, which names no file: read the files one by one, and raise ValueError for the broken one.

    If all can be read, OSError or ValueError with what was the cause, such as a full disk.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        for file in files:
            with decoding(f"{file} ({file.stat().st_size} bytes)"), reader.ParquetFile(file) as opened:
                for _ in opened.iter_batches(batch_size=256, columns=list(columns)):
                    pass
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        kind = OSError if isinstance(cause, OSError) else ValueError
        among = files[0].name + f" and {len(files) - 1} more" * (len(files) > 1)
        raise kind(f"{root}: datasets cannot read {among}: {reason_of(cause)}") from error


def _files(root: Path, split: str) -> list[Path]:
    for folder in (root, root / "data"):
        if found := sorted(folder.glob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet")):
            return found
    return []


def _columns(reader: ModuleType, file: Path) -> tuple[tuple[str, str], list[str]]:
    """The names of the columns of pictures and of labels, and those of the classes."""
    library = optional("datasets", "streaming")
    with decoding(f"{file} ({file.stat().st_size} bytes)"):
        features = library.Features.from_arrow_schema(reader.read_schema(file))
    found = []
    for what, names in (("pictures", _PICTURES), ("labels", _LABELS)):
        name = next((name for name in names if name in features), None)
        if name is None:
            expected = f"expected a column of {what} called {' or '.join(names)}"
            raise ValueError(f"{file}: {expected}, got {', '.join(features)}")
        found.append(name)
    return (found[0], found[1]), list(getattr(features[found[1]], "names", None) or [])


def _labels(reader: ModuleType, files: Sequence[Path], column: str) -> NDArray[np.int64]:
    """The labels of all files, at least one; ValueError, naming the file, if they are no integers."""
    found = []
    for file in files:
        with decoding(f"{file} ({file.stat().st_size} bytes)"):
            labels = reader.read_table(file, columns=[column])[column].to_numpy()
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{file}: expected integers as {column}, got {labels.dtype}")
        if len(labels) and labels.max() >= MOST_CLASSES:
            raise ValueError(f"{file}: expected {column} below {MOST_CLASSES}, got {labels.max()}")
        found.append(labels)
    if not sum(map(len, found)):
        raise ValueError(f"{files[0]}: expected rows, got none")
    return np.concatenate(found).astype(np.int64)
