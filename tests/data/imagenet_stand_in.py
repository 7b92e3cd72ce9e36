"""A folder with ImageNet's form: 100 classes, pictures of 50 to 800 pixels a side, a few of an odd kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 100
ROTATED = 6  # EXIF's number for a picture that a viewer turns by 90 degrees clockwise
ORIENTATION = 0x0112


def picture(seed: int) -> Image.Image:
    """Smooth, so that it takes few bytes: 50 to 800 pixels a side, most of them small."""
    rng = np.random.default_rng(seed)
    sides = [800, 50] if seed % 25 == 7 else rng.integers(50, 250, 2).tolist()
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(sides, Image.Resampling.BILINEAR)


def written(seed: int) -> tuple[str, bytes]:
    """A file's ending and bytes; one in five is grey, CMYK, of 16 bits, or turned by its EXIF entry."""
    image, file, kind = picture(seed), io.BytesIO(), seed % 20
    if kind == 12:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(file, "PNG")
        return "PNG", file.getvalue()
    exif = Image.Exif()
    if kind == 16:
        exif[ORIENTATION] = ROTATED
    mode = {4: "L", 8: "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(file, "JPEG", quality=85, exif=exif)
    return "JPEG", file.getvalue()


def write(root: Path, train: int = 1, val: int = 1) -> Path:
    """train/<class>/ and val/<class>/ with so many pictures of each class."""
    for part, count in (("train", train), ("val", val)):
        for label in range(CLASSES):
            folder = root / part / f"n{10_000_000 + label}"
            folder.mkdir(parents=True)
            for index in range(count):
                seed = CLASSES * index + label + 50_000 * (part == "val")
                ending, content = written(seed)
                (folder / f"{folder.name}_{index}.{ending}").write_bytes(content)
    return root
