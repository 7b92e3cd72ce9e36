"""Image classification data: readers of the distributed files, and batches that can be resumed."""

from elle_fast.data.load import NAMES, load
from elle_fast.data.memory import Dataset, Split, batches, batches_per_epoch, choose, in_order

__all__ = ["NAMES", "Dataset", "Split", "batches", "batches_per_epoch", "choose", "in_order", "load"]
