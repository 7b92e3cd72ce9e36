"""What a stream makes of a picture's bytes: a crop of one size, in training a random one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from elle_fast._core import checks
from elle_fast._core.seeds import derived_seed
from elle_fast.data.readers.decoding import optional
from elle_fast.data.readers.pictures import FORMATS, central_square, eight_bits, turns_sideways, upright

CROPS = ("pad", "resized")
# Shorter side of a test picture to side of its crop, as in 256 to 224.
_MARGIN = 256 / 224
_RATIOS = 3 / 4, 4 / 3
_ATTEMPTS = 10


@dataclass(frozen=True)
class View:
    """How a picture is cut and augmented.

    - ``pad``: its central square, resized to ``image_size``, as in memory. In training the batch is padded by 4 zeros a
      side, cropped back and flipped, as it is in memory (and on the device).
    - ``resized``: in training a random rectangle of ``min_area`` to 1 of its area and of 3:4 to 4:3, resized to a
      square, and flipped with probability 1/2: the distribution of torchvision's RandomResizedCrop. A JPEG is decoded
      at 1/2, 1/4 or 1/8 where the rectangle still has the pixels. In tests the shorter side is resized to 8/7 of
      ``image_size``, and the central square of that is taken (256 and 224).

    Pictures are 8-bit RGB and upright, whatever their depth, mode and EXIF say. Resizing is bilinear and antialiased,
    by Pillow, and of random rectangles by torch, whose pixels may differ by a level between instruction sets.

    Attributes:
        image_size: side of the result, >= 1; ``None``, with ``pad`` only: pictures stay as they are, all of one size.
        crop: of :data:`CROPS`.
        min_area: in (0, 1].
        auto_augment: ``randaugment`` (2 operations of magnitude 9), ``randaugment-OPERATIONS-MAGNITUDE`` or
            ``trivialaugment``, those of torchvision.transforms.v2, in training; ``None``: none.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what was got.
        ImportError: without torchvision, for ``auto_augment``.
    """

    image_size: int | None = None
    crop: str = "pad"
    min_area: float = 0.08
    auto_augment: str | None = None

    def __post_init__(self) -> None:
        if self.image_size is not None:
            checks.integer("image_size", self.image_size, low=1)
        checks.real("min_area", self.min_area, low=0, high=1, low_allowed=False)
        if checks.choice("crop", self.crop, CROPS) == "resized" and self.image_size is None:
            raise ValueError("image_size: expected the side of the crops with crop 'resized', got None")
        if self.auto_augment is not None:
            _augmentation(self.auto_augment)

    @property
    def changes_pixels(self) -> bool:
        """Whether training does more to a picture than the crop and flip of ``pad``."""
        return self.crop != "pad" or self.auto_augment is not None

    def of_test(self, pillow: ModuleType, data: bytes) -> NDArray[np.uint8]:
        """A picture's [H, W, 3], without augmentation."""
        with pillow.open(io.BytesIO(data), formats=FORMATS) as file:
            return np.asarray(self._cut(pillow, upright(pillow, eight_bits(pillow, file), file)))

    def of_training(self, pillow: ModuleType, data: bytes, seeds: tuple[int, ...]) -> NDArray[np.uint8]:
        """A picture's [H, W, 3] with the augmentation that ``seeds`` stand for, whatever was drawn before."""
        if not self.changes_pixels:
            return self.of_test(pillow, data)
        draws = torch.Generator("cpu").manual_seed(derived_seed(*seeds))
        with pillow.open(io.BytesIO(data), formats=FORMATS) as file:
            if self.crop == "resized":
                pixels = self._random_crop(pillow, file, draws)
                if self.auto_augment is None:
                    return pixels
                image = pillow.fromarray(pixels)
            else:
                image = self._cut(pillow, upright(pillow, eight_bits(pillow, file), file))
            if self.auto_augment is not None:
                with _drawing_from(derived_seed(*seeds, 1)):
                    image = _augmentation(self.auto_augment)(image)
            return np.asarray(image)

    def _cut(self, pillow: ModuleType, image: Any) -> Any:
        side = self.image_size
        if side is None:
            return image
        if self.crop == "pad":
            return central_square(pillow, image, side)
        # Cut and resized at once: resized first, a picture of 1 x 8000 would be one of side x 8000 side for a moment.
        # Pillow's antialiasing looks over the box's edges, so the pixels are those of resizing first.
        shorter = min(image.size)
        longer = [int(_MARGIN * side * length / shorter) for length in image.size]
        starts = [round((length - side) / 2) for length in longer]
        scales = [have / length for have, length in zip(image.size, longer, strict=True)]
        (left, top), (across, down) = starts, scales
        box = (left * across, top * down, (left + side) * across, (top + side) * down)
        return image.resize((side, side), pillow.Resampling.BILINEAR, box=box)

    def _random_crop(self, pillow: ModuleType, file: Any, draws: torch.Generator) -> NDArray[np.uint8]:
        side, size, box = self.image_size, file.size, None
        assert side is not None
        if file.format == "JPEG":
            size = size[::-1] if turns_sideways(file) else size
            box = random_box(size, self.min_area, draws)
            # Of the crop, at least as many pixels as are wanted stay.
            reduced = max(1, min(box[2] - box[0], box[3] - box[1]) // side)
            file.draft(None, (max(1, file.size[0] // reduced), max(1, file.size[1] // reduced)))
        image = upright(pillow, eight_bits(pillow, file), file)
        if box is None:
            size = image.size
            box = random_box(size, self.min_area, draws)
        if image.size != size:  # a reduced one
            scaled = [round(place * image.size[k % 2] / size[k % 2]) for k, place in enumerate(box)]
            left, top = (min(scaled[k], image.size[k] - 1) for k in (0, 1))
            box = left, top, max(left + 1, scaled[2]), max(top + 1, scaled[3])
        found = _resized(torch.from_numpy(np.array(image.crop(box))), side)
        flipped = torch.rand((), generator=draws, device="cpu") < 0.5
        return (found.flip(1) if flipped else found).numpy()


def _resized(image: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 [H, W, 3] as [side, side, 3], bilinear and antialiased."""
    height, width, channels = image.shape
    # A fifth of Pillow's time with AVX2, and the same but for a rounding. These strides, which say channels_last for a
    # batch of one, choose the kernel that has it.
    batch = image.as_strided((1, channels, height, width), (height * width * channels, 1, width * channels, channels))
    found = torch.nn.functional.interpolate(batch, size=(side, side), mode="bilinear", antialias=True)
    return found[0].permute(1, 2, 0)


def random_box(size: tuple[int, int], min_area: float, draws: torch.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random rectangle, from the draws of torchvision's RandomResizedCrop.

    Its area is uniform in [min_area, 1] of the picture's, the logarithm of its ratio in that of [3/4, 4/3]. If ten such
    do not fit, the largest central one whose ratio is in that range.
    """
    (width, height), logs = size, [math.log(ratio) for ratio in _RATIOS]

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(1, device="cpu").uniform_(low, high, generator=draws)

    for _ in range(_ATTEMPTS):
        wanted = width * height * uniform(min_area, 1).item()
        ratio = uniform(*logs).exp().item()
        w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=draws, device="cpu"))
            left = int(torch.randint(width - w + 1, (1,), generator=draws, device="cpu"))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _RATIOS[1])))
    h = min(height, max(1, round(width / _RATIOS[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@cache
def _augmentation(name: str) -> Callable[[Any], Any]:
    """A transform of torchvision's, by name."""
    numbers = re.fullmatch(r"randaugment(?:-(\d+)-(\d+))?", name)
    if numbers is None and name != "trivialaugment":
        expected = "expected randaugment, randaugment-OPERATIONS-MAGNITUDE or trivialaugment"
        raise ValueError(f"auto_augment: {expected}, got {checks.shown(name)}")
    if numbers is not None and numbers[1] is not None:
        checks.integer("auto_augment: operations", int(numbers[1]), low=1, high=16)
        checks.integer("auto_augment: magnitude", int(numbers[2]), low=0, high=30)
    v2 = optional("torchvision.transforms.v2", "streaming")
    if numbers is None:
        made: Callable[[Any], Any] = v2.TrivialAugmentWide()
        return made
    made = v2.RandAugment(*(() if numbers[1] is None else (int(numbers[1]), int(numbers[2]))))
    return made


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """torch's default generator of the CPU, from which torchvision draws, seeded inside and as it was behind."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
