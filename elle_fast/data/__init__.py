"""Image classification data for the recipes: readers of the distributed files, and batches that can be resumed."""

from elle_fast.data.batches import batches, batches_per_epoch
from elle_fast.data.dataset import Dataset, Split
from elle_fast.data.load import NAMES, load

__all__ = ["NAMES", "Dataset", "Split", "batches", "batches_per_epoch", "load"]
