"""scikit-learn's embedded handwritten digits: 1,797 grey images of 8x8, nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from elle_fast._core import checks
from elle_fast.data.memory import Dataset
from elle_fast.data.readers.decoding import DIGITS, optional, split_of
from elle_fast.data.readers.limits import fits_memory

_SIDE = 8
_TEST_FRACTION = 0.2


def read(name: str, root: Path, image_size: int | None = None) -> Dataset:
    """Pixels 0..16 are scaled to 0..255 and rounded; the 80/20 split is fixed and stratified. No `root` is read.

    `image_size`: pixels a side, at least the 8 there are, to which the images are then enlarged by bilinear
    interpolation, and rounded. ValueError for fewer, and for more than fit into memory.
    """
    if image_size is not None:
        checks.integer("image_size", image_size, low=_SIDE)
    bunch = optional("sklearn.datasets").load_digits()
    pixels = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)[:, None]
    if image_size is not None:
        fits_memory(f"image_size={image_size}: {len(pixels)} images", 8 * len(pixels) * image_size**2)  # as float64
        enlarged = F.interpolate(torch.from_numpy(pixels).double(), (image_size, image_size), mode="bilinear")
        pixels = enlarged.round().to(torch.uint8).numpy()
    everything = split_of(pixels, np.asarray(bunch.target), len(DIGITS), "scikit-learn's digits")
    in_test = _stratified(everything.labels)
    train, test = everything[~in_test], everything[in_test]
    return Dataset(name, train, test, DIGITS, augment=False)


def _stratified(labels: torch.Tensor) -> torch.Tensor:
    """The test samples, bool [N]: the same fraction of each class, drawn with seed 0."""
    # Not by scikit-learn, whose version the split would depend on.
    generator = torch.Generator("cpu").manual_seed(0)
    in_test = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(len(DIGITS)):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator, device="cpu")
        in_test[members[order[: round(_TEST_FRACTION * len(members))]]] = True
    return in_test
