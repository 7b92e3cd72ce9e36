"""Streams: the batches of a split in memory, with any number of workers, from any start, shared by any ranks."""

import multiprocessing
import os
import pickle
import tarfile
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast import data
from elle_fast.data.picture_reader import Asked, Corrupt, Reader
from elle_fast.data.streaming import Stream, default_workers
from tests.data.stand_in import encoded, scene, write_scenes

load: Any = data.load  # of options that no checker can follow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


def streamed(root, **options):
    return load("image-folder", root, **{"image_size": 16, "stream": "always", "workers": 0, **options})


def drawn(split, batch_size=8, **options):
    given = {"seed": 3, "epoch": 1, "augment": True, **options}
    return [(x, y, s.index) for x, y, s in data.identified_batches(split, batch_size, **given)]


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_padded_crops_are_those_of_the_same_data_in_memory_to_the_bit(root, workers):
    memory, stream = load("image-folder", root, image_size=16, stream="never"), streamed(root, workers=workers)
    assert stream.streamed
    assert not memory.streamed
    assert memory.classes == stream.classes
    assert_same(drawn(stream.train), drawn(memory.train))
    assert_same(list(data.in_order(stream.test, 5)), list(data.in_order(memory.test, 5)))
    x, _, _ = drawn(stream.train)[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    # Of fewer than 1,024 pictures, the moments are those of all.
    assert (memory.mean, memory.std) == (stream.mean, stream.std)


def test_splits_keep_the_samples_that_those_in_memory_keep(root):
    memory, stream = load("image-folder", root, image_size=16), streamed(root)
    for a, b in zip(memory.train.held_out(9), stream.train.held_out(9), strict=True):
        assert torch.equal(a.labels, b.labels)
        assert_same(list(data.in_order(b, 64)), list(data.in_order(a, 64)))
    limited = streamed(root, limit=7, test_limit=3)
    assert torch.equal(limited.train.labels, memory.train.subset(7).labels)
    assert torch.equal(limited.test.labels, memory.test.subset(3).labels)
    some = stream.train[torch.tensor([5, 2])][1:]
    assert_same(list(data.in_order(some)), list(data.in_order(memory.train[[2]])))


AUGMENTED = {"crop": "resized", "image_size": 24, "auto_augment": "randaugment-2-9"}


@pytest.fixture(scope="module")
def expected(root, torchvision):
    return drawn(streamed(root, **AUGMENTED).train)


@pytest.fixture(scope="module")
def torchvision():
    from tests.optional import import_torchvision

    import_torchvision()


@pytest.mark.parametrize("workers", [1, 3])
def test_augmentation_follows_from_seed_epoch_and_sample_whatever_the_workers(root, expected, workers):
    state = torch.get_rng_state()
    again = drawn(streamed(root, **AUGMENTED, workers=workers).train)
    assert_same(again, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_global_state_is_read_or_written(root, expected):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(drawn(streamed(root, **AUGMENTED).train), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_in_the_middle_goes_on_with_the_next_sample(root, expected, workers):
    stream = streamed(root, **AUGMENTED, workers=workers).train
    assert_same(drawn(stream, start=4), expected[4:])
    assert drawn(stream, start=len(expected)) == []


def test_other_seeds_and_epochs_augment_otherwise_and_each_sample_is_once_in_an_epoch(root, expected):
    train = streamed(root, **AUGMENTED).train
    order = torch.cat([index for _, _, index in expected])
    assert len(order) == len(order.unique()) == len(train) // 8 * 8
    first = {int(i): x for xs, _, index in expected for i, x in zip(index, xs, strict=True)}
    for other in ({"epoch": 2}, {"seed": 4}):
        again = {int(i): x for xs, _, index in drawn(train, **other) for i, x in zip(index, xs, strict=True)}
        common = [not torch.equal(first[i], again[i]) for i in first.keys() & again.keys()]
        assert len(common) > 40
        assert all(common)


def test_ranks_share_each_batch(root, expected):
    train = streamed(root, **AUGMENTED).train
    shares = [drawn(train, rank=rank, ranks=4) for rank in range(4)]
    joined = [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*shares, strict=True)]
    assert_same(joined, expected)


def test_a_batch_of_many_chunks_is_the_same(root, expected, monkeypatch):
    from elle_fast.data import streaming

    monkeypatch.setattr(streaming, "_CHUNK", 3 * 3 * 24 * 24)
    assert_same(drawn(streamed(root, **AUGMENTED, workers=2).train), expected)
    assert_same(drawn(streamed(root, **AUGMENTED).train), expected)


def test_a_side_for_each_phase(root):
    train = streamed(root, **AUGMENTED).train
    x, _, _ = drawn(train, image_size=32)[0]
    assert x.shape == (8, 3, 32, 32)
    again = streamed(root, **{**AUGMENTED, "image_size": 32}).train
    assert_same(drawn(train, image_size=32), drawn(again))
    assert next(data.in_order(train, 4, image_size=40))[0].shape == (4, 3, 40, 40)
    memory = load("image-folder", root, image_size=16).train
    with pytest.raises(
        ValueError, match=r"image_size: expected None, or the side of the images .* got 32 for .* 16x16"
    ):
        drawn(memory, image_size=32)
    assert_same(drawn(memory, image_size=16), drawn(memory))


def test_pictures_of_one_size_need_no_image_size(tmp_path):
    root = write_scenes(tmp_path, train=3, test=2, side=12)
    stream, memory = (load("image-folder", root, stream=how, workers=0) for how in ("always", "never"))
    assert stream.train.in_shape == (3, 12, 12)
    assert_same(drawn(stream.train, 4), drawn(memory.train, 4))
    (root / "test/cat/odd.png").write_bytes(encoded(scene(0, 0, 12, 13)))
    with pytest.raises(ValueError, match=r"test/cat/odd\.png: expected pictures of one size, 12x12 .* got 13x12"):
        list(data.in_order(load("image-folder", root, stream="always", workers=0).test))


def test_pictures_of_several_sizes_need_one(root):
    stream = load("image-folder", root, stream="always", workers=0)
    with pytest.raises(ValueError, match=r"expected pictures of one size, .* give image_size to crop"):
        list(data.in_order(stream.train))


# Which data are read into memory


def test_size_decides_unless_asked(root, monkeypatch):
    from elle_fast.data import picture_sets

    bytes_of_all = (60 + 24) * 3 * 16 * 16
    given = {"image_size": 16, "workers": 0}
    monkeypatch.setattr(picture_sets, "memory", lambda: 4 * bytes_of_all)
    assert not load("image-folder", root, **given).streamed
    monkeypatch.setattr(picture_sets, "memory", lambda: 4 * bytes_of_all - 1)
    assert load("image-folder", root, **given).streamed
    assert not load("image-folder", root, **given, stream="never").streamed
    assert not load("image-folder", root, **given, limit=30, test_limit=8).streamed


def test_what_needs_the_files_streams(root, torchvision):
    for options in ({"crop": "resized"}, {"auto_augment": "trivialaugment"}):
        assert load("image-folder", root, image_size=16, workers=0, **options).streamed
        with pytest.raises(ValueError, match=r"(crop|auto_augment): expected the default .* with stream 'never'"):
            load("image-folder", root, image_size=16, stream="never", **options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"stream": "maybe"}, "stream: expected one of 'auto', 'always', 'never', got 'maybe'"),
        ({"workers": -1}, "workers: expected"),
        ({"skip_corrupt": -1}, "skip_corrupt: expected"),
        ({"crop": "square"}, "crop: expected one of 'pad', 'resized', got 'square'"),
        ({"crop": "resized", "image_size": None}, "image_size: expected the side of the crops with crop 'resized'"),
        ({"min_area": 0.0}, "min_area: expected"),
        ({"auto_augment": "randaugment-2"}, "auto_augment: expected randaugment, .* got 'randaugment-2'"),
        ({"auto_augment": "randaugment-2-31"}, "auto_augment: magnitude: expected"),
        ({"image_size": 10**6}, "image_size=1000000: a picture: expected at most .* memory"),
    ],
)
def test_options_out_of_range(root, options, message, torchvision):
    with pytest.raises(ValueError, match=message):
        streamed(root, **options)


def test_options_of_pictures_are_for_pictures():
    options: dict[str, Any] = {"stream": "always", "crop": "resized", "skip_corrupt": 2, "auto_augment": "x"}
    for option, value in options.items():
        with pytest.raises(ValueError, match=f"{option}: only image-folder, webdataset, .* take one, got"):
            load("digits", **{option: value})


def test_a_stream_has_no_images(root):
    stream = streamed(root).train
    with pytest.raises(AttributeError, match="images: expected a split in memory, got a stream"):
        stream.images  # noqa: B018
    assert str(stream) == f"60 pictures of {root} as 16x16 pixels, read while they are needed by this process"
    assert stream.device.type == "cpu"
    assert data.at_a_time(stream) == 256


@pytest.mark.parametrize("stream", ["always", "never"])
@pytest.mark.parametrize("index", [0, np.int64(1), torch.tensor(2)])
def test_one_number_is_no_index_of_a_split(root, stream, index):
    split = streamed(root, stream=stream).train
    with pytest.raises(
        TypeError, match=r"index: expected an index tensor, a mask or a slice, such as split\[:1\], got"
    ):
        split[index]
    assert len(split[:1]) == len(split[torch.tensor([2])]) == 1


def test_default_workers_leave_a_core_and_are_shared(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert default_workers() == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000)))
    assert default_workers() == 16


# Tars of an image folder


def packed(root, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        tar.add(root, "top")
    return path


def test_members_of_a_plain_tar_are_read_in_any_order(root, tmp_path):
    tar = packed(root, tmp_path / "scenes.tar")
    assert_same(drawn(streamed(tar, workers=2).train), drawn(streamed(root).train))
    assert streamed(tar).train.source.name(3).startswith(f"{tar}: top/train/ant/")
    train = streamed(tar).train
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 3)
    with pytest.raises(ValueError, match=r"scenes\.tar: top/.*: the tar is cut off"):
        list(data.in_order(train))


def test_a_compressed_tar_is_read_into_memory_or_refused(root, tmp_path, monkeypatch):
    from elle_fast.data import picture_sets

    tar = packed(root, tmp_path / "scenes.tar.gz", "w:gz")
    monkeypatch.setattr(picture_sets, "memory", lambda: 0)  # too large for auto, if there were a choice
    assert not load("image-folder", tar, image_size=16).streamed
    for options in ({"stream": "always"}, {"crop": "resized"}, {"skip_corrupt": 1}):
        with pytest.raises(ValueError, match=r"scenes\.tar\.gz: expected an uncompressed tar, to be read in any order"):
            load("image-folder", tar, image_size=16, **options)


# Digests


def test_the_digest_is_of_names_sizes_and_labels(root, tmp_path):
    whole = streamed(root)
    assert whole.digest() == streamed(root, workers=2).digest()
    assert whole.digest().startswith("files-")
    assert whole.digest() != streamed(root, limit=59).digest()
    other = write_scenes(tmp_path / "a")
    assert streamed(other).digest() == whole.digest()
    path = other / "train/bee/004.png"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert streamed(other).digest() == whole.digest()
    path.write_bytes(content + b"0")
    assert streamed(other).digest() != whole.digest()
    path.write_bytes(content)
    path.rename(path.with_name("004b.png"))
    assert streamed(other).digest() != whole.digest()


# Pictures that cannot be read


@pytest.fixture
def broken(tmp_path):
    """Two pictures in a row, and the last one, are broken in three ways."""
    root = write_scenes(tmp_path, train=4, test=2)
    files = [root / f"train/{name}" for name in ("ant/002.png", "ant/003.png", "cat/003.png")]
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_bytes(b"")
    files[2].write_bytes(b"no picture at all")
    return root, [str(file.relative_to(root)) for file in files]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture_is_named(broken, workers):
    root, names = broken
    with pytest.raises(ValueError, match=rf"{root}: train/.*\.png \(\d+ bytes\): truncated, corrupt") as error:
        drawn(streamed(root, workers=workers).train, 4)
    assert any(name in str(error.value) for name in names)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_in_place_of_a_corrupt_picture_comes_the_next_one_that_can_be_read(broken, workers):
    root, names = broken
    stream = streamed(root, workers=workers, skip_corrupt=3).train
    found = list(data.in_order(stream, 5))
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    good = [k for k in range(12) if k not in (2, 3, 11)]
    whole = next(data.in_order(stream[torch.tensor(good)], 12))
    places = [good.index(k) for k in [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]]
    assert torch.equal(x, whole[0][places])
    assert torch.equal(y, whole[1][places])
    news = stream.corrupt.news()
    assert len(news) == 3
    for name in names:
        assert sum(name in line for line in news) == 1
    assert "(3 of at most 3)" in news[-1]
    list(data.in_order(stream, 5))  # each counts once
    assert stream.corrupt.news() == []
    # A sample keeps its place, so that no place is twice in a batch.
    order = torch.cat([index for _, _, index in drawn(stream, 4)])
    assert sorted(order.tolist()) == list(range(12))


def test_the_augmentation_is_that_of_the_place_and_not_of_the_picture_there(broken):
    root, names = broken
    given: dict[str, Any] = {"crop": "resized", "skip_corrupt": 3}
    replaced = drawn(streamed(root, **given).train, 4)
    files = sorted((root / "train").rglob("*.png"))
    for name in names:  # the pictures that can be read, from the broken one on and around the end
        following = files.index(root / name)
        while str(files[following].relative_to(root)) in names:
            following = (following + 1) % len(files)
        (root / name).write_bytes(files[following].read_bytes())
    whole = drawn(streamed(root, **given).train, 4)
    for (x, _, index), (expected, _, expected_index) in zip(replaced, whole, strict=True):
        assert torch.equal(index, expected_index)
        assert torch.equal(x, expected)


def test_an_empty_picture_is_named_without_an_address(tmp_path):
    root = write_scenes(tmp_path, train=2, test=1)
    (root / "train/bee/001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bee/001\.png \(0 bytes\): truncated.*: cannot identify image file$"):
        list(data.in_order(streamed(root).train))


def test_one_more_corrupt_picture_than_are_let_pass_is_an_error(broken):
    root, names = broken
    stream = streamed(root, skip_corrupt=2).train
    with pytest.raises(ValueError, match="3 pictures cannot be read, more than skip_corrupt 2: ") as error:
        list(data.in_order(stream, 5))
    assert all(name in str(error.value) for name in names)


def test_no_picture_that_can_be_read(tmp_path):
    root = write_scenes(tmp_path, train=1, test=1)
    for file in root.glob("train/*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{root}: expected a picture that can be read, got none"):
        list(data.in_order(streamed(root, skip_corrupt=9).train))


def test_corrupt_pictures_are_skipped_in_memory_too(broken):
    root, _ = broken
    stream = next(data.in_order(streamed(root, skip_corrupt=3).train, 12))
    with pytest.warns(UserWarning, match="skipped a picture that cannot be read") as said:
        memory = load("image-folder", root, image_size=16, stream="never", skip_corrupt=3)
    assert len(said) == 3
    assert {warning.filename for warning in said} == {__file__}
    assert torch.equal(next(data.in_order(memory.train, 12))[0], stream[0])


def test_a_file_that_is_gone(tmp_path):
    root = write_scenes(tmp_path, train=2, test=1)
    stream = streamed(root).train
    (root / "train/bee/001.png").unlink()
    with pytest.raises(OSError, match=r"train/bee/001\.png"):
        list(data.in_order(stream))


def test_a_ledger_counts_each_name_once():
    ledger = Corrupt(1)
    ledger.add(("a", ValueError("a: broken")))
    ledger.add(("a", ValueError("a: broken")))
    with pytest.raises(OSError, match=r"b: gone \(2 pictures cannot be read, more than skip_corrupt 1: a, b\)"):
        ledger.add(("b", OSError("b: gone")))


# Worker processes


def test_workers_end_with_their_batches(root):
    before = multiprocessing.active_children()
    batches = data.identified_batches(streamed(root, workers=2).train, 4, seed=0, epoch=0)
    next(batches)
    assert len(multiprocessing.active_children()) == len(before) + 2
    del batches
    assert {*multiprocessing.active_children()} == {*before}


def test_workers_end_where_a_picture_is_corrupt(broken):
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match="truncated, corrupt") as error:
        drawn(streamed(broken[0], workers=2).train, 4)
    assert {*multiprocessing.active_children()} == {*before}
    del error


def test_nothing_is_read_before_the_first_batch_is_wanted(root, monkeypatch):
    monkeypatch.setattr(Stream, "raw", lambda *given: 1 / 0)
    batches = data.identified_batches(streamed(root).train, 4, seed=0, epoch=0)
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_source_can_be_sent_to_a_process(root):
    source = streamed(root).train.source
    again = pickle.loads(pickle.dumps(source))
    assert again.read(7) == source.read(7)
    assert (again.name(7), again.digest()) == (source.name(7), source.digest())


def test_workers_can_be_processes_that_are_not_forked(root, torchvision):
    stream = streamed(root, **AUGMENTED).train
    reader = Reader(stream.source, stream.view, stream.rows, in_shape=stream.in_shape, allowed=0)
    asked = Asked(torch.arange(5).numpy(), (1, 2))
    again = pickle.loads(pickle.dumps(reader))
    assert torch.equal(again[asked].images, reader[asked].images)


def test_labels_go_with_the_pictures_of_any_index(root):
    """Also of as many as there are, the first of which is the first."""
    whole = streamed(root).train
    order = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(len(whole) - 1) + 1])
    permuted = whole[order]
    assert torch.equal(permuted.labels, whole.labels[order])
    assert not torch.equal(permuted.labels, whole.labels)
    (x, y), *_ = data.in_order(permuted, len(whole))
    (all_x, all_y), *_ = data.in_order(whole, len(whole))
    assert torch.equal(y, all_y[order])
    assert torch.equal(x, all_x[order])
