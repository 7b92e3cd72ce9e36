"""Batches as a pure function of (split, batch_size, seed, epoch), so that a killed run resumes with the same bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .dataset import Split

_PAD = 4


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Whole batches in the split, or 1 if it is smaller than one. Raises ValueError unless batch_size >= 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return max(1, len(split) // batch_size)


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, start: int = 0, augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields x float32 [B, C, H, W] in [0, 1] and y int64 [B], on the split's device, in an order drawn per epoch.

    The last incomplete batch is dropped, unless the split is smaller than `batch_size`: then one batch has all of it.
    `start` skips that many batches and changes nothing else. With `augment`, each image is padded by 4 zeros per side,
    cropped back at random, and flipped left-right with probability 1/2.

    All draws come from (seed, epoch); no global random state is read or written. Raises ValueError at the call, unless
    batch_size >= 1 and 0 <= start <= batches_per_epoch.
    """
    count = batches_per_epoch(split, batch_size)
    if not 0 <= start <= count:
        raise ValueError(f"start must be in 0 .. {count}, the batches of an epoch, got {start}")
    return _batches(split, batch_size, range(start, count), _seed_of(seed, epoch), augment)


def _seed_of(seed: int, epoch: int) -> int:
    """A seed that two (seed, epoch) pairs share by accident only.

    Hashed to 32 bits, because torch's CPU generator drops the rest of its seed: packing both numbers into 64 bits would
    lose one of them.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=4).digest(), "little")


def _batches(
    split: Split, batch_size: int, indices: range, generator_seed: int, augment: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    device = split.labels.device
    n = len(split)
    generator = torch.Generator().manual_seed(generator_seed)
    # Drawn for the whole epoch at once, so that skipping batches skips no draws. The order comes first, so that it is
    # the same with and without augmentation.
    order = torch.randperm(n, generator=generator).to(device)
    offsets = torch.randint(2 * _PAD + 1, (2, n), generator=generator).to(device)
    flips = torch.randint(2, (n,), generator=generator).bool().to(device)
    for index in indices:
        here = slice(index * batch_size, (index + 1) * batch_size)
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
