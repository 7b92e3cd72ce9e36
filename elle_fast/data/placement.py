"""Which training samples a batch has, and how their images were cropped and flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from elle_fast._core import checks

# Zeros on each side of an image before it is cropped.
PAD = 4


@dataclass(frozen=True, eq=False)
class Samples:
    """The training samples of a batch, for methods that keep something for each (``criterion.per_sample``).

    Attributes:
        index: int64 ``[B]``, the samples' places in the training set, each at most once in a batch.
        offsets: int64 ``[2, B]``: the first row and column of each image's window in the image padded by 4 zeros per
            side, in 0 .. 8; ``None``: no image was cropped or flipped.
        flips: bool ``[B]``: whether the window was then flipped left-right. With ``offsets`` or not at all.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    index: Tensor
    offsets: Tensor | None = None
    flips: Tensor | None = None

    def __post_init__(self) -> None:
        _check("index", self.index, torch.int64, 1, None)
        if (self.offsets is None) != (self.flips is None):
            raise ValueError("offsets, flips: expected both or neither, got one of them")
        if self.offsets is not None and self.flips is not None:
            _check("offsets", self.offsets, torch.int64, 2, len(self.index))
            _check("flips", self.flips, torch.bool, 1, len(self.index))

    @classmethod
    def of(cls, value: Any, batch: int, device: torch.device) -> Samples:
        """What a criterion was given as ``samples``, on ``device``: these, or the index alone, of a batch of this size.

        Raises:
            TypeError, ValueError: naming ``samples``, what was expected and what was got.
        """
        found = cls(value) if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 1 else value
        known = isinstance(found, Samples)
        if not known or len(found.index) != batch:
            expected = f"samples: expected the places of {batch} training samples, int64 [{batch}] or data.Samples"
            raise checks.refusal(expected, found.index if known else value, known)
        return found.to(device)

    def to(self, device: torch.device | str) -> Samples:
        """The same samples on ``device``."""
        index = self.index.to(device, non_blocking=True)
        if self.offsets is None or self.flips is None:
            return Samples(index)
        return Samples(index, self.offsets.to(device, non_blocking=True), self.flips.to(device, non_blocking=True))

    def placed(self, frames: Tensor) -> Tensor:
        """What ``[B, C, H, W]`` in the frame of the training images is in that of the batch: cropped and flipped."""
        if self.offsets is None or self.flips is None:
            return frames
        height, width = frames.shape[2:]
        # A view of all windows, of which whole rows are copied: three times as fast as an index for each pixel.
        windows = pad(frames, (PAD,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        sample = torch.arange(len(frames), device=frames.device)
        cropped = windows[sample, :, self.offsets[0], self.offsets[1]]
        return torch.where(self.flips[:, None, None, None], cropped.flip(3), cropped)

    def put_back(self, frames: Tensor, windows: Tensor) -> Tensor:
        """``frames``, with ``windows`` in the place that :meth:`placed` takes them from; what is outside stays."""
        if self.offsets is None:
            return windows
        padded = pad(frames, (PAD,) * 4)
        padded[self._windows(frames)] = windows
        return padded[..., PAD:-PAD, PAD:-PAD]

    def _windows(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The indices of the windows' pixels ``[B, C, H, W]`` in the padded frames."""
        assert self.offsets is not None
        assert self.flips is not None
        batch, channels, height, width = frames.shape
        across = torch.arange(width, device=frames.device)
        rows = self.offsets[0, :, None] + torch.arange(height, device=frames.device)
        columns = self.offsets[1, :, None] + torch.where(self.flips[:, None], across.flip(0), across)
        sample = torch.arange(batch, device=frames.device)[:, None, None, None]
        channel = torch.arange(channels, device=frames.device)[:, None, None]
        return sample, channel, rows[:, None, :, None], columns[:, None, None, :]


def _check(name: str, value: Any, dtype: torch.dtype, rank: int, batch: int | None) -> None:
    size = "B" if batch is None else batch
    known = isinstance(value, Tensor)
    if not known or value.dtype != dtype or value.dim() != rank or batch not in (None, value.shape[-1]):
        shape = f"[{size}]" if rank == 1 else f"[2, {size}]"
        raise checks.refusal(f"{name}: expected {str(dtype).removeprefix('torch.')} {shape}", value, known)
    if rank == 2 and value.shape[0] != 2:
        raise checks.refusal(f"{name}: expected int64 [2, {size}]", value, known)
