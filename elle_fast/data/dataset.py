"""What every reader returns: the images and labels of two splits, held as plain tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MIN_STD = 1e-3


def choose(n: int, limit: int | None) -> Tensor:
    """Which of `n` samples a limited split keeps, and in which order: int64 [limit], or 0 .. n-1 for None.

    The permutation is fixed (seed 0), so that runs with different training seeds see the same subset, and a smaller
    limit a prefix of a larger one. Raises ValueError unless 1 <= limit <= n.
    """
    if limit is None:
        return torch.arange(n)
    if limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    if limit > n:
        raise ValueError(f"limit: expected at most the {n} samples of the split, got {limit}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit]


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images of one size: images uint8 [N, C, H, W], labels int64 [N], N >= 1, on one device.

    Raises ValueError if the tensors are not of that form.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise ValueError(f"labels must be int64 [N], got {self.labels.dtype} {list(self.labels.shape)}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"expected one label per image, got {len(self.images)} images, {len(self.labels)} labels")
        if len(self.images) == 0:
            raise ValueError("a split needs at least one image, got none")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`; nothing is copied if it is there already."""
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, limit: int | None) -> Split:
        """The first `limit` samples after one fixed permutation, independent of the training seed; None is all.

        Raises ValueError unless 1 <= limit <= N.
        """
        if limit is None:
            return self
        kept = choose(len(self), limit).to(self.labels.device)
        return Split(self.images[kept], self.labels[kept])

    def digest(self) -> str:
        """A fingerprint of the images and labels, so that what belongs to them is not taken for that of others."""
        return _digest(b"", self)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits over the same classes. `augment` says whether random crop and flip is the standard recipe.

    Raises ValueError if the two splits differ in [C, H, W].
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    augment: bool

    def __post_init__(self) -> None:
        train, test = list(self.train.images.shape[1:]), list(self.test.images.shape[1:])
        if train != test:
            raise ValueError(f"{self.name}: train images are {train} (C, H, W), but test images {test}")

    def digest(self) -> str:
        """A fingerprint of the class names and of all images and labels."""
        return _digest("\0".join(self.classes).encode(), self.train, self.test)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of train.images / 255, each in [0, 1]."""
        return tuple(self._moments[0].tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation of train.images / 255 (divided by the count), at least 1e-3.

        The floor keeps a constant channel from dividing by zero.
        """
        return tuple(self._moments[1].tolist())

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and floored standard deviation, float64 [C] each.

        From histograms: exact for any number of pixels, and without a floating-point copy of the images.
        """
        channels = self.train.images.unbind(1)
        counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).double()
        weights = counts / counts.sum(1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64, device=counts.device) / 255
        mean = weights @ values
        variance = (weights * (values - mean[:, None]).square()).sum(1)
        return mean, variance.sqrt().clamp_min(_MIN_STD)


def _digest(start: bytes, *splits: Split) -> str:
    digest = hashlib.blake2b(start, digest_size=16)
    for split in splits:
        for tensor in (split.images, split.labels):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
