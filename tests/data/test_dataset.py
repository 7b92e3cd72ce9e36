"""Split, Dataset, the digits, and what `load` does whatever the data set."""

import dataclasses
import sys

import pytest
import torch

from elle_fast.data import NAMES, Dataset, Split, load


def make_split(n=12, channels=3, side=4, classes=3):
    images = torch.randint(256, (n, channels, side, side), generator=torch.Generator().manual_seed(5))
    return Split(images.to(torch.uint8), torch.arange(n) % classes)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_split_has_a_length_and_is_frozen():
    split = make_split(7)
    assert len(split) == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.labels = split.labels + 1


@pytest.mark.parametrize(
    "images,labels,message",
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), r"uint8 \[N, C, H, W\], got torch.float32"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"got torch.uint8 \[2, 3, 3\]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), r"labels must be int64 \[N\], got torch.float32"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int64), r"int64 \[2, 1\]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "2 images, 3 labels"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one image"),
    ],
)
def test_split_rejects_other_tensors(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


def test_split_to_moves_both_tensors():
    moved = make_split().to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"


def test_subset_is_a_fixed_permutation_that_grows_at_its_end():
    split = make_split(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    small, large = split.subset(4), split.subset(12)
    assert torch.equal(large.images, split.images[order])
    assert torch.equal(large.labels, split.labels[order])
    assert torch.equal(small.images, large.images[:4])
    assert torch.equal(small.labels, large.labels[:4])


def test_subset_of_none_is_all_in_order():
    split = make_split()
    assert torch.equal(split.subset(None).images, split.images)


@pytest.mark.parametrize(
    "limit,message",
    [(0, "at least 1, got 0"), (-3, "got -3"), (13, "limit: expected at most the 12 samples of the split, got 13")],
)
def test_subset_rejects_limits_out_of_range(limit, message):
    with pytest.raises(ValueError, match=message):
        make_split(12).subset(limit)


def test_mean_and_std_are_those_of_the_train_pixels():
    train, test = make_split(9), make_split(2)
    dataset = Dataset("made", train, test, ("a", "b", "c"), augment=False)
    pixels = train.images.double().div(255).transpose(0, 1).flatten(1)
    assert dataset.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert dataset.std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-12)


def test_std_of_a_constant_channel_is_floored():
    images = make_split(6).images
    images[:, 1] = 77
    split = Split(images, torch.zeros(6, dtype=torch.int64))
    dataset = Dataset("made", split, split, ("a",), augment=False)
    assert dataset.mean[1] == pytest.approx(77 / 255)
    assert dataset.std[1] == 1e-3
    assert min(dataset.std[0], dataset.std[2]) > 0.1


def test_dataset_rejects_splits_of_different_image_sizes():
    with pytest.raises(ValueError, match=r"made: train images are \[3, 4, 4\] .* test images \[3, 5, 5\]"):
        Dataset("made", make_split(side=4), make_split(side=5), ("a", "b", "c"), augment=False)


def test_digits_are_scaled_and_complete(digits):
    from sklearn.datasets import load_digits

    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.augment is False
    assert digits.train.images.shape[1:] == (1, 8, 8)

    # Every sample is in exactly one of the splits.
    bunch = load_digits()
    pixels = torch.tensor(bunch.images).mul(255).div(16).round().long().flatten(1)
    expected = sorted(torch.cat([pixels, torch.tensor(bunch.target)[:, None]], 1).tolist())
    parts = [torch.cat([s.images.long().flatten(1), s.labels[:, None]], 1) for s in (digits.train, digits.test)]
    assert sorted(torch.cat(parts).tolist()) == expected
    assert digits.train.images.max() == 255


def test_digits_split_is_stratified_and_fixed(digits):
    counts = torch.bincount(torch.cat([digits.train.labels, digits.test.labels]))
    assert digits.test.labels.bincount().tolist() == [round(0.2 * count) for count in counts.tolist()]
    torch.manual_seed(99)
    again = load("digits")
    assert torch.equal(again.test.images, digits.test.images)
    assert torch.equal(again.train.labels, digits.train.labels)


def test_load_limits_are_subsets(digits):
    limited = load("digits", limit=30, test_limit=20)
    assert torch.equal(limited.train.images, digits.train.subset(30).images)
    assert torch.equal(limited.test.labels, digits.test.subset(20).labels)


@pytest.mark.parametrize("limits", [{"limit": 0}, {"test_limit": 0}, {"limit": 10**6}, {"test_limit": 10**6}])
def test_load_rejects_limits_out_of_range(limits):
    with pytest.raises(ValueError, match="limit"):
        load("digits", **limits)


def test_load_rejects_an_unknown_name():
    with pytest.raises(ValueError, match="imagenet") as error:
        load("imagenet")
    assert all(name in str(error.value) for name in NAMES)


def test_digits_take_no_root(tmp_path):
    with pytest.raises(ValueError, match="root must be None"):
        load("digits", tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_all_others_need_a_root(name, tmp_path):
    with pytest.raises(ValueError, match=f"root: expected the path of the files of {name}, got None"):
        load(name)
    with pytest.raises(FileNotFoundError, match=r"absent.* \(looked for "):
        load(name, tmp_path / "absent")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "image-folder"])
def test_image_size_is_for_image_folders(name, tmp_path):
    with pytest.raises(ValueError, match="image_size is for image-folder only, got 8"):
        load(name, None if name == "digits" else tmp_path, image_size=8)


@pytest.mark.parametrize(
    "name,module", [("digits", "sklearn.datasets"), ("svhn", "scipy.io"), ("image-folder", "PIL.Image")]
)
def test_a_missing_library_says_how_to_install_it(name, module, tmp_path, monkeypatch):
    for part in ("train", "test"):
        (tmp_path / f"{part}_32x32.mat").touch()
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.png").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is missing: pip install 'elle-fast\[recipes\]'"):
        load(name, None if name == "digits" else tmp_path)


def test_a_digest_sees_every_part():
    split = make_split(6)
    other = Split(split.images.clone(), split.labels.clone())
    assert split.digest() == other.digest()
    other.images[5, 0, 0, 0] ^= 1
    relabelled = Split(split.images, split.labels.flip(0) + 1)
    parts = [
        Dataset("made", split, split, ("a", "b"), augment=False),
        Dataset("made", other, split, ("a", "b"), augment=False),
        Dataset("made", split, other, ("a", "b"), augment=False),
        Dataset("made", split, relabelled, ("a", "b"), augment=False),
        Dataset("made", split, split, ("a", "c"), augment=False),
    ]
    assert len({dataset.digest() for dataset in parts}) == len(parts)
    assert len({each.digest() for each in (split, other, relabelled)}) == 3
