"""One picture's bytes as 8-bit RGB: upright, its depth scaled, its size bounded, resized and cropped if asked."""

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
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF
_ORIENTATION = 274  # of EXIF, and of a TIFF
_SIDEWAYS = (5, 6, 7, 8)
# What turns a picture of that orientation upright; 1 is upright.
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270"}
_TURNS |= {7: "TRANSVERSE", 8: "ROTATE_90"}


def decode(pillow: ModuleType, data: bytes, image_size: int | None) -> Tensor:
    """One image as uint8 RGB [3, H, W], upright by its EXIF orientation; of one with frames, the first.

    Unsigned samples of up to 16 bits are scaled from their range, [0, 2**bits - 1], to 0..255. ValueError for others
    (signed, 32 bits, floating point), of which no header says the range.
    """
    with pillow.open(io.BytesIO(data), formats=FORMATS) as file:
        image = upright(pillow, eight_bits(pillow, file), file)
        if image_size is not None:
            image = central_square(pillow, image, image_size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def orientation(file: Any) -> int:
    """EXIF's, 1 to 8; 1 (upright) where it says nothing or something else."""
    try:
        found = file.getexif().get(_ORIENTATION, 1)
    except Exception:  # of a dozen types, for EXIF that is damaged; the picture need not be
        return 1
    return found if found in _TURNS else 1


def turns_sideways(file: Any) -> bool:
    """Whether width and height are exchanged once the picture is upright."""
    return orientation(file) in _SIDEWAYS


def upright(pillow: ModuleType, image: Any, file: Any) -> Any:
    """The image that was read from the file, turned as its EXIF says."""
    # Asked for once it is read: a TIFF is turned by Pillow, which then forgets it; PNG may say it at the file's end.
    turn = _TURNS.get(orientation(file))
    return image if turn is None else image.transpose(getattr(pillow.Transpose, turn))


def eight_bits(pillow: ModuleType, file: Any) -> Any:
    """The image as 8-bit RGB. Pillow's `convert` would cut 9 to 16 bits off at 255."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    sample_format = tags.get(_SAMPLE_FORMAT, (1,))
    deep = file.mode.startswith("I;16")
    # Netpbm's maxval above 255, which Pillow scales to 16 bits, and PNG's grey of 16 bits in older versions of it.
    deep |= file.mode == "I" and file.format in ("PNG", "PPM")
    if set(sample_format) - {1, 4} or (file.mode[0] in "IF" and not deep):
        kind = {2: "signed", 3: "floating-point"}.get(max(sample_format), "32-bit")
        expected = "expected unsigned samples of at most 16 bits"
        raise ValueError(f"{expected}, got {kind} ones (mode {file.mode}); convert them to 8 bits by their range")
    if file.mode == "RGB":
        file.load()
        return file  # which `convert` would copy
    if not deep:
        return file.convert("RGB")
    most = 2 ** tags.get(_BITS, (16,))[0] - 1
    values = np.asarray(file).astype(np.uint32)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow minds in 8 bits alone
        values = most - values
    return pillow.fromarray(((values * 255 + most // 2) // most).astype(np.uint8)).convert("RGB")


def central_square(pillow: ModuleType, image: Any, side: int) -> Any:
    """The central square, resized to `side` (bilinear, antialiased).

    Cropped first: resized first, a picture of 1 x 8000 would be one of side x 8000 side for a moment.
    """
    shorter = min(image.size)
    left, top = ((length - shorter) // 2 for length in image.size)
    square = image.crop((left, top, left + shorter, top + shorter))
    return square.resize((side, side), pillow.Resampling.BILINEAR)
