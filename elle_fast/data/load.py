"""One entry for all data sets, by name; what does not fit in memory is read while it is needed."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from elle_fast._core import checks
from elle_fast.data.memory import Dataset

# The module of each data set's reader, imported on use: each needs its own libraries.
_READERS = {"digits": "digits", "cifar10": "cifar", "cifar100": "cifar", "svhn": "svhn", "mnist": "mnist"}
# Of pictures in files of their own, with sizes of their own.
_OF_PICTURES = ("image-folder", "webdataset", "parquet")
_TORCHVISION = "torchvision:"
NAMES = (*_READERS, *_OF_PICTURES)
"""Those that :func:`load` knows; and ``torchvision:NAME``."""
STREAM = ("auto", "always", "never")


def check_name(argument: str, name: str) -> str:
    """The name itself; TypeError or ValueError that names the argument, for one that `load` does not know."""
    if isinstance(name, str) and name.startswith(_TORCHVISION):
        import_module("elle_fast.data.readers.torchvision_sets").check_name(argument, name)
        return name
    if isinstance(name, str) and name in NAMES:
        return name
    return checks.choice(argument, name, (*NAMES, f"{_TORCHVISION}NAME"))


def of_pictures(name: str) -> bool:
    """Whether the pictures have any size, so that image_size and streaming apply."""
    return name in _OF_PICTURES or name.startswith(_TORCHVISION)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    test_limit: int | None = None,
    test_list: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    stream: str = "auto",
    workers: int | None = None,
    crop: str = "pad",
    min_area: float = 0.08,
    auto_augment: str | None = None,
    skip_corrupt: int = 0,
) -> Dataset:
    """Read the data set `name` from `root`; nothing is downloaded, and no pickle is ever loaded.

    ============  ============================================================================  =====================
    name          root                                                                          images
    ============  ============================================================================  =====================
    digits        None: they come with scikit-learn; `image_size` enlarges them, bilinearly     uint8 [N, 1, 8, 8]
    cifar10       the folder of data_batch_1.bin .., its parent, or cifar-10-binary.tar.gz      uint8 [N, 3, 32, 32]
    cifar100      the folder of train.bin, test.bin, its parent, or cifar-100-binary.tar.gz     uint8 [N, 3, 32, 32]
    svhn          the folder of train_32x32.mat, test_32x32.mat                                 uint8 [N, 3, 32, 32]
    mnist         the folder of idx files (or .gz), or an .npz of x_train, y_train, x_test, ..  uint8 [N, 1, H, W]
    image-folder  a folder or tar of train/<class>/* and test/<class>/*                         pictures
    webdataset    a folder of train-*.tar and test-*.tar or val-*.tar                           pictures
    parquet       a folder of train-*.parquet and test-*.parquet or validation-*.parquet        pictures
    torchvision:  the root of a data set of torchvision's that is on disk, such as              pictures
                  torchvision:Food101
    ============  ============================================================================  =====================

    `limit` and `test_limit` keep that many train and test samples, always the same ones (`choose`). `test_list`, for
    image-folder only, is a file that names the test pictures to keep, in its order: one file name or path on a line,
    behind which anything may follow, as in RobustBench's list for ImageNet.

    Pictures are made 8-bit RGB and upright, those of 9 to 16 bits scaled by their range; links inside root are
    followed; one UserWarning counts and names what is not read. They are read into memory, uint8 [N, 3, H, W] on the
    CPU, or while they are needed, as a :class:`~elle_fast.data.streaming.Stream`. For them only:

    - `image_size`, `crop`, `min_area`, `auto_augment`: see :class:`~elle_fast.data.views.View`. In memory there are the
      central squares, `crop="pad"`. Without `image_size`, all have to have one size.
    - `stream`: ``"always"`` and ``"never"`` decide; ``"auto"`` streams what would take more than a quarter of this
      machine's (or container's) memory when decoded, and what is augmented in ways that need the files.
    - `workers`: processes that read a stream; None: one for each core beside this process's, at most 16.
    - `skip_corrupt`: goes on past at most so many pictures that cannot be read, in each process; in the place of each
      comes the next that can be. The names are in ``dataset.train.corrupt`` of a stream, and a UserWarning otherwise,
      with the places of those of the test split in ``dataset.unreadable``.

    Raises ValueError for an unknown name, a root or an option that is missing or out of place, a limit out of range,
    files in another format, and files that claim or unpack to more than memory; TypeError for a root that is no path;
    FileNotFoundError for missing files; ImportError for a missing library.
    """
    check_name("name", name)
    checks.choice("stream", stream, STREAM)
    if not of_pictures(name):
        sized = None if name == "digits" else image_size
        of_files = {"image_size": sized, "auto_augment": auto_augment, "skip_corrupt": skip_corrupt or None}
        of_files |= {"stream": "always" if stream == "always" else None, "crop": None if crop == "pad" else crop}
        for option, value in of_files.items():
            if value is not None:
                takers = ", ".join((*_OF_PICTURES, f"{_TORCHVISION}NAME"))
                raise ValueError(f"{option}: only {takers} take one, got {value} for {name}")
    if (name == "digits") != (root is None or root == ""):  # an empty path would be the current folder
        expected = "None, as digits come with scikit-learn" if name == "digits" else f"the path of the files of {name}"
        raise ValueError(f"root: expected {expected}, got {root or repr(root)}")
    if test_list is not None and name != "image-folder":
        raise ValueError(f"test_list: only image-folder takes one, got {str(test_list)!r} for {name}")
    place = Path() if root is None else checks.path("root", root)
    if not of_pictures(name):
        options = {"image_size": image_size} if name == "digits" else {}
        dataset: Dataset = import_module(f"elle_fast.data.readers.{_READERS[name]}").read(name, place, **options)
        return replace(dataset, train=dataset.train.subset(limit), test=dataset.test.subset(test_limit))
    # Imported on use: the rest of this package does without NumPy.
    return import_module("elle_fast.data.picture_sets").load(  # type: ignore[no-any-return]
        name,
        place,
        (limit, test_limit),
        None if test_list is None else checks.path("test_list", test_list),
        {"image_size": image_size, "crop": crop, "min_area": min_area, "auto_augment": auto_augment},
        stream=stream,
        workers=workers,
        skip_corrupt=skip_corrupt,
    )
