"""Image folders and tars of them: same content, same tensors; nothing written; every odd layout named."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast.data import in_order, load
from tests.data.stand_in import write_scenes


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def pixels(name, height=5, width=7):
    """Other pixels for every name."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)


def content(train=(("cat", 4), ("ant", 3), ("bee", 5)), test=(("ant", 2), ("cat", 3)), test_folder="test", **size):
    """File names and bytes; the classes are not in sorted order, ants are class 0, bees 1, cats 2."""
    names = [f"train/{c}/{k:02}.png" for c, n in train for k in range(n)]
    names += [f"{test_folder}/{c}/{k:02}.png" for c, n in test for k in range(n)]
    return {name: png(pixels(name, **size)) for name in names}


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path, files, mode="w"):
    """`files` in the order given; a value may be bytes, or a TarInfo for a member without content."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def load_images(root, **arguments):
    return load("image-folder", root, **arguments)


def assert_same(left, right):
    assert left.classes == right.classes
    for name in ("train", "test"):
        a, b = getattr(left, name), getattr(right, name)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_round_trip_in_the_order_of_class_and_file_name(tmp_path):
    dataset = load_images(write_folder(tmp_path, content()))
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.train.labels.tolist() == [0] * 3 + [1] * 5 + [2] * 4
    assert dataset.test.labels.tolist() == [0] * 2 + [2] * 3
    names = [f"train/{c}/{k:02}.png" for c, n in (("ant", 3), ("bee", 5), ("cat", 4)) for k in range(n)]
    expected = np.stack([pixels(name).transpose(2, 0, 1) for name in names])
    assert np.array_equal(dataset.train.images.numpy(), expected)
    assert np.array_equal(dataset.test.images[2].numpy(), pixels("test/cat/00.png").transpose(2, 0, 1))
    assert (dataset.name, dataset.augment) == ("image-folder", True)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("top", ["", "./", "top/", "./top/"])
def test_a_tar_in_any_order_equals_the_folder(tmp_path, mode, top):
    files = content()
    folder = load_images(write_folder(tmp_path / "folder", files))
    shuffled = {top + name: files[name] for name in sorted(files, key=lambda name: zlib.crc32(name.encode()))}
    assert list(shuffled) != sorted(shuffled)
    tar = write_tar(tmp_path / "data.tar", shuffled, mode)
    assert_same(load_images(tar), folder)
    assert_same(load_images(tar, limit=5, test_limit=2), load_images(tmp_path / "folder", limit=5, test_limit=2))


def test_a_tar_that_lists_its_folders_equals_the_folder(tmp_path):
    write_folder(tmp_path / "folder", content())
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "folder", "top")
    assert_same(load_images(tmp_path / "data.tar"), load_images(tmp_path / "folder"))


def test_order_does_not_split_classes_with_a_common_beginning(tmp_path):
    # As whole paths "a-b/0.png" sorts before "a/0.png", as classes "a" before "a-b".
    files = content(train=(("a-b", 2), ("a", 2)), test=(("a", 1),))
    dataset = load_images(write_folder(tmp_path, files))
    assert dataset.classes == ("a", "a-b")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("limits", [(1, 1), (7, 2), (12, 5), (None, 3), (4, None)])
def test_limits_choose_what_subset_would(tmp_path, limits):
    root = write_folder(tmp_path, content())
    whole, limited = load_images(root), load_images(root, limit=limits[0], test_limit=limits[1])
    for split, got, limit in ((whole.train, limited.train, limits[0]), (whole.test, limited.test, limits[1])):
        assert torch.equal(got.images, split.subset(limit).images)
        assert torch.equal(got.labels, split.subset(limit).labels)
    assert limited.classes == whole.classes


def test_limits_decode_no_more_than_needed(tmp_path):
    files, root = content(), write_folder(tmp_path, content())
    decoded = []
    for name, data in files.items():
        (root / name).write_bytes(b"no image")
        try:
            load_images(root, limit=3, test_limit=2)
        except ValueError as error:
            decoded.append(name in str(error))
        (root / name).write_bytes(data)
    assert (decoded, len(files)) == ([True] * 5, 17)


@pytest.mark.parametrize("limits", [{"limit": 13}, {"test_limit": 6}, {"limit": 0}, {"test_limit": -1}])
def test_limits_out_of_range(tmp_path, limits):
    (number,) = limits.values()
    with pytest.raises(ValueError, match=f"limit.* {number}"):
        load_images(write_folder(tmp_path, content()), **limits)


@pytest.mark.parametrize("test_folder", ["val", "valid"])
def test_other_names_of_the_test_folder(tmp_path, test_folder):
    dataset = load_images(write_folder(tmp_path / test_folder, content(test_folder=test_folder)))
    assert len(dataset.test) == 5


def test_test_wins_over_val(tmp_path):
    write_folder(tmp_path, content())
    write_folder(tmp_path, content(test=(("ant", 1),), test_folder="val"))
    with pytest.warns(UserWarning, match=r"1 image not directly in .* \(val/ant/00\.png\)"):
        assert len(load_images(tmp_path).test) == 5


def test_a_class_may_be_called_train(tmp_path):
    files = content(train=(("train", 2), ("bus", 2)), test=(("train", 1),))
    assert load_images(write_folder(tmp_path, files)).classes == ("bus", "train")


def test_other_files_are_skipped(tmp_path):
    files = content()
    extra = {"README.txt": b"x", "train/cat/notes.txt": b"x", "train/cat/.hidden.png": b"x", "train/.cache/0.png": b"x"}
    extra |= {"train/stray.png": b"x", "__MACOSX/train.txt": b"x", "train/cat/deeper/0.png": b"x"}
    expected = load_images(write_folder(tmp_path / "clean", files))
    for root in (write_folder(tmp_path / "folder", files | extra), write_tar(tmp_path / "data.tar", extra | files)):
        with pytest.warns(UserWarning, match="not read: "):
            assert_same(load_images(root), expected)


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_only_regular_members_are_read(tmp_path, kind):
    member = tarfile.TarInfo("train/cat/99.png")
    member.type, member.linkname = kind, "train/ant/00.png"
    files = content()
    tar = write_tar(tmp_path / "data.tar", files | {member.name: member})
    with pytest.warns(UserWarning, match=r"1 file of a special kind \(train/cat/99\.png\)"):
        assert_same(load_images(tar), load_images(write_folder(tmp_path / "folder", files)))


def test_the_later_of_two_members_of_one_name_counts(tmp_path):
    files = content()
    newer = png(pixels("newer"))
    tar = write_tar(tmp_path / "data.tar", files | {"./train/ant/00.png": newer})
    assert np.array_equal(load_images(tar).train.images[0].numpy(), pixels("newer").transpose(2, 0, 1))


def everything_under(folder):
    return sorted(folder.rglob("*"))


def test_nothing_is_ever_written(tmp_path, monkeypatch):
    work = tmp_path / "outer" / "work"
    work.mkdir(parents=True)
    evil = png(pixels("evil"))
    escapes = [f"{tmp_path}/absolute.png", "../escape.png", "train/../../escape.png", "train/cat/../../../escape.png"]
    escapes += [f"/{name}" for name in ("train/cat/98.png",)]
    files = content()
    tar = write_tar(work / "data.tar.xz", dict.fromkeys(escapes, evil) | files, "w:xz")
    expected = load_images(write_folder(tmp_path / "folder", files))
    monkeypatch.chdir(work)
    before = everything_under(tmp_path)
    with pytest.warns(UserWarning, match=r"5 members named as if outside"):
        assert_same(load_images(tar), expected)
    assert everything_under(tmp_path) == before
    assert not Path("/train/cat/98.png").exists()


@pytest.mark.parametrize("mode,extension", [("L", "png"), ("P", "png"), ("RGBA", "png"), ("1", "bmp"), ("RGB", "JPEG")])
def test_every_mode_becomes_rgb(tmp_path, mode, extension):
    image = Image.fromarray(pixels("x")).convert(mode)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        image.save(tmp_path / part / "a" / f"0.{extension}")
    with Image.open(tmp_path / "train" / "a" / f"0.{extension}") as saved:
        expected = np.array(saved.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(load_images(tmp_path).train.images[0].numpy(), expected)


# Sizes


@pytest.mark.parametrize("other", ["train/bee/01.png", "test/ant/00.png"])
def test_mixed_sizes_are_named(tmp_path, other):
    files = content() | {other: png(pixels(other, height=9, width=4))}
    for root in (write_folder(tmp_path / "folder", files), write_tar(tmp_path / "data.tar", files)):
        with pytest.raises(
            ValueError, match=r"of one size, got .*7x5.*4x9.*image_size|of one size, got .*4x9.*7x5.*image_size"
        ) as error:
            load_images(root)
        assert other in str(error.value)


def test_mixed_sizes_are_resized_and_cropped(tmp_path):
    files = content() | {"train/bee/01.png": png(pixels("x", height=90, width=40))}
    dataset = load_images(write_folder(tmp_path, files), image_size=4)
    assert dataset.train.images.shape == (12, 3, 4, 4)
    assert dataset.test.images.shape == (5, 3, 4, 4)


@pytest.mark.parametrize(
    "height,width,rows,columns", [(4, 8, (0, 4), (2, 6)), (9, 4, (2, 6), (0, 4)), (4, 4, (0, 4), (0, 4))]
)
def test_image_size_of_the_shorter_side_only_crops_the_centre(tmp_path, height, width, rows, columns):
    root = write_folder(tmp_path, content(height=height, width=width))
    got = load_images(root, image_size=4).train.images[0].numpy()
    whole = pixels("train/ant/00.png", height=height, width=width).transpose(2, 0, 1)
    assert np.array_equal(got, whole[:, slice(*rows), slice(*columns)])


def test_image_size_scales_the_whole_shorter_side(tmp_path):
    # Left half black, right half white: the centre square of the shorter side keeps the edge in its middle.
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 20:] = 255
    root = write_folder(tmp_path, {f"{part}/a/0.png": png(array) for part in ("train", "test")})
    image = load_images(root, image_size=10).train.images[0].float()
    assert image.shape == (3, 10, 10)
    assert image[:, :, :4].max() == 0
    assert image[:, :, 6:].min() == 255


@pytest.mark.parametrize("image_size", [0, -1])
def test_image_size_must_be_positive(tmp_path, image_size):
    with pytest.raises(ValueError, match=f"image_size: expected an integer >= 1, got {image_size}"):
        load_images(write_folder(tmp_path, content()), image_size=image_size)


# Errors of layout and content


def without(files, prefix):
    return {name: data for name, data in files.items() if not name.startswith(prefix)}


LAYOUTS = [
    ({}, "expected one train/ folder.* got none"),
    (without(content(), "train/"), "expected one train/ folder.* got none"),
    (without(content(), "test/"), "expected a test/, val/ or valid/ folder beside train/, got none"),
    ({f"{top}/{name}": data for top in "ab" for name, data in content().items()}, "got a/train, b/train"),
    (content() | {"test/dog/0.png": b"x"}, r"expected only classes of train/ in test/, got \['dog'\]"),
    (content() | {"train/dog/notes.txt": b"x"}, r"expected images \(.*\.png.*\), got none in train/dog$"),
    (content() | {"test/bee/notes.txt": b"x"}, r"expected images .* got none in test/bee$"),
    ({"train/0.png": b"x", "test/0.png": b"x"}, "expected class folders in train/, got none"),
    (without(content(), "test/") | {"test/0.png": b"x"}, "expected class folders in test/, got none"),
]


@pytest.mark.parametrize("files,message", LAYOUTS)
def test_other_layouts_are_named(tmp_path, files, message):
    (tmp_path / "folder").mkdir()
    for root in (write_folder(tmp_path / "folder", files), write_tar(tmp_path / "data.tar", files)):
        with pytest.raises(ValueError, match=message):
            load_images(root)


def test_an_empty_class_folder_is_named(tmp_path):
    root = write_folder(tmp_path / "folder", content())
    (root / "train" / "dog").mkdir()
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(root, ".")
    for source in (root, tmp_path / "data.tar"):
        with pytest.raises(ValueError, match=r"in train/dog$"):
            load_images(source)


@pytest.mark.parametrize(
    "data", [b"", b"no image", png(pixels("x"))[:-40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 7\n"]
)
def test_an_unreadable_image_is_named(tmp_path, data):
    files = content() | {"train/bee/02.png": data}
    for root in (write_folder(tmp_path / "folder", files), write_tar(tmp_path / "data.tar", files)):
        with pytest.raises(ValueError, match=rf"train/bee/02\.png \({len(data)} bytes\): truncated, corrupt"):
            load_images(root)


def test_content_of_an_unlisted_format_is_not_decoded(tmp_path):
    # An ICO stands for the formats Pillow would decode by starting a program.
    stream = io.BytesIO()
    Image.fromarray(pixels("x")).save(stream, "ICO")
    root = write_folder(tmp_path, content() | {"train/bee/02.png": stream.getvalue()})
    with pytest.raises(ValueError, match=r"train/bee/02\.png .* cannot identify image"):
        load_images(root)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_truncated_tar_is_named(tmp_path, mode):
    tar = write_tar(tmp_path / "data.tar", content(), mode)
    whole = tar.read_bytes()
    with tarfile.open(tar) as opened:
        opened.getmembers()
        # What is cut off from here on is but zeros of a plain tar, but the checksum of a compressed one.
        end = opened.offset if mode == "w" else len(whole)
    # Steps of less than a block: cuts in headers, in contents, and between members.
    for size in [*range(0, end, max(1, end // 40) | 1), end - 1]:
        tar.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"data\.tar: truncated, corrupt"):
            load_images(tar)


def test_a_tar_cut_between_members_is_named(tmp_path):
    tar = write_tar(tmp_path / "data.tar", content())
    with tarfile.open(tar) as opened:
        cut = opened.getmembers()[-1].offset
    tar.write_bytes(tar.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"end-of-archive block of 512 zero bytes at byte {cut}, got 0 bytes"):
        load_images(tar)


def test_a_damaged_header_does_not_end_the_tar_early(tmp_path):
    tar = write_tar(tmp_path / "data.tar", content())
    with tarfile.open(tar) as opened:
        place = opened.getmembers()[-1].offset
    data = bytearray(tar.read_bytes())
    data[place] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.tar: truncated, corrupt"):
        load_images(tar)


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK\3\4" + bytes(3000))
    with pytest.raises(ValueError, match=r"data\.zip: expected a tar, .* got a zip archive"):
        load_images(tmp_path / "data.zip")


def test_a_list_chooses_the_test_pictures_in_its_order(tmp_path):
    root = write_scenes(tmp_path / "scenes", train=1, test=4, side=8)
    whole = load("image-folder", root)
    listing = tmp_path / "list.txt"
    listing.write_text("val/cat/003.png 2\n\nant/001.png\nelsewhere/test/bee/000.png 1 more\n")
    for stream in ("never", "always"):
        chosen = load("image-folder", root, test_list=listing, stream=stream, workers=0)
        assert chosen.test.labels.tolist() == [2, 0, 1]
        ((x, _),) = in_order(chosen.test, 3)
        expected = whole.test[torch.tensor([11, 1, 4])].images
        assert torch.equal(x, expected / 255.0)
        assert len(chosen.train) == len(whole.train)
    assert chosen.digest() != load("image-folder", root, stream="always", workers=0).digest()
    for text, message in (
        ("ant/009.png", r"test_list: expected the name of one test picture of .*, got 'ant/009\.png' in line 1 of"),
        ("001.png", r"test_list: expected the name of one test picture of .*, got '001\.png' in line 1 of"),
        ("ant/001.png\nx/ant/001.png", r"test_list: expected each picture once, got 'x/ant/001\.png' in line 2 of"),
        ("\n", r"test_list: expected names of test pictures, got none in"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=f"^{message}"):
            load("image-folder", root, test_list=listing)
    with pytest.raises(ValueError, match=r"^test_list: only image-folder takes one, got .* for digits"):
        load("digits", test_list=listing)
    with pytest.raises(FileNotFoundError):
        load("image-folder", root, test_list=tmp_path / "none.txt")
