"""One entry for all data sets, by name."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from elle_fast._core import checks
from elle_fast.data.memory import Dataset

# The module of each data set's reader, imported on use: each needs its own libraries.
_READERS = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "mnist": "mnist"}
_READERS |= {"image-folder": "image_folder"}
NAMES = tuple(_READERS)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Read the data set `name` from `root`; nothing is downloaded, and no pickle is ever loaded.

    ============  ============================================================================  =====================
    name          root                                                                          images
    ============  ============================================================================  =====================
    digits        None: they come with scikit-learn                                             uint8 [N, 1, 8, 8]
    cifar10       the folder of data_batch_1.bin .., its parent, or cifar-10-binary.tar.gz      uint8 [N, 3, 32, 32]
    cifar100      the folder of train.bin, test.bin, its parent, or cifar-100-binary.tar.gz     uint8 [N, 3, 32, 32]
    svhn          the folder of train_32x32.mat, test_32x32.mat                                 uint8 [N, 3, 32, 32]
    mnist         the folder of idx files (or .gz), or an .npz of x_train, y_train, x_test, ..  uint8 [N, 1, H, W]
    image-folder  a folder or tar of train/<class>/* and test/<class>/*                         uint8 [N, 3, H, W]
    ============  ============================================================================  =====================

    `limit` and `test_limit` keep that many train and test samples, always the same ones (`choose`). `image_size` is for
    image-folder only: crop the central square, and resize it to that side. Its pictures of 9 to 16 bits are scaled to 8
    by their range; links inside root are followed; one UserWarning counts and names what is not read. The tensors are
    on the CPU, whatever torch's default device.

    Raises ValueError for an unknown name, a root or image_size that is missing or out of place, a limit out of range,
    files in another format, and files that claim or unpack to more than memory; TypeError for a root that is no path;
    FileNotFoundError for missing files; ImportError for a missing library.
    """
    checks.choice("name", name, NAMES)
    if image_size is not None and name != "image-folder":
        raise ValueError(f"image_size: only image-folder takes one, got {image_size} for {name}")
    if (name == "digits") != (root is None or root == ""):  # an empty path would be the current folder
        expected = "None, as digits come with scikit-learn" if name == "digits" else f"the path of the files of {name}"
        raise ValueError(f"root: expected {expected}, got {root or repr(root)}")
    place = Path() if root is None else checks.path("root", root)
    reader = import_module(f"elle_fast.data.readers.{_READERS[name]}")
    if name == "image-folder":  # decodes no more images than it returns
        limited: Dataset = reader.read(place, limit, test_limit, image_size)
        return limited
    dataset: Dataset = reader.read(name, place)
    return replace(dataset, train=dataset.train.subset(limit), test=dataset.test.subset(test_limit))
