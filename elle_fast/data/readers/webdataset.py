"""Shards in webdataset's form: tars whose consecutive members with one key are a sample."""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elle_fast.data.readers.decoding import MOST_CLASSES, existing
from elle_fast.data.readers.pictures import EXTENSIONS
from elle_fast.data.readers.tar_index import Member, members
from elle_fast.data.sources import Names, Source, TarSource

_TEST = ("test", "val", "valid", "validation")
_CLASSES = "classes.txt"
_LABELS = (".cls", ".json")
_META = re.compile(r"(^|/)__[^/]*__($|/)")  # members that are about the shard
_MOST_LABEL = 1 << 20  # bytes of a .cls or .json


class _Shards(NamedTuple):
    """The samples of a split's shards; see :class:`TarSource`."""

    tars: list[Path]
    places: Any
    names: Names
    labels: Tensor


def sources(root: Path) -> tuple[Source, Source]:
    """The pictures of train-*.tar and of test-*.tar (or val-, valid-, validation-) in the folder ``root``.

    A member's key is its path up to the first dot of its name. A sample is a picture and its label, in [0, 2^20): .cls
    with the text of an integer, or .json with an integer under "label" or "cls". Other members are left alone.
    classes.txt has the names of the classes, one a line; without it they are the numbers up to the largest of the
    training.
    """
    existing(root, "a folder of train-*.tar and test-*.tar or val-*.tar")
    train = _shards(root, _tars(root, ("train",)))
    test = _shards(root, _tars(root, _TEST))
    classes = _classes(root, int(train.labels.max()))
    made = [TarSource(*shards, classes) for shards in (train, test)]
    return made[0], made[1]


def _tars(root: Path, splits: Sequence[str]) -> list[Path]:
    """The shards of the first of these splits that has any, in order."""
    for split in splits:
        found = sorted(path for path in root.glob(f"{split}-*.tar") if path.is_file())
        whole = root / f"{split}.tar"
        if found or whole.is_file():
            break
    else:
        forms = " or ".join(f"{split}-*.tar" for split in splits)
        raise FileNotFoundError(f"{root}: expected {forms}, got none")
    found = found or [whole]
    numbers = [re.search(r"-(\d+)\.tar$", path.name) for path in found]
    counted = [int(each[1]) for each in numbers if each is not None]
    if len(counted) == len(found):
        first, last = min(counted), max(counted)
        if absent := sorted(set(range(min(first, 1), last + 1)) - set(counted)):
            width, more = len(numbers[-1][1]) if numbers[-1] else 0, f" and {len(absent) - 1} more" * (len(absent) > 1)
            expected = f"expected shards numbered from {min(first, 1)} to {last}"
            raise FileNotFoundError(f"{root}: {expected}, got none called {split}-{absent[0]:0{width}}.tar{more}")
    return found


def _shards(root: Path, tars: list[Path]) -> _Shards:
    places, names, labels = array("q"), list[str](), array("q")  # arrays, as there may be millions
    for number, tar in enumerate(tars):
        before = len(labels)
        file = os.open(tar, os.O_RDONLY)
        try:
            for key, picture, label in _samples(tar):
                places.extend((number, picture.offset, picture.size))
                names.append(picture.name)
                labels.append(_label(tar, key, label, os.pread(file, label.size, label.offset)))
        finally:
            os.close(file)
        if len(labels) == before:
            raise ValueError(f"{tar}: expected samples of a picture and a label, got none")
    table = np.ascontiguousarray(np.frombuffer(places, dtype=np.int64).reshape(-1, 3).T)
    return _Shards(tars, table, Names(names), torch.from_numpy(np.array(labels, dtype=np.int64)))


def _samples(tar: Path) -> Iterator[tuple[str, Member, Member]]:
    """Key, picture and label of each sample."""
    key: str | None = None
    found: dict[str, Member] = {}
    for member in members(tar):
        if _META.search(member.name):
            continue
        folder, _, base = member.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not dot or not stem:
            continue
        own = f"{folder}/{stem}" if folder else stem
        if own != key:
            if found:
                yield _sample(tar, str(key), found)
            key, found = own, {}
        kind = f".{kind.lower()}"
        kind = "picture" if kind in EXTENSIONS else kind
        if kind in ("picture", *_LABELS):
            if kind in found:
                raise ValueError(f"{tar}: expected one {kind} for {key}, got {found[kind].name} and {member.name}")
            found[kind] = member
    if found:
        yield _sample(tar, str(key), found)


def _sample(tar: Path, key: str, found: dict[str, Member]) -> tuple[str, Member, Member]:
    label = next((found[kind] for kind in _LABELS if kind in found), None)
    if label is None or "picture" not in found:
        got = ", ".join(member.name for member in found.values())
        raise ValueError(f"{tar}: expected a picture and its .cls or .json for {key}, got {got}")
    if label.size > _MOST_LABEL:
        raise ValueError(f"{tar}: {label.name}: expected a label of at most {_MOST_LABEL} bytes, got {label.size}")
    return key, found["picture"], label


def _label(tar: Path, key: str, member: Member, content: bytes) -> int:
    value = None
    try:
        if member.name.endswith("json"):
            given = json.loads(content)
            value = given.get("label", given.get("cls")) if isinstance(given, dict) else None
        else:
            value = int(content)
    except (ValueError, RecursionError):
        pass
    if type(value) is int:
        if 0 <= value < MOST_CLASSES:
            return value
        raise ValueError(f"{tar}: {member.name}: expected a label in [0, {MOST_CLASSES}), got {content[:40]!r}")
    form = 'an integer under "label" or "cls"' if member.name.endswith("json") else "the text of an integer"
    raise ValueError(f"{tar}: {member.name}: expected {form}, got {content[:40]!r}")


def _classes(root: Path, largest: int) -> list[str]:
    file = root / _CLASSES
    if not file.is_file():
        return [str(label) for label in range(largest + 1)]
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected class names in UTF-8, one a line: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{file}: expected different class names, one a line, got an empty line or one twice")
    return names
