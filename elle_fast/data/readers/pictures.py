"""One picture's bytes as 8-bit RGB: its depth scaled, its size bounded, resized and cropped if asked."""

from __future__ import annotations

import io
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXTENSIONS: tuple[str, ...] = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tif",
)
EXTENSIONS += (".tiff", ".webp")
# Pillow goes by content, not by extension; other formats (EPS) would start programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF


def decode(pillow: ModuleType, data: bytes, image_size: int | None) -> Tensor:
    """One image as uint8 RGB [3, H, W]; of one with frames, the first.

    Unsigned samples of up to 16 bits are scaled from their range, [0, 2**bits - 1], to 0..255. ValueError for others
    (signed, 32 bits, floating point), of which no header says the range.
    """
    with pillow.open(io.BytesIO(data), formats=_FORMATS) as file:
        image = _eight_bits(pillow, file)
    if image_size is not None:
        image = _crop_and_resize(pillow, image, image_size)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _eight_bits(pillow: ModuleType, file: Any) -> Any:
    """The image in a mode of 8 bits. Pillow's `convert` would cut 9 to 16 bits off at 255."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    sample_format = tags.get(_SAMPLE_FORMAT, (1,))
    deep = file.mode.startswith("I;16")
    # Netpbm's maxval above 255, which Pillow scales to 16 bits, and PNG's grey of 16 bits in older versions of it.
    deep |= file.mode == "I" and file.format in ("PNG", "PPM")
    if set(sample_format) - {1, 4} or (file.mode[0] in "IF" and not deep):
        kind = {2: "signed", 3: "floating-point"}.get(max(sample_format), "32-bit")
        expected = "expected unsigned samples of at most 16 bits"
        raise ValueError(f"{expected}, got {kind} ones (mode {file.mode}); convert them to 8 bits by their range")
    if not deep:
        return file.convert("RGB")
    most = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(file).astype(np.uint32)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow minds in 8 bits alone
        values = most - values
    return pillow.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))


def _crop_and_resize(pillow: ModuleType, image: Any, side: int) -> Any:
    """The central square, resized to `side` (bilinear, antialiased).

    Cropped first: resized first, a picture of 1 x 8000 would be one of side x 8000 side for a moment.
    """
    shorter = min(image.size)
    left, top = ((length - shorter) // 2 for length in image.size)
    square = image.crop((left, top, left + shorter, top + shorter))
    return square.resize((side, side), pillow.Resampling.BILINEAR)
