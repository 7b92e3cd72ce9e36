"""Image classification data for the recipes: readers of the distributed files, and batches that can be resumed."""

from .batches import batches, batches_per_epoch, derived_seed
from .dataset import Dataset, Split
from .load import NAMES, load

__all__ = ["NAMES", "Dataset", "Split", "batches", "batches_per_epoch", "derived_seed", "load"]
