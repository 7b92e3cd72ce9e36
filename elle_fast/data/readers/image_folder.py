"""Image files laid out as train/<class>/* and test/<class>/*, in a folder or in a tar."""

from __future__ import annotations

import unicodedata
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast.data.memory import Dataset, Split, choose
from elle_fast.data.readers.archives import DEEPER, HIDDEN, Archive, Files, Folder, astray, described
from elle_fast.data.readers.decoding import decoding, existing, optional
from elle_fast.data.readers.limits import fits_memory
from elle_fast.data.readers.pictures import EXTENSIONS, decode
from elle_fast.data.sources import FileSource, Names, Source, TarSource

_TEST_FOLDERS = ("test", "val", "valid")
_DEPTH = 4  # top folder / split / class / file


@dataclass(frozen=True)
class Listed:
    """The pictures of a folder or tar: names and labels, in the order of (class, file name)."""

    root: Path
    files: Files
    classes: tuple[str, ...]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]

    def keeping(self, listing: Path) -> Listed:
        """With the test pictures that a file names, in its order.

        Raises:
            OSError: if the file cannot be read.
            ValueError: naming the line, for a picture that is not there, that two places have, or that is named twice.
        """
        there: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for name, label in self.test:
            there[name.rpartition("/")[2]].append((name, label))
        kept: dict[str, int] = {}
        for number, line in enumerate(listing.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
            if not line.strip():
                continue
            asked = line.split()[0]
            # Of a path, the class and the file name: what is before may be another place.
            *_, file = place = asked.split("/")[-2:]
            found = [each for each in there[file] if f"/{each[0]}".endswith("/" + "/".join(place))]
            got = f"got {asked!r} in line {number} of {listing}"
            if len(found) != 1:
                raise ValueError(f"test_list: expected the name of one test picture of {self.root}, {got}")
            if found[0][0] in kept:
                raise ValueError(f"test_list: expected each picture once, {got}")
            kept.update(found)
        if not kept:
            raise ValueError(f"test_list: expected names of test pictures, got none in {listing}")
        return replace(self, test=list(kept.items()))

    def in_one_order(self) -> str | None:
        """Why the pictures can be read in the order of a tar only, if so."""
        if isinstance(self.files, Folder):
            return None
        return self.files.in_one_order(name for name, _ in (*self.train, *self.test))

    def sources(self) -> tuple[Source, Source]:
        """The pictures of both splits; ValueError unless they can be read in any order."""
        if (why := self.in_one_order()) is not None:
            raise ValueError(why)
        return self._source(self.train), self._source(self.test)

    def _source(self, samples: list[tuple[str, int]]) -> Source:
        names, labels = [name for name, _ in samples], [label for _, label in samples]
        if isinstance(self.files, Folder):
            return FileSource(self.root, names, labels, self.classes)
        places = np.array([(0, *place) for place in self.files.places(names)], dtype=np.int64).reshape(-1, 3).T
        labelled = torch.tensor(labels, dtype=torch.int64, device="cpu")
        return TarSource([self.root], np.ascontiguousarray(places), Names(names), labelled, self.classes)


def listed(root: Path) -> Listed:
    """What there is to read, without reading it.

    `root` is a folder or a tar; one top folder may enclose train/ and test/ (or val/, valid/). Classes are the sorted
    folders of train/. Links inside `root` are followed. One UserWarning counts and names what is not read: images in
    other places, hidden ones, files without an image's extension, links that lead out.
    """
    existing(root, "a folder or tar with train/<class>/* and test/<class>/*")
    files: Files = Folder(root, _DEPTH) if root.is_dir() else Archive(root)
    train_folder, test_folder = _split_folders(files, root)
    in_train, in_test = _classes(files, train_folder, root), _classes(files, test_folder, root)
    classes = tuple(in_train)
    if unknown := [name for name in in_test if name not in in_train]:
        raise ValueError(f"{root}: expected only classes of {train_folder}/ in {test_folder}/, got {unknown}")

    all_train, all_test = (_labelled(files, folders, classes) for folders in (in_train, in_test))
    _warn_of_skipped(files, [*all_train, *all_test], [*in_train.values(), *in_test.values()], root)
    return Listed(root, files, classes, all_train, all_test)


def read(found: Listed, limit: int | None, test_limit: int | None, image_size: int | None) -> Dataset:
    """Images uint8 RGB [N, 3, H, W], in the order of (class, file name), or of `choose` if limited.

    `image_size` is the side to which the central squares are resized; without it, all images must have one size. With a
    limit, only the chosen images are read.
    """
    root, files = found.root, found.files
    if image_size is not None:
        checks.integer("image_size", image_size, low=1)
    train, test = _chosen(found.train, limit), _chosen(found.test, test_limit)
    train_images, test_images = _images(files, [list(train), list(test)], root, image_size)
    return Dataset(
        "image-folder",
        Split(train_images, torch.tensor(list(train.values()), device="cpu")),
        Split(test_images, torch.tensor(list(test.values()), device="cpu")),
        found.classes,
        augment=True,
    )


def _split_folders(files: Files, root: Path) -> tuple[str, str]:
    """The names of the folders that hold the train and the test images."""
    found = sorted(
        name for name in files.folders if name == "train" or (name.count("/") == 1 and name.endswith("/train"))
    )
    # A train/ at the top wins: below it, a class may itself be called "train".
    train = "train" if "train" in found else found[0] if len(found) == 1 else None
    if train is None:
        expected = "one train/ folder, at the top or below one top folder"
        raise ValueError(f"{root}: expected {expected}, got {', '.join(found) or 'none'}{astray(files)}")
    top = train.removesuffix("train")
    for name in _TEST_FOLDERS:
        if top + name in files.folders:
            return train, top + name
    raise ValueError(f"{root}: expected a test/, val/ or valid/ folder beside {train}/, got none")


def _classes(files: Files, folder: str, root: Path) -> dict[str, str]:
    """The class folders of one split by class, in order; ValueError if there is none.

    A class is its folder's name with composed characters: macOS decomposes them, so one class may have two spellings.
    """
    found = [name for name in files.folders if name.rpartition("/")[0] == folder]
    if not found:
        raise ValueError(f"{root}: expected class folders in {folder}/, got none{astray(files)}")
    occupied = {name.rpartition("/")[0] for name in files.files if name.lower().endswith(EXTENSIONS)}
    if empty := sorted(set(found) - occupied):
        expected = f"expected images ({', '.join(EXTENSIONS)})"
        raise ValueError(f"{root}: {expected}, got none in {', '.join(empty)}{astray(files)}")
    classes: dict[str, str] = {}
    for place in found:
        if (name := _composed(place.rpartition("/")[2])) in classes:
            raise ValueError(f"{root}: expected different class names in {folder}/, got {name!r} in two spellings")
        classes[name] = place
    return dict(sorted(classes.items()))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _labelled(files: Files, folders: dict[str, str], classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """The images of one split and their labels, in the order of (class, file name)."""
    labels = {folders[name]: label for label, name in enumerate(classes) if name in folders}
    parents = ((name, *name.rpartition("/")[::2]) for name in files.files if name.lower().endswith(EXTENSIONS))
    found = sorted((labels[parent], _composed(base), name) for name, parent, base in parents if parent in labels)
    return [(name, label) for label, _, name in found]


def _warn_of_skipped(files: Files, images: list[tuple[str, int]], folders: list[str], root: Path) -> None:
    """Say once how much of what looks like part of the data set is not read, and why."""
    read, classes = {name for name, _ in images}, set(folders)
    splits = tuple({f"{folder.rpartition('/')[0]}/" for folder in folders})
    skipped: defaultdict[str, list[str]] = defaultdict(list)
    for name in files.files:
        image = name.lower().endswith(EXTENSIONS)
        if image and name not in read:
            skipped["image not directly in train/<class>/ or test/<class>/"].append(name)
        elif not image and name.rpartition("/")[0] in classes:
            skipped["file without an image's extension"].append(name)
    for kind, names in files.skipped.items():
        # Hidden files and far-off folders are nobody's loss, unless they are images, or among them.
        there = [n for n in names if n.startswith(splits)] if kind == DEEPER else names
        skipped[kind] += [n for n in there if kind != HIDDEN or n.lower().endswith(EXTENSIONS)]
    if any(skipped.values()):
        found = {kind: names for kind, names in skipped.items() if names}
        warnings.warn(f"{root}: not read: {described(found)}", stacklevel=5)  # at the caller of `load`


def _chosen(samples: list[tuple[str, int]], limit: int | None) -> dict[str, int]:
    """The samples that `Split.subset(limit)` would keep, in its order."""
    return dict(samples[index] for index in choose(len(samples), limit).tolist())


def _images(files: Files, splits: list[list[str]], root: Path, image_size: int | None) -> list[Tensor]:
    """The images of each split, uint8 [N, 3, H, W]. One pass over the files, whatever their order."""
    pillow = optional("PIL.Image")
    places = {name: (split, row) for split, names in enumerate(splits) for row, name in enumerate(names)}
    images: list[Tensor] = []
    sized_by = ""
    if image_size is not None:  # before the first is resized
        fits_memory(f"image_size={image_size}: {len(places)} images", len(places) * 3 * image_size**2)
    for name, data in files.read(places):
        with decoding(f"{root}: {name} ({len(data)} bytes)"):
            image = decode(pillow, data, image_size)
        if not images:
            sized_by = name
            fits_memory(f"{root}: {len(places)} images of {_size(image)}", len(places) * image.numel())
            images = [torch.empty(len(names), *image.shape, dtype=torch.uint8, device="cpu") for names in splits]
        if image.shape != images[0].shape[1:]:
            got = f"{sized_by} of {_size(images[0])} and {name} of {_size(image)} (width x height)"
            raise ValueError(f"{root}: expected images of one size, got {got}; give image_size to crop and resize them")
        split, row = places[name]
        images[split][row] = image
    return images


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"
