"""A data set as one tensor in memory, and its batches, which depend on (split, batch_size, seed, epoch) alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.digests import digest_of
from elle_fast._core.seeds import derived_seed
from elle_fast.data.placement import PAD, Samples

_MIN_STD = 1e-3
# How the digest of a data set begins that is not in memory.
STREAMED = "files-"
# x, y, and which samples they are.
Batch = tuple[Tensor, Tensor, Samples]


def choose(n: int, limit: int | None) -> Tensor:
    """The indices, in order, of the samples that a limited split keeps: int64 [limit], or 0 .. n-1 for None.

    They come from one fixed permutation (seed 0): runs with different seeds see the same subset, and a smaller limit
    gives a prefix of a larger one. Raises TypeError or ValueError unless 1 <= limit <= n.
    """
    if limit is None:
        return torch.arange(checks.integer("n", n, low=0), device="cpu")
    checks.integer("limit", limit, low=1, high=n)
    return torch.randperm(n, generator=_on_the_host(0), device="cpu")[:limit]


def _on_the_host(seed: int) -> torch.Generator:
    """A generator of the CPU, for draws with `device="cpu"`: the same ones whatever torch's default device is."""
    return torch.Generator("cpu").manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images of one size: images uint8 [N, C, H, W], labels int64 [N], N >= 1, on one device."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        known = isinstance(images, Tensor)
        if not known or images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise checks.refusal("images: expected uint8 [N, C, H, W] with N >= 1", images, known)
        known = isinstance(labels, Tensor)
        shape, device = images.shape[:1], images.device
        if not known or labels.dtype != torch.int64 or labels.shape != shape or labels.device != device:
            expected = f"labels: expected int64 [{len(images)}] on {device}, one for each image"
            raise checks.refusal(expected, labels, known)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where the batches come out."""
        return self.images.device

    @property
    def placed(self) -> bool:
        """Whether augmentation is the crop and flip that :class:`Samples` tells of, and no other."""
        return True

    def of_side(self, image_size: int | None) -> Split:
        """The same samples with images of that side; ValueError unless they have it, or for None."""
        if image_size is not None and self.in_shape[1:] != (image_size, image_size):
            height, width = self.in_shape[1:]
            got = f"got {image_size} for images of {height}x{width}"
            raise ValueError(f"image_size: expected None, or the side of the images that are in memory, {got}")
        return self

    def __getitem__(self, kept: Tensor | slice) -> Split:
        """The samples that an index tensor, a mask or a slice selects, as a split; TypeError for one number."""
        check_several(kept)
        return Split(self.images[kept], self.labels[kept])

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`; not copied if it is there already."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, limit: int | None) -> Split:
        """The samples of `choose`; None keeps all, in order."""
        return self if limit is None else self[choose(len(self), limit).to(self.labels.device)]

    def held_out(self, n: int) -> tuple[Split, Split]:
        """The split without n samples, in its order, and those n: the first of its fixed permutation (`choose`).

        So they are a random choice, not one by class: the same one whatever the seed of a run, and a smaller n holds
        out some of those of a larger one. Raises TypeError or ValueError unless 1 <= n < N.
        """
        checks.integer("n", n, low=1, high=len(self) - 1)
        chosen = choose(len(self), n).to(self.labels.device)
        rest = torch.ones_like(self.labels, dtype=torch.bool)
        rest[chosen] = False
        return self[rest], self[chosen]

    def digest(self) -> str:
        """A fingerprint of the images and labels."""
        return digest_of(self.images, self.labels)

    def histograms(self) -> Tensor:
        """How often each level is there, by channel: float64 [C, 256]."""
        return histograms(self.images)

    def read(self, asked: Iterator[Samples], drawn_from: tuple[int, int] | None) -> Iterator[Batch]:
        """The batches of the samples that are asked for, cropped and flipped as these say.

        ``drawn_from``: the (seed, epoch) of further augmentation, None for none; a split in memory has no other.
        """
        for samples in asked:
            yield scaled(samples.placed(self.images[samples.index])), self.labels[samples.index], samples

    def parts(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Its samples in order, without augmentation."""
        parts = (self[start : start + batch_size] for start in range(0, len(self), batch_size))
        return ((scaled(part.images), part.labels) for part in parts)

    @property
    def order_device(self) -> torch.device:
        """Where the order of an epoch is wanted."""
        return self.labels.device


def check_several(kept: Any) -> None:
    """Raise TypeError for one number as an index: a single sample is no split."""
    if isinstance(kept, Integral) or (isinstance(kept, Tensor) and kept.ndim == 0):
        got = checks.describe(kept)
        raise TypeError(f"index: expected an index tensor, a mask or a slice, such as split[:1], got {got}")


def histograms(images: Tensor) -> Tensor:
    """How often each level is in uint8 images [N, C, H, W], by channel: float64 [C, 256]."""
    channels = images.unbind(1)
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits with the same classes and [C, H, W]. `augment`: random crop and flip is the standard recipe.

    `unreadable`: of a test split in memory, the places that hold another picture than their own, which cannot be read
    (`skip_corrupt`), with its name and the reason.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    augment: bool
    unreadable: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_split("train", self.train)
        _check_split("test", self.test)
        train, test = list(self.train.in_shape), list(self.test.in_shape)
        if train != test:
            raise ValueError(f"{self.name}: expected test images of the size of train images, {train}, got {test}")

    def digest(self) -> str:
        """A fingerprint of the class names and of all images and labels; of streams, of their files' names and sizes.

        That of a data set with a stream begins with ``files-``.
        """
        # A folder's name need not be UTF-8; Python then has the bytes as surrogates.
        classes = "\0".join(self.classes).encode(errors="surrogateescape")
        if self.streamed:
            return f"{STREAMED}{digest_of(classes, self.train.digest().encode(), self.test.digest().encode())}"
        tensors = [tensor for split in (self.train, self.test) for tensor in (split.images, split.labels)]
        return digest_of(classes, *tensors)

    @property
    def streamed(self) -> bool:
        """Whether pictures are read while they are needed: the splits are streams."""
        return type(self.train) is not Split

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of train.images / 255, each in [0, 1]; of a stream, of 1,024 fixed samples (`choose`)."""
        return tuple(self._moments[0].tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation (divided by the count); at least 1e-3, so no channel divides by zero."""
        return tuple(self._moments[1].tolist())

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and std, float64 [C] each, from histograms: exact, and without a floating-point copy of the images."""
        counts = self.train.histograms()
        weights = counts / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
        mean = weights @ values
        variance = (weights * (values - mean[:, None]).square()).sum(1)
        return mean, variance.sqrt().clamp_min(_MIN_STD)


def at_a_time(split: Split) -> int:
    """How many samples keep the split's device busy: 256 on the CPU, elsewhere a million pixels' worth, 64 to 4,096."""
    _check_split("split", split)
    if split.device.type == "cpu":
        return 256
    return max(64, min(4096, 2**20 // math.prod(split.in_shape[1:])))


def in_order(
    split: Split, batch_size: int | None = None, *, image_size: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x, y), as `batches` does, of all samples in their order; the last batch may be smaller.

    ``batch_size`` None: :func:`at_a_time`. ``image_size``: as of :func:`batches`.
    """
    _check_split("split", split)
    split = split.of_side(image_size)
    return split.parts(at_a_time(split) if batch_size is None else checks.integer("batch_size", batch_size, low=1))


def _check_split(name: str, split: Split) -> None:
    if not isinstance(split, Split):
        raise TypeError(f"{name}: expected a Split, such as dataset.train, got {checks.describe(split)}")


def batches_per_epoch(split: Split, batch_size: int, *, drop_last: bool = True) -> int:
    """Whole batches in the split, or 1 if it is smaller than one; without ``drop_last`` also one that is not full."""
    _check_split("split", split)
    whole, rest = divmod(len(split), checks.integer("batch_size", batch_size, low=1))
    return max(1, whole + (rest > 0 and not checks.flag("drop_last", drop_last)))


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: bool = False,
    drop_last: bool = True,
    rank: int = 0,
    ranks: int = 1,
    image_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x float32 [B, C, H, W] in [0, 1] and y int64 [B], on the split's device, in an order drawn per epoch.

    x is in channels_last, the layout in which convolutions are fast. An incomplete last batch is dropped with
    `drop_last`; a split smaller than `batch_size` is one batch. `start` skips that many batches and changes nothing
    else. With `augment`, each image is padded by 4 zeros per side, cropped back at random, and flipped left-right with
    probability 1/2.

    Process `rank` of `ranks` gets an equal share of consecutive samples of each batch; in order of rank, the shares
    are the batch that one process alone would get.

    `image_size`: the side of the images, for a split that reads them while they are needed; None is the split's own.
    How such a stream augments is written there.

    All draws come from (seed, epoch); no global random state is read or written. Raises TypeError or ValueError at the
    call, unless batch_size >= 1, seed >= 0, epoch >= 0, 0 <= start <= batches_per_epoch, 0 <= rank < ranks, and ranks
    divides each batch.
    """
    given: dict[str, Any] = {"start": start, "augment": augment, "drop_last": drop_last, "rank": rank, "ranks": ranks}
    given["image_size"] = image_size
    return ((x, y) for x, y, _ in identified_batches(split, batch_size, seed=seed, epoch=epoch, **given))


def identified_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: bool = False,
    drop_last: bool = True,
    rank: int = 0,
    ranks: int = 1,
    image_size: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Samples]]:
    """Yields x and y, as :func:`batches` does, and which samples of the split they are, on the split's device."""
    _check_split("split", split)
    split = split.of_side(image_size)
    count = batches_per_epoch(split, batch_size, drop_last=drop_last)
    checks.integer("start", start, low=0, high=count)
    checks.flag("augment", augment)
    checks.integer("rank", rank, low=0, high=checks.integer("ranks", ranks, low=1) - 1)
    size = min(batch_size, len(split))
    if size % ranks:
        expected = f"batches that {ranks} processes can share equally"
        raise ValueError(f"batch_size: expected {expected}, got {size} samples; choose a multiple of {ranks}")
    n, device = len(split), split.order_device
    last = n - (count - 1) * size if not drop_last else size
    if last % ranks:
        expected = f"a last batch that {ranks} processes can share equally"
        raise ValueError(f"drop_last: expected True, or {expected}, got False with one of {last} samples")
    drawn_from = checks.integer("seed", seed, low=0), checks.integer("epoch", epoch, low=0)
    draw: dict[str, Any] = {"generator": _on_the_host(derived_seed(*drawn_from)), "device": "cpu"}
    # Drawn for the whole epoch, so that skipped batches skip no draws; the order first, so that it does not depend on
    # the augmentation.
    order = torch.randperm(n, **draw).to(device)
    cropped = augment and split.placed
    offsets = torch.randint(2 * PAD + 1, (2, n) if cropped else (2, 0), **draw).to(device)
    flips = torch.randint(2, (n if cropped else 0,), **draw).bool().to(device)

    def batch(number: int) -> Samples:
        share = (size if number + 1 < count else last) // ranks
        first = number * size + rank * share
        part = slice(first, first + share)
        return Samples(order[part], *((offsets[:, part], flips[part]) if cropped else ()))

    return split.read(map(batch, range(start, count)), drawn_from if augment else None)


def scaled(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1], in channels_last."""
    # Laid out as bytes, of which there are a quarter.
    return images.contiguous(memory_format=torch.channels_last).to(torch.float32).div_(255)
