"""Which training samples a batch has: their places, and what is kept of them as the images are cropped and flipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elle_fast.data import Samples, Split, batches, identified_batches
from elle_fast.testing import no_host_sync
from tests.helpers import random


def split(count: int = 23) -> Split:
    images = torch.randint(256, (count, 2, 6, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Split(images, torch.arange(count))


def drawn(count: int = 23) -> Samples:
    ((_, _, samples),) = identified_batches(split(count), count, seed=2, epoch=0, augment=True)
    return samples


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_are_the_samples_they_say(augment, ranks):
    given: dict[str, Any] = {"seed": 3, "epoch": 1, "start": 1, "augment": augment, "ranks": ranks, "rank": ranks - 1}
    found = list(identified_batches(split(), 8, **given))
    plain = list(batches(split(), 8, **given))
    assert len(found) == len(plain) == 1
    for (x, y, samples), (x_plain, y_plain) in zip(found, plain, strict=True):
        assert torch.equal(x, x_plain)
        assert torch.equal(y, y_plain)
        assert torch.equal(y, samples.index)  # the labels count the images
        assert torch.equal(samples.placed(split().images[samples.index]), (x * 255).round().to(torch.uint8))
        assert (samples.offsets is None) == (samples.flips is None) == (not augment)


def one_back(frame: Tensor, window: Tensor, top: int, left: int, flip: bool) -> Tensor:
    found = frame.clone()
    channels, height, width = frame.shape
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                row, column = i + top - 4, (width - 1 - j if flip else j) + left - 4
                if 0 <= row < height and 0 <= column < width:
                    found[c, row, column] = window[c, i, j]
    return found


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float64])
def test_windows_go_back_to_where_they_come_from(dtype):
    samples = drawn(40)
    frames, windows = ((200 * random(40, 2, 6, 5, seed=seed) - 100).to(dtype) for seed in (1, 2))
    before = frames.clone()
    with no_host_sync():
        back = samples.put_back(frames, windows)
        placed = samples.placed(back)
    assert samples.offsets is not None
    assert samples.flips is not None
    draws = zip(*samples.offsets.tolist(), samples.flips.tolist(), strict=True)
    expected = [one_back(frame, window, *draw) for frame, window, draw in zip(frames, windows, draws, strict=True)]
    assert back.dtype == placed.dtype == dtype
    assert torch.equal(back, torch.stack(expected))
    assert torch.equal(frames, before)
    # Where the window was inside of the image it comes out again, and elsewhere 0.
    inside = samples.placed(torch.ones_like(frames)) == 1
    assert torch.equal(placed, torch.where(inside, windows, 0))
    assert torch.equal(samples.put_back(frames, samples.placed(frames)), frames)


def test_without_augmentation_both_frames_are_one():
    samples, (one, other) = Samples(torch.arange(3)), (random(3, 4, seed=seed) for seed in (1, 2))
    assert samples.placed(one) is one
    assert samples.put_back(one, other) is other


@pytest.mark.parametrize(
    "given, error, said",
    [
        ((torch.arange(3).int(),), ValueError, r"index: expected int64 \[B\], got .*int32"),
        (([0, 1],), TypeError, r"index: expected int64 \[B\], got \[0, 1\] \(list\)"),
        ((torch.arange(3), torch.zeros(2, 3).long()), ValueError, "offsets, flips: expected both or neither"),
        ((torch.arange(3), torch.zeros(2, 4).long(), torch.ones(3).bool()), ValueError, r"offsets: .*int64 \[2, 3\]"),
        ((torch.arange(3), torch.zeros(3, 3).long(), torch.ones(3).bool()), ValueError, r"offsets: .*int64 \[2, 3\]"),
        ((torch.arange(3), torch.zeros(2, 3).long(), torch.ones(3)), ValueError, r"flips: expected bool \[3\]"),
        ((torch.arange(3), torch.zeros(2, 3).long(), torch.ones(2).bool()), ValueError, r"flips: expected bool \[3\]"),
    ],
)
def test_what_is_no_set_of_samples(given, error, said):
    with pytest.raises(error, match=f"^{said}"):
        Samples(*given)
