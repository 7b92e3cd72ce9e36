"""Image files laid out as train/<class>/* and test/<class>/*, in a folder or in a tar."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast.data.memory import Dataset, Split, choose
from elle_fast.data.readers.archives import Archive, Files, Folder
from elle_fast.data.readers.decoding import decoding, existing, optional

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow goes by content, not by extension; other formats (EPS) would start programs.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_TEST_FOLDERS = ("test", "val", "valid")
_DEPTH = 4  # top folder / split / class / file


def read(root: Path, limit: int | None, test_limit: int | None, image_size: int | None) -> Dataset:
    """Images uint8 RGB [N, 3, H, W], in the order of (class, file name), or of `choose` if limited.

    `root` is a folder or a tar; one top folder may enclose train/ and test/ (or val/, valid/). Classes are the sorted
    folders of train/. Hidden files, links and files without an image extension are skipped. `image_size` is the side to
    which images are resized and cropped; without it, all must have one size. With a limit, only the chosen images are
    read.
    """
    existing(root, "a folder or tar with train/<class>/* and test/<class>/*")
    if image_size is not None:
        checks.integer("image_size", image_size, low=1)
    files: Files = Folder(root, _DEPTH) if root.is_dir() else Archive(root)
    train_folder, test_folder = _split_folders(files, root)
    classes = tuple(_classes(files, train_folder, root))
    unknown = [name for name in _classes(files, test_folder, root) if name not in classes]
    if unknown:
        raise ValueError(f"{root}: expected only classes of {train_folder}/ in {test_folder}/, got {unknown}")

    train = _chosen(_labelled(files, train_folder, classes), limit)
    test = _chosen(_labelled(files, test_folder, classes), test_limit)
    train_images, test_images = _images(files, [list(train), list(test)], root, image_size)
    return Dataset(
        "image-folder",
        Split(train_images, torch.tensor(list(train.values()))),
        Split(test_images, torch.tensor(list(test.values()))),
        classes,
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
        raise ValueError(f"{root}: expected {expected}, got {', '.join(found) or 'none'} (links are not followed)")
    top = train.removesuffix("train")
    for name in _TEST_FOLDERS:
        if top + name in files.folders:
            return train, top + name
    raise ValueError(f"{root}: expected a test/, val/ or valid/ folder beside {train}/, got none")


def _classes(files: Files, folder: str, root: Path) -> list[str]:
    """The sorted class folders of one split; ValueError if there is none."""
    classes = sorted(base for parent, _, base in (name.rpartition("/") for name in files.folders) if parent == folder)
    if not classes:
        raise ValueError(f"{root}: expected class folders in {folder}/, got none")
    occupied = {name.rpartition("/")[0] for name in files.files if name.lower().endswith(EXTENSIONS)}
    empty = [name for name in classes if f"{folder}/{name}" not in occupied]
    if empty:
        where = ", ".join(f"{folder}/{name}" for name in empty)
        raise ValueError(f"{root}: expected images ({', '.join(EXTENSIONS)}), got none in {where}")
    return classes


def _labelled(files: Files, folder: str, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """The images of one split and their labels, in the order of (class, file name)."""
    labels = {f"{folder}/{name}": label for label, name in enumerate(classes)}
    parents = ((name, *name.rpartition("/")[::2]) for name in files.files if name.lower().endswith(EXTENSIONS))
    found = sorted((labels[parent], base, name) for name, parent, base in parents if parent in labels)
    return [(name, label) for label, _, name in found]


def _chosen(samples: list[tuple[str, int]], limit: int | None) -> dict[str, int]:
    """The samples that `Split.subset(limit)` would keep, in its order."""
    return dict(samples[index] for index in choose(len(samples), limit).tolist())


def _images(files: Files, splits: list[list[str]], root: Path, image_size: int | None) -> list[Tensor]:
    """The images of each split, uint8 [N, 3, H, W]. One pass over the files, whatever their order."""
    pillow = optional("PIL.Image")
    places = {name: (split, row) for split, names in enumerate(splits) for row, name in enumerate(names)}
    images: list[Tensor] = []
    sized_by = ""
    for name, data in files.read(places):
        with decoding(f"{root}: {name} ({len(data)} bytes)"):
            image = _decode(pillow, data, image_size)
        if not images:
            sized_by = name
            images = [torch.empty(len(names), *image.shape, dtype=torch.uint8) for names in splits]
        if image.shape != images[0].shape[1:]:
            got = f"{sized_by} of {_size(images[0])} and {name} of {_size(image)} (width x height)"
            raise ValueError(f"{root}: expected images of one size, got {got}; give image_size to resize and crop them")
        split, row = places[name]
        images[split][row] = image
    return images


def _size(image: Tensor) -> str:
    return f"{image.shape[-1]}x{image.shape[-2]}"


def _decode(pillow: ModuleType, data: bytes, image_size: int | None) -> Tensor:
    """One image as uint8 RGB [3, H, W]."""
    with pillow.open(io.BytesIO(data), formats=_FORMATS) as file:
        rgb = file.convert("RGB")
    if image_size is not None:
        rgb = _resize_and_crop(pillow, rgb, image_size)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _resize_and_crop(pillow: ModuleType, image: Any, side: int) -> Any:
    """The shorter side resized to `side` (bilinear, antialiased), then the central square."""
    scale = side / min(image.size)
    width, height = (max(side, round(scale * length)) for length in image.size)
    resized = image.resize((width, height), pillow.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return resized.crop((left, top, left + side, top + side))
