"""The options that say which data set a run or an evaluation reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elle_fast import data
from elle_fast.data import Dataset
from elle_fast.methods.base import Method
from elle_fast.recipes.checked import Checked


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """A data set, how much of it is kept, and how it is read."""

    data: str = "digits"
    """digits, cifar10, cifar100, svhn, mnist, or pictures: image-folder, webdataset, parquet, torchvision:NAME."""
    root: str | None = None
    """Folder or archive of the data set; digits need none."""
    limit: int | None = None
    """Keep this many training images, those of --validation among them, >= 1."""
    test_limit: int | None = None
    """Keep this many test images, >= 1."""
    test_list: str | None = None
    """Of an image folder, keep the test pictures that this file names, a line each, as RobustBench's for ImageNet."""
    image_size: int | None = None
    """Cut pictures to squares of this many pixels a side, >= 1; digits, of 8, are enlarged to it."""
    crop: str = "pad"
    """How pictures are cut: pad (the central square; augmented by 4 zeros a side and a crop back) or resized (the
    middle 7/8 of the central square; augmented by a random rectangle, resized), which streams."""
    stream: str = "auto"
    """Read pictures while they are needed: always, never, or auto: if decoded they take more than a quarter of the
    memory, or an option needs it."""
    workers: int | None = field(default=None, metadata={"low": 0})
    """Processes that read pictures ahead, >= 0; by default one for each core but one, at most 16, shared among
    torchrun's processes. The batches are the same."""
    skip_corrupt: int = field(default=0, metadata={"low": 0})
    """Go on past at most this many pictures that cannot be read, in each process; each is named."""

    def read_data(self, root: str | None = None) -> Dataset:
        """The run's data set, from ``root`` if its files have moved."""
        return data.load(self.data, self.root if root is None else root, **self._reading())

    def _reading(self) -> dict[str, Any]:
        names = ("limit", "test_limit", "test_list", "image_size", "crop", "stream", "workers", "skip_corrupt")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TrainingDataOptions(DataOptions):
    """And how training images are augmented."""

    augment: bool | None = None
    """Random crop and flip; by default as usual for the data set."""
    min_area: float = field(default=0.08, metadata={"high": 1, "low_allowed": False})
    """With --crop resized: smallest part of a picture's area in a training crop, in (0, 1]."""
    auto_augment: str | None = None
    """Of torchvision: randaugment (2 operations of magnitude 9), randaugment-OPERATIONS-MAGNITUDE or trivialaugment; it
    streams."""
    mixup: float = 0.0
    """Mix images and labels of pairs in a batch, with a share from Beta(A, A); A >= 0, 0: no. Beside --cutmix, one of
    the two in each batch."""
    cutmix: float = 0.0
    """As --mixup, but with a rectangle of the other image in place of a mixture."""

    def _reading(self) -> dict[str, Any]:
        return {**super()._reading(), "min_area": self.min_area, "auto_augment": self.auto_augment}

    def check_mixing(self, named: str, method: Method) -> None:
        """Raise ValueError for augmentation that a training method cannot take."""
        for name, asked in {"mixup": self.mixup > 0, "cutmix": self.cutmix > 0}.items():
            kept = (
                "keeps something for each training image, and none is left as it is"
                if "samples" in method.takes
                else ""
            )
            if asked and (why := method.refuses.get("soft_targets", kept)):
                raise ValueError(f"{name}: method {named!r} {why}, so this option does not apply")
        for name, usual, given in (("crop", "pad", self.crop), ("auto_augment", None, self.auto_augment)):
            if given != usual and self.augment is not False and "samples" in method.takes:
                why = "keeps something for each training image, which cannot follow this augmentation"
                raise ValueError(f"{name}: method {named!r} {why}; expected {usual!r}, or no-augment, got {given!r}")
