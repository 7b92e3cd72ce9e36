"""Small picture folders that the tests of streams make: JPEGs and PNGs of several sizes, some of an odd kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def encoded(array, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def scene(label, index, height, width):
    """A smooth picture, which a JPEG changes little: brighter by class, with a gradient and a spot of its own."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(1000 * (label + 1) + index)
    base = 40 + 70 * label + 30 * np.stack([x / width, y / height, (x + y) / (width + height)], axis=2)
    spot = 40 * np.exp(
        -((x - rng.uniform(0, width)) ** 2 + (y - rng.uniform(0, height)) ** 2) / (0.02 * height * width)
    )
    return (base + spot[..., None]).clip(0, 255).astype(np.uint8)


def write_scenes(root: Path, train=20, test=8, side=None, kind="PNG", classes=CLASSES):
    """train/ and test/ with so many pictures of each class, of ``side``, or of 20 to 60 pixels a side."""
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                rng = np.random.default_rng(index)
                height, width = (side, side) if side else rng.integers(20, 61, 2).tolist()
                array = scene(label, index + 500 * (part == "test"), height, width)
                (folder / f"{index:03}.{kind.lower()}").write_bytes(encoded(array, kind))
    return root
