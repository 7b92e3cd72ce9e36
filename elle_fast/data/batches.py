"""Batches as a pure function of (split, batch_size, seed, epoch), so that a killed run resumes with the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from elle_fast._core.seeds import derived_seed
from elle_fast.data.dataset import Split

_PAD = 4


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in the split, or 1 if it is smaller than one. Raises ValueError unless batch_size >= 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return max(1, len(split) // batch_size)


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    start: int = 0,
    augment: bool = False,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x float32 [B, C, H, W] in [0, 1] and y int64 [B], on the split's device, in an order drawn per epoch.

    The last incomplete batch is dropped, unless the split is smaller than `batch_size`: then one batch has all of it.
    `start` skips that many batches and changes nothing else. With `augment`, each image is padded by 4 zeros per side,
    cropped back at random, and flipped left-right with probability 1/2.

    Of each batch, process `rank` of `ranks` gets its share of consecutive samples, of the same size for all: together,
    in order of rank, they are the batch that one process alone would get.

    All draws come from (seed, epoch); no global random state is read or written. Raises ValueError at the call, unless
    batch_size >= 1, 0 <= start <= batches_per_epoch, 0 <= rank < ranks, and ranks divides the samples of a batch.
    """
    count = batches_per_epoch(split, batch_size)
    if not 0 <= start <= count:
        raise ValueError(f"start must be in 0 .. {count}, the batches of an epoch, got {start}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank must be in 0 .. {ranks - 1}, got {rank}")
    size = min(batch_size, len(split))
    if size % ranks:
        raise ValueError(
            f"batch_size: expected batches that {ranks} processes can share equally, got {size} samples: "
            f"choose a multiple of {ranks}"
        )
    share = size // ranks
    starts = range(start * size + rank * share, count * size, size)
    return _batches(split, [slice(first, first + share) for first in starts], derived_seed(seed, epoch), augment)


def _batches(split: Split, places: list[slice], generator_seed: int, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
    device = split.labels.device
    n = len(split)
    generator = torch.Generator().manual_seed(generator_seed)
    # Drawn for the whole epoch at once, so that skipping batches skips no draws. The order comes first, so that it is
    # the same with and without augmentation.
    order = torch.randperm(n, generator=generator).to(device)
    offsets = torch.randint(2 * _PAD + 1, (2, n), generator=generator).to(device)
    flips = torch.randint(2, (n,), generator=generator).bool().to(device)
    for here in places:
        images = split.images[order[here]]
        if augment:
            images = _crop_and_flip(images, offsets[:, here], flips[here])
        yield images.to(torch.float32).div_(255), split.labels[order[here]]


def _crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Windows of the zero-padded images [B, C, H, W]: `offsets` int64 [2, B] in 0..8 (top, left), `flips` bool [B]."""
    batch, channels, height, width = images.shape
    padded = pad(images, (_PAD, _PAD, _PAD, _PAD))
    across = torch.arange(width, device=images.device)
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    columns = offsets[1, :, None] + torch.where(flips[:, None], across.flip(0), across)
    sample = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
