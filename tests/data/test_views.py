"""What a stream makes of a picture: torchvision's crops, Pillow's pixels, upright, of every depth and mode."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast.data.readers.pictures import decode
from elle_fast.data.views import View, random_box
from tests.data.stand_in import encoded, scene
from tests.optional import import_torchvision


@pytest.fixture(scope="module")
def v2():
    import_torchvision()
    from torchvision.transforms import v2

    return v2


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (33, 33), (200, 9), (9, 200), (1, 1), (7, 1)])
@pytest.mark.parametrize("min_area", [0.08, 0.9])
def test_boxes_are_those_that_torchvision_draws(size, min_area, v2):
    crop = v2.RandomResizedCrop(8, scale=(min_area, 1))
    for seed in range(30):
        box = random_box(size, min_area, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        expected = crop.make_params([torch.zeros(3, size[1], size[0])])
        left, top, right, bottom = box
        assert (top, left, bottom - top, right - left) == tuple(expected[k] for k in ("top", "left", "height", "width"))


def test_a_training_crop_has_the_pixels_of_torchvisions(v2):
    image = Image.fromarray(scene(1, 1, 50, 70))
    view, flips = View(16, crop="resized"), []
    from elle_fast._core.seeds import derived_seed

    for index in range(20):
        found = view.of_training(Image, encoded(np.asarray(image)), (3, 4, index, 0))
        draws = torch.Generator().manual_seed(derived_seed(3, 4, index, 0))
        left, top, right, bottom = random_box((70, 50), 0.08, draws)
        expected = v2.functional.resized_crop(image, top, left, bottom - top, right - left, [16, 16], antialias=True)
        flips.append(bool(torch.rand((), generator=draws) < 0.5))
        expected = v2.functional.horizontal_flip(expected) if flips[-1] else expected
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1  # a rounding, of torch against Pillow
    assert 0 < sum(flips) < 20


def test_a_reduced_decode_is_near_the_whole_one_and_the_same_each_time(monkeypatch):
    picture = encoded(scene(1, 1, 500, 700), "JPEG", quality=95)
    view, drafted = View(24, crop="resized", min_area=0.3), []
    from PIL import JpegImagePlugin

    original = JpegImagePlugin.JpegImageFile.draft

    def draft(file, mode, size):
        original(file, mode, size)
        drafted.append(file.decoderconfig[0])

    whole, reduced = list[Any](), list[Any]()
    for found in (reduced, whole):
        monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft if found is reduced else lambda *given: None)
        for index in range(6):
            found.append(view.of_training(Image, picture, (0, 0, index, 0)).astype(int))
    assert min(drafted) > 1
    assert max(drafted) == 8
    # A smooth picture: what differs is the sampling's place by a part of a pixel, and rounding.
    assert max(np.abs(a - b).mean() for a, b in zip(whole, reduced, strict=True)) < 2
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)
    again = [view.of_training(Image, picture, (0, 0, index, 0)) for index in range(6)]
    assert all(np.array_equal(a, b) for a, b in zip(again, reduced, strict=True))


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (33, 33), (300, 40)])
@pytest.mark.parametrize("side", [7, 28])
def test_a_test_crop_has_the_pixels_of_resize_and_centre_crop(size, side, v2):
    image = Image.fromarray(scene(0, 2, *size))
    found = View(side, crop="resized").of_test(Image, encoded(np.asarray(image)))
    resized = v2.Resize(round(side * 256 / 224), antialias=True)(image)
    expected = np.asarray(v2.CenterCrop(side)(resized)).astype(int)
    # The same samples of the same filter, but for a place of less than half a pixel where the sizes are rounded.
    assert np.abs(found - expected).max() <= (1 if min(size) % 8 == 0 else 8)
    assert np.abs(found - expected).mean() < 1.5


def test_a_padded_view_is_that_in_memory():
    data = encoded(scene(2, 2, 40, 30))
    assert np.array_equal(View(9).of_test(Image, data), decode(Image, data, 9).permute(1, 2, 0).numpy())
    assert np.array_equal(View(9).of_training(Image, data, (1, 2, 3, 0)), View(9).of_test(Image, data))


def test_automatic_augmentation_changes_the_picture_and_no_other_draw(v2):
    data = encoded(scene(2, 2, 40, 30))
    for name in ("randaugment", "randaugment-1-30", "trivialaugment"):
        view = View(16, auto_augment=name)
        torch.manual_seed(5)
        found = [view.of_training(Image, data, (0, 0, index, 0)) for index in range(8)]
        torch.manual_seed(6)
        again = [view.of_training(Image, data, (0, 0, index, 0)) for index in range(8)]
        assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
        assert len({image.tobytes() for image in found}) > 4
        assert np.array_equal(view.of_test(Image, data), View(16).of_test(Image, data))


# Upright, RGB, 8 bits


def turned(array, orientation, kind="JPEG"):
    """What a camera writes that was held so: the pixels that EXIF's orientation turns to the upright array."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    return encoded(np.ascontiguousarray(undo(array)), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_come_out_upright(orientation, kind):
    array = scene(1, 0, 24, 48)
    data = turned(array, orientation, kind)
    most = 0 if kind in ("PNG", "TIFF") else 12  # levels that a codec may lose
    found = View().of_test(Image, data)
    assert found.shape == array.shape
    assert np.abs(found.astype(int) - array).max() <= most
    assert np.array_equal(decode(Image, data, None).permute(1, 2, 0).numpy(), found)
    # A training crop of the whole picture.
    crop = View(16, crop="resized", min_area=1.0)
    upright = crop.of_training(Image, encoded(found), (0, 0, 0, 0))
    assert np.array_equal(crop.of_training(Image, data, (0, 0, 0, 0)), upright)


def test_damaged_exif_is_no_damaged_picture():
    stream = io.BytesIO()
    Image.fromarray(scene(0, 0, 8, 8)).save(stream, "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert View().of_test(Image, stream.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_every_mode_is_rgb(mode):
    image = Image.fromarray(scene(1, 0, 20, 30)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG", **({"quality": 100} if mode == "CMYK" else {}))
    for view in (View(8), View(8, crop="resized")):
        found = view.of_training(Image, stream.getvalue(), (0, 0, 0, 0))
        assert found.shape == (8, 8, 3)
        assert found.dtype == np.uint8
        assert found.std() > 0
    if mode in ("L", "LA", "1"):
        assert np.array_equal(found[..., 0], found[..., 2])


def test_sixteen_bits_are_scaled():
    deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    found = View().of_test(Image, encoded(deep))
    assert np.abs(found[..., 0] - deep / 257).max() <= 0.5 + 1 / 257
    cropped = View(4, crop="resized").of_training(Image, encoded(deep), (0, 0, 0, 0))
    assert cropped.max() > 60


def test_boxes_have_the_area_that_is_asked_for():
    draws = torch.Generator().manual_seed(0)
    areas = [(r - a) * (b - t) / 1e6 for a, t, r, b in (random_box((1000, 1000), 0.25, draws) for _ in range(2000))]
    # Uniform in [0.25, 1], but that large ones may not fit: a mean of a little less than 0.625.
    assert min(areas) >= 0.25 - 1e-3
    assert max(areas) <= 1
    assert math.isclose(np.mean(areas), 0.6, abs_tol=0.05)
