"""The options that say which data set a run or an evaluation reads."""

from __future__ import annotations

from dataclasses import dataclass

from elle_fast import data
from elle_fast.data import Dataset
from elle_fast.recipes.checked import Checked


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """A data set and how much of it is kept."""

    data: str = "digits"
    """digits, cifar10, cifar100, svhn, mnist or image-folder."""
    root: str | None = None
    """Folder or archive of the data set; digits need none."""
    limit: int | None = None
    """Keep this many training images, those of --validation among them, >= 1."""
    test_limit: int | None = None
    """Keep this many test images, >= 1."""
    image_size: int | None = None
    """Crop an image folder's pictures to their central squares, of this many pixels a side, >= 1."""

    def read_data(self, root: str | None = None) -> Dataset:
        """The run's data set, from ``root`` if its files have moved."""
        sizes = {"limit": self.limit, "test_limit": self.test_limit, "image_size": self.image_size}
        return data.load(self.data, self.root if root is None else root, **sizes)
