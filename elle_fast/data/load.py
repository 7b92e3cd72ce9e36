"""One entry for all data sets, by name."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from elle_fast.data.dataset import Dataset
from elle_fast.data.readers import cifar, digits, image_folder, mnist, svhn

NAMES: tuple[str, ...] = ("digits", "cifar10", "cifar100", "svhn", "mnist", "image-folder")


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Reads the data set `name` (one of `NAMES`) from `root`; nothing is downloaded and no pickle is ever loaded.

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

    `limit` and `test_limit` keep that many train and test samples, always the same ones (`Split.subset`). `image_size`
    is for image-folder only: resize the shorter side to it, and crop the centre.

    Raises ValueError for an unknown name, a root or image_size where none belongs, a root missing where one is needed,
    a limit out of range and files of another form; FileNotFoundError for missing files; ImportError for a missing
    reader library.
    """
    if name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}, expected one of {', '.join(NAMES)}")
    if image_size is not None and name != "image-folder":
        raise ValueError(f"image_size is for image-folder only, got {image_size} for {name}")
    if name == "digits":
        if root is not None:
            raise ValueError(f"digits come with scikit-learn: root must be None, got {os.fspath(root)!r}")
        dataset = digits.read()
    elif root is None:
        raise ValueError(f"root: expected the path of the files of {name}, got None")
    elif name == "image-folder":
        # Limited by the reader itself, which decodes no more than it returns.
        return image_folder.read(Path(root), limit, test_limit, image_size)
    elif name == "svhn":
        dataset = svhn.read(Path(root))
    elif name == "mnist":
        dataset = mnist.read(Path(root))
    else:
        dataset = cifar.read(name, Path(root))
    return replace(dataset, train=dataset.train.subset(limit), test=dataset.test.subset(test_limit))
