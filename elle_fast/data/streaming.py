"""A split whose pictures are read, decoded and augmented while they are needed, in worker processes.

Which samples a batch has, and what is done to each, follows from (seed, epoch, place in the split) alone: the order is
that of :func:`elle_fast.data.identified_batches` for a split in memory, and each picture's augmentation is drawn from a
seed of its own. So a resume in the middle of an epoch is ``start=``, exact with any number of workers, and no state of
a loader has to be saved, as torchdata's StatefulDataLoader would do. The processes that train together each read their
share of a batch and nothing else.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Collection, Generator, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast.data.memory import Batch, Split, check_several, choose, histograms, scaled
from elle_fast.data.picture_reader import Asked, Corrupt, Read, Reader
from elle_fast.data.placement import Samples
from elle_fast.data.readers.decoding import decoding, optional
from elle_fast.data.readers.limits import fits_memory
from elle_fast.data.sources import Source
from elle_fast.data.views import View

# Of pixels that a worker reads at a time: large batches are shared among workers, and wait in memory in pieces.
_CHUNK = 8 << 20
_BATCHES_AHEAD = 2
_PATIENCE = 600  # seconds for a chunk
_MOST_WORKERS = 16
_FOR_MOMENTS = 1024


def default_workers() -> int:
    """One for each core that is left beside the process itself, at most 16, shared among torchrun's processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    processes = int(text) if text.isdecimal() and int(text) else 1
    return max(0, min(_MOST_WORKERS, cores // processes - 1))


class Stream(Split):
    """Labelled pictures of a source, or some of them, as batches on ``device``.

    Beside a :class:`Split` it has no ``images``, and its ``labels`` stay on the CPU. Batches are float32 in [0, 1] in
    channels_last, made on the device of bytes that were copied there without waiting, from pinned memory on CUDA.

    Args:
        source: where the pictures are.
        view: how they are cut and augmented.
        rows: int64 [N], places in the source; ``None``: all.
        device: where the batches come out.
        workers: processes that read ahead, about two batches; 0: this one reads, and nothing is ahead. The batches are
            the same.
        corrupt: pictures that cannot be read. In the place of each of those let pass comes the next one in the split
            that can be read, with its label; what a method keeps for the sample is kept for both alike.
        in_shape: of the pictures, if it is known; without it and image_size, the first one tells.

    Raises:
        TypeError, ValueError: as :class:`View`, and for no rows. While batches are read: ValueError or OSError that
            names the file, and RuntimeError if a worker is killed, or needs more than 10 minutes for 8 MiB of pixels.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        rows: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
        corrupt: Corrupt | None = None,
        in_shape: tuple[int, int, int] | None = None,
    ) -> None:
        labels = source.labels if rows is None else source.labels[rows]
        rows = torch.arange(len(source), device="cpu") if rows is None else rows
        if len(rows) == 0:
            raise ValueError(f"{source.where}: expected pictures, got none")
        given: dict[str, Any] = {"source": source, "view": view, "rows": rows, "_device": torch.device(device)}
        given |= {"workers": checks.integer("workers", workers, low=0), "corrupt": corrupt or Corrupt()}
        given["_in_shape"] = in_shape or _in_shape(source, view, int(rows[0]))
        given["labels"] = labels
        for name, value in given.items():
            object.__setattr__(self, name, value)

    source: Source
    view: View
    rows: Tensor
    workers: int
    corrupt: Corrupt
    _device: torch.device
    _in_shape: tuple[int, int, int]

    @property
    def images(self) -> Tensor:
        """There are none in memory: AttributeError."""
        raise AttributeError("images: expected a split in memory, got a stream; read it by data.in_order")

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a picture."""
        return self._in_shape

    @property
    def device(self) -> torch.device:
        """Where the batches come out."""
        return self._device

    @property
    def placed(self) -> bool:
        """Whether the crop and flip of training are those of a split in memory, on the device."""
        return self.view.crop == "pad"

    @property
    def order_device(self) -> torch.device:
        """Places are wanted on the host."""
        return torch.device("cpu")

    def _other(self, **changed: Any) -> Stream:
        now = {"rows": self.rows, "device": self._device, "workers": self.workers, "corrupt": self.corrupt}
        return Stream(**{"source": self.source, "view": self.view, **now, "in_shape": self._in_shape, **changed})

    def of_side(self, image_size: int | None) -> Stream:
        """The same samples, cut to another side."""
        if image_size in (None, self.view.image_size):
            return self
        view = View(image_size, self.view.crop, self.view.min_area, self.view.auto_augment)
        return self._other(view=view, in_shape=None)

    def __getitem__(self, kept: Tensor | slice) -> Stream:
        """The samples that an index tensor, a mask or a slice selects, as a stream; TypeError for one number."""
        check_several(kept)
        return self._other(rows=self.rows[kept.cpu() if isinstance(kept, Tensor) else kept])

    def to(self, device: torch.device | str) -> Stream:
        """The same stream, with batches on ``device``."""
        return self._other(device=device)

    def digest(self) -> str:
        """A fingerprint of the names, sizes and labels of the files, and of which of them are here."""
        return digest_of(self.source.digest().encode(), self.rows)

    def unreadable(self) -> dict[int, tuple[str, str]]:
        """By place, name and reason of each picture that could not be read, of those that reading has come by."""
        found = self.corrupt.found
        names = enumerate(map(self.source.name, self.rows.tolist() if found else ()))
        return {place: (name, found[name]) for place, name in names if name in found}

    def tried(self) -> dict[int, tuple[str, str]]:
        """Reads each picture once; returns :meth:`unreadable` of all of them."""
        for _ in self.raw(self.chunks_in_order(256), None):
            pass
        return self.unreadable()

    def without(self, places: Collection[int]) -> Stream:
        """The other samples; from then on a picture that cannot be read is an error, and none takes its place."""
        kept = torch.ones(len(self), dtype=torch.bool, device="cpu")
        kept[list(places)] = False
        return self._other(rows=self.rows[kept], corrupt=Corrupt())

    def __str__(self) -> str:
        """One line for a log."""
        size = "x".join(map(str, self.in_shape[1:]))
        count = "this process" if not self.workers else f"{self.workers} worker{'s' * (self.workers > 1)}"
        return f"{len(self)} pictures of {self.source.where} as {size} pixels, read while they are needed by {count}"

    def histograms(self) -> Tensor:
        """How often each level is there, by channel: float64 [3, 256], of 1,024 fixed pictures (``choose``)."""
        some = self[choose(len(self), min(_FOR_MOMENTS, len(self)))]
        counts = torch.zeros(self.in_shape[0], 256, dtype=torch.float64, device="cpu")
        for images, _, _ in some.raw(some.chunks_in_order(256), None):
            counts += histograms(images.permute(0, 3, 1, 2))
        return counts

    def chunks_in_order(self, batch_size: int) -> Iterator[Samples]:
        """All places in their order."""
        places = torch.arange(len(self), device="cpu")
        return (Samples(part) for part in places.split(batch_size))

    def parts(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Its samples in order, without augmentation."""
        return ((x, y) for x, y, _ in self.read(self.chunks_in_order(batch_size), None))

    def read(self, asked: Iterator[Samples], drawn_from: tuple[int, int] | None) -> Iterator[Batch]:
        """The batches of the samples that are asked for; nothing is read before the first of them is wanted."""
        for images, y, samples in self.raw(asked, drawn_from):
            augmented = () if samples.offsets is None or samples.flips is None else (samples.offsets, samples.flips)
            samples = Samples(self._sent(samples.index), *(self._sent(each) for each in augmented))
            yield scaled(samples.placed(self._sent(images).permute(0, 3, 1, 2))), self._sent(y), samples

    def _sent(self, value: Tensor) -> Tensor:
        """On the device; from pinned memory, so that neither side waits."""
        if self._device.type != "cuda":
            return value.to(self._device)
        return (value if value.is_pinned() else value.pin_memory()).to(self._device, non_blocking=True)

    def raw(self, asked: Iterator[Samples], drawn_from: tuple[int, int] | None) -> Iterator[Batch]:
        """On the host: images uint8 [B, H, W, C], labels and samples."""
        waiting: deque[Samples] = deque()
        at_once = max(1, _CHUNK // math.prod(self.in_shape))
        if (head := next(asked, None)) is None:
            return

        def chunks() -> Iterator[Asked]:
            for samples in chain([head], asked):
                waiting.append(samples)
                for part in samples.index.split(at_once):
                    yield Asked(part.numpy(), drawn_from)

        loaded = self._loaded(chunks(), _BATCHES_AHEAD * math.ceil(len(head.index) / at_once))
        try:
            for first in loaded:
                samples = waiting.popleft()
                size = len(samples.index)
                parts = [first, *islice(loaded, math.ceil(size / at_once) - 1)]
                for part in parts:
                    for failure in part.failures:
                        self.corrupt.add(failure)
                    if not part.whole:
                        raise ValueError(f"{self.source.where}: expected a picture that can be read, got none")
                images = parts[0].images
                if self._device.type == "cuda" or len(parts) > 1:
                    pinned = self._device.type == "cuda"
                    images = torch.empty((size, *images.shape[1:]), dtype=torch.uint8, device="cpu", pin_memory=pinned)
                    torch.cat([part.images for part in parts], out=images)
                places = torch.cat([part.places for part in parts])
                yield images, self.labels[places], samples
        finally:
            loaded.close()  # ends the workers also where an error's traceback keeps this frame

    def _loaded(self, chunks: Iterator[Asked], ahead: int) -> Generator[Read, None, None]:
        """What is read of the chunks, in their order; so many of them are read ahead, or two for each worker."""
        options: dict[str, Any] = {}
        if self.workers:
            options = {"num_workers": self.workers, "timeout": _PATIENCE}
            options["prefetch_factor"] = max(2, math.ceil(ahead / self.workers))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores
            loader = DataLoader(
                Reader(self.source, self.view, self.rows, in_shape=self.in_shape, allowed=self.corrupt.allowed),
                batch_size=None,
                sampler=chunks,  # iterated over once
                collate_fn=_as_it_is,
                generator=torch.Generator("cpu"),  # of seeds that nobody reads; it would draw from torch's own
                **options,
            )
            loaded: Iterator[Read] = iter(loader)
        del loader
        try:
            yield from loaded
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            first = str(error).splitlines()[0]
            raise RuntimeError(f"{self.source.where}: a process that reads its pictures is gone: {first}") from error
        finally:
            del loaded


def _as_it_is(value: Any) -> Any:
    return value


def _in_shape(source: Source, view: View, row: int) -> tuple[int, int, int]:
    if view.image_size is not None:
        fits_memory(f"image_size={view.image_size}: a picture", 3 * view.image_size**2)
        return 3, view.image_size, view.image_size
    name, pillow = source.name(row), optional("PIL.Image")
    with decoding(name):
        data = source.read(row)
    with decoding(f"{name} ({len(data)} bytes)"):
        height, width, channels = view.of_test(pillow, data).shape
    return channels, height, width


def in_memory(stream: Stream) -> Split:
    """The split of all that a stream reads, without augmentation, uint8 [N, 3, H, W]; ValueError beyond memory."""
    size = "x".join(map(str, stream.in_shape[1:]))
    what = f"{stream.source.where}: {len(stream)} images of {size}"
    fits_memory(what, len(stream) * math.prod(stream.in_shape))
    images = torch.empty(len(stream), *stream.in_shape, dtype=torch.uint8, device="cpu")
    labels, start = torch.empty(len(stream), dtype=torch.int64, device="cpu"), 0
    for part, y, _ in stream.raw(stream.chunks_in_order(256), None):
        images[start : start + len(y)] = part.permute(0, 3, 1, 2)
        labels[start : start + len(y)] = y
        start += len(y)
    return Split(images, labels)
