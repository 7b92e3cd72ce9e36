"""Data sets of picture files: read into memory, or while they are needed."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elle_fast.data.memory import Dataset, choose
from elle_fast.data.picture_reader import Corrupt
from elle_fast.data.readers import image_folder, parquet, torchvision_sets, webdataset
from elle_fast.data.readers.limits import memory
from elle_fast.data.sources import Source
from elle_fast.data.streaming import Stream, default_workers, in_memory
from elle_fast.data.views import View

# Decoded, a data set of at most this part of memory is read into it.
_PART_OF_MEMORY = 4


def load(
    name: str,
    root: Path,
    limits: tuple[int | None, int | None],
    test_list: Path | None,
    view_options: dict[str, Any],
    *,
    stream: str,
    workers: int | None,
    skip_corrupt: int,
) -> Dataset:
    """As :func:`elle_fast.data.load`, of checked names; ``limits`` of training and test samples."""
    given: dict[str, Any] = {"workers": default_workers() if workers is None else workers}
    given["corrupt"] = corrupt = Corrupt(skip_corrupt)
    view = View(**view_options)
    found, sources = None, None
    if name == "image-folder":
        found = image_folder.listed(root)
        found = found if test_list is None else found.keeping(test_list)
        # What cannot be read in any order is read into memory, unless something asks for a stream.
        if found.in_one_order() is None or stream == "always" or view.changes_pixels or skip_corrupt:
            sources = found.sources()
    elif ":" in name:
        sources = torchvision_sets.sources(name, root)
    else:
        sources = (webdataset if name == "webdataset" else parquet).sources(root)
    if sources is None:
        assert found is not None
        return image_folder.read(found, *limits, view.image_size)
    _check_classes(*sources)
    train = Stream(sources[0], view, _chosen(sources[0], limits[0]), **given)
    test = Stream(sources[1], view, _chosen(sources[1], limits[1]), **given, in_shape=train.in_shape)
    if _streamed(stream, view, train, test):
        return Dataset(name, train, test, sources[0].classes, augment=True)
    if found is not None and not skip_corrupt:  # decodes no more images than it returns
        return image_folder.read(found, *limits, view.image_size)
    splits = in_memory(train), in_memory(test)
    dataset = Dataset(name, *splits, sources[0].classes, augment=True, unreadable=test.unreadable())
    for line in corrupt.news():
        warnings.warn(line, stacklevel=3)
    return dataset


def _check_classes(train: Source, test: Source) -> None:
    """Raise ValueError, naming a picture, for a class of the test split that the training lacks."""
    known = torch.zeros(len(train.classes), dtype=torch.bool, device="cpu")
    known[train.labels] = True
    strange = (~known[test.labels]).nonzero().flatten()
    if len(strange):
        first = int(strange[0])
        got = f"got {train.classes[int(test.labels[first])]!r} of {test.name(first)}"
        raise ValueError(f"{train.where}: expected only classes of the training in the test split, {got}")


def _chosen(source: Source, limit: int | None) -> Tensor | None:
    return None if limit is None else choose(len(source), limit)


def _streamed(stream: str, view: View, train: Stream, test: Stream) -> bool:
    if view.changes_pixels and stream == "never":
        option, value = ("crop", view.crop) if view.crop != "pad" else ("auto_augment", view.auto_augment)
        got = f"got {value!r} with stream 'never'"
        raise ValueError(f"{option}: expected the default of pictures that are read into memory, {got}")
    decoded = (len(train) + len(test)) * math.prod(train.in_shape)
    return stream == "always" or (stream == "auto" and (view.changes_pixels or decoded > memory() // _PART_OF_MEMORY))
