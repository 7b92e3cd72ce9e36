"""Data sets of torchvision that are on disk already: it finds files and labels, and this package reads the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elle_fast._core import checks
from elle_fast.data.readers.decoding import existing, optional
from elle_fast.data.sources import FileSource, Source

_PREFIX = "torchvision:"


class _Known(NamedTuple):
    """The names of the splits for training and test, and of the attributes with files and labels."""

    train: str
    test: str
    files: str
    labels: str = "_labels"


# Those that list picture files, have two splits, and read neither pickles nor archives. `_samples` has (file, label).
_KNOWN = {
    "Country211": _Known("train", "test", "samples", ""),
    "DTD": _Known("train", "test", "_image_files"),
    "FGVCAircraft": _Known("trainval", "test", "_image_files"),
    "Flowers102": _Known("train", "test", "_image_files"),
    "Food101": _Known("train", "test", "_image_files"),
    "GTSRB": _Known("train", "test", "_samples", ""),
    "Imagenette": _Known("train", "val", "_samples", ""),
    "OxfordIIITPet": _Known("trainval", "test", "_images"),
    "RenderedSST2": _Known("train", "test", "_samples", ""),
}
NAMES = tuple(_KNOWN)
_INSTEAD = {
    "CIFAR10": "its files are pickles; take the binary version, --data cifar10",
    "CIFAR100": "its files are pickles; take the binary version, --data cifar100",
    "ImageNet": "it keeps its class names in a pickle; take --data image-folder with the folder of train/ and val/",
    "SVHN": "take --data svhn",
    "ImageFolder": "take --data image-folder",
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), "take --data mnist with the folder raw/ of its idx files"),
}


def check_name(argument: str, name: str) -> None:
    """Raise ValueError, naming the argument, unless ``torchvision:NAME`` is known."""
    own = name.removeprefix(_PREFIX)
    if own in _KNOWN:
        return
    hint = f": {_INSTEAD[own]}" if own in _INSTEAD else ""
    raise ValueError(f"{argument}: expected torchvision: and one of {', '.join(NAMES)}, got {checks.shown(name)}{hint}")


def sources(name: str, root: Path) -> tuple[Source, Source]:
    """The pictures of both splits; nothing is downloaded."""
    existing(root, f"the folder that torchvision's {name.removeprefix(_PREFIX)} is in")
    module = optional("torchvision.datasets", "streaming")
    known, make = _KNOWN[name.removeprefix(_PREFIX)], getattr(module, name.removeprefix(_PREFIX))
    splits = [_made(make, known, root, split) for split in (known.train, known.test)]
    return _source(splits[0], known, root), _source(splits[1], known, root)


def _made(make: Any, known: _Known, root: Path, split: str) -> Any:
    try:
        return make(root, split=split, download=False)
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: not found or damaged
        raise FileNotFoundError(f"{root}: expected the files of torchvision's {make.__name__}: {error}") from error


def _source(split: Any, known: _Known, root: Path) -> Source:
    found = getattr(split, known.files)
    files, labels = list(zip(*found, strict=True)) if not known.labels else (found, getattr(split, known.labels))
    names = [str(Path(file).relative_to(root)) for file in files]
    return FileSource(root, names, list(labels), _classes(split, labels))


def _classes(split: Any, labels: Sequence[int]) -> list[str]:
    named = getattr(split, "classes", None)
    if named is None:
        return [str(label) for label in range(max(labels) + 1)]
    return [each if isinstance(each, str) else ", ".join(each) for each in named]  # of Imagenette, several names
