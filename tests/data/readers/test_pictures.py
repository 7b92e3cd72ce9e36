"""Single pictures: every depth is scaled by its range or refused by name, every size is bounded."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast.data import load
from tests.data.readers.test_image_folder import png, write_folder

# From black to white in 16 bits, with values whose high byte is not their rounded scale.
DEEP = np.array([[0, 1, 127, 128, 129, 255], [256, 4095, 32767, 32768, 65407, 65535]], np.uint16)


def read(tmp_path, name, data, **options):
    root = write_folder(tmp_path, {f"{part}/a/{name}": data for part in ("train", "test")})
    return load("image-folder", root, **options).train.images[0]


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pgm(values, most):
    """Binary PGM with samples 0 .. `most`, of two bytes if that is above 255."""
    kind = ">u2" if most > 255 else np.uint8
    return b"P5 %d %d %d\n" % (values.shape[1], values.shape[0], most) + values.astype(kind).tobytes()


def grey_tiff(values, bits=16, white=1, order="<", kind=1):
    """An uncompressed TIFF of one strip, written from the specification: `white` 0 is the photometric WhiteIsZero."""
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        strip = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs.tolist())
    else:
        strip = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, white), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(strip)), (339, kind)]
    start = 8 + len(strip) + len(strip) % 2
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 3, 1) + struct.pack(f"{order}HH", value, 0) for tag, value in tags
    )
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return head + strip.ljust(start - 8, b"\0") + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


TWELVE = DEEP >> 4
FILES = {
    "png": ("0.png", png(DEEP), DEEP / 65535),
    "pgm-16": ("0.pgm", pgm(DEEP, 65535), DEEP / 65535),
    "pgm-12": ("0.pgm", pgm(TWELVE, 4095), TWELVE / 4095),
    "pgm-10": ("0.pgm", pgm(DEEP >> 6, 1023), (DEEP >> 6) / 1023),
    "pgm-4": ("0.pgm", pgm(DEEP >> 12, 15), (DEEP >> 12) / 15),
    "tiff": ("0.tif", grey_tiff(DEEP), DEEP / 65535),
    "tiff-big-endian": ("0.tif", grey_tiff(DEEP, order=">"), DEEP / 65535),
    "tiff-white-is-zero": ("0.tif", grey_tiff(DEEP, white=0), 1 - DEEP / 65535),
    "tiff-12": ("0.tiff", grey_tiff(TWELVE, bits=12), TWELVE / 4095),
    "tiff-8": ("0.tif", grey_tiff((DEEP >> 8).astype(np.uint8), bits=8), (DEEP >> 8) / 255),
    "tiff-8-white-is-zero": ("0.tif", grey_tiff((DEEP >> 8).astype(np.uint8), 8, white=0), 1 - (DEEP >> 8) / 255),
}


@pytest.mark.parametrize("case", FILES)
def test_grey_of_any_depth_is_scaled_by_its_range(case, tmp_path):
    name, data, expected = FILES[case]
    image = read(tmp_path, name, data)
    assert image.shape == (3, 2, 6)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    # Half a level, and a 257th for ranges that Pillow first scales to 16 bits.
    error = np.abs(image[0].numpy() - 255 * expected).max()
    assert error <= 0.5 + 1 / 257


def test_colours_of_16_bits_keep_their_range(tmp_path):
    colour = np.stack([DEEP, DEEP[::-1], DEEP[:, ::-1]], axis=2)
    ppm = b"P6 6 2 65535\n" + colour.astype(">u2").tobytes()
    image = read(tmp_path, "0.ppm", ppm)
    assert np.abs(image.permute(1, 2, 0).numpy() - colour / 257).max() <= 1  # rounded, or the high byte


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(np.full((2, 6), 70000, np.int32)), "TIFF"),
        saved(Image.fromarray(np.full((2, 6), 0.5, np.float32)), "TIFF"),
        grey_tiff(DEEP.view(np.int16), kind=2),
        grey_tiff(DEEP.view(np.int16), kind=2, order=">"),
        grey_tiff((DEEP >> 8).astype(np.uint8), bits=8, kind=2),
    ],
    ids=["int32", "float32", "int16", "int16-big-endian", "int8"],
)
def test_depths_without_a_range_are_refused_by_name(data, tmp_path):
    with pytest.raises(ValueError, match=r"a/0\.tif .*expected unsigned samples of at most 16 bits, got "):
        read(tmp_path, "0.tif", data)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_float_behind_another_extension_is_refused_too(mode, tmp_path):
    data = saved(Image.new(mode, (6, 2)), "TIFF")
    with pytest.raises(ValueError, match="expected unsigned samples of at most 16 bits"):
        read(tmp_path, "0.png", data)


@pytest.mark.parametrize(
    "name,kind", [("0.gif", "GIF"), ("0.jfif", "JPEG"), ("0.jpe", "JPEG"), ("0.pnm", "PPM"), ("0.pbm", "PPM")]
)
def test_further_extensions(name, kind, tmp_path):
    image = read(tmp_path, name, saved(Image.new("1" if name == "0.pbm" else "L", (6, 2), 255), kind))
    assert (image.shape, int(image.min())) == ((3, 2, 6), 255)


# Sizes


@pytest.mark.parametrize("shape", [(1, 8000), (8000, 1), (1, 65500)])
def test_a_thin_picture_is_cropped_before_it_is_resized(shape, tmp_path):
    values = np.zeros(shape, np.uint8)
    values[(shape[0] - 1) // 2, (shape[1] - 1) // 2] = 200
    before = time.process_time()
    image = read(tmp_path, "0.png", png(values), image_size=32)
    assert torch.equal(image, torch.full((3, 32, 32), 200, dtype=torch.uint8))
    assert time.process_time() - before < 1  # resizing the whole takes 32 x 256,000 pixels


@pytest.mark.parametrize("side", [10**6, 10**18])
def test_an_image_size_beyond_memory_is_refused(side, tmp_path):
    with pytest.raises(ValueError, match=r"image_size=.*: expected at most .* GiB, this machine's memory, got "):
        read(tmp_path, "0.png", png(np.zeros((2, 2), np.uint8)), image_size=side)


def test_pictures_beyond_memory_are_refused(tmp_path, monkeypatch):
    from elle_fast.data.readers import limits

    monkeypatch.setattr(limits, "memory", lambda: 2 * 3 * 300 * 300 - 1)
    data = png(np.zeros((300, 300), np.uint8))
    with pytest.raises(
        ValueError, match=r"2 images of 300x300.*: expected at most .* GiB, this machine's memory, got "
    ):
        read(tmp_path, "0.png", data)
    monkeypatch.setattr(limits, "memory", lambda: 2 * 3 * 300 * 300)
    assert read(tmp_path, "0.png", data).shape == (3, 300, 300)


def test_a_picture_that_unpacks_to_gigabytes_is_refused(tmp_path):
    # Pillow's own bound, twice MAX_IMAGE_PIXELS, on what the header says: 20,000 x 20,000 in 50 bytes.
    head = struct.pack(">2I5B", 20000, 20000, 8, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", b""), (b"IEND", b""))
    )
    with pytest.raises(ValueError, match="decompression bomb"):
        read(tmp_path, "0.png", b"\x89PNG\r\n\x1a\n" + chunks)
