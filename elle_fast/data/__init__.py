"""Image classification data: readers of the distributed files, and batches that can be resumed."""

from elle_fast.data.load import NAMES, check_name, load, of_pictures
from elle_fast.data.memory import (
    Dataset,
    Split,
    at_a_time,
    batches,
    batches_per_epoch,
    choose,
    identified_batches,
    in_order,
)
from elle_fast.data.placement import Samples

__all__ = [
    "NAMES",
    "Dataset",
    "Samples",
    "Split",
    "at_a_time",
    "batches",
    "batches_per_epoch",
    "check_name",
    "choose",
    "identified_batches",
    "in_order",
    "load",
    "of_pictures",
]
