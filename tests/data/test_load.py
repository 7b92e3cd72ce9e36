"""The digits, and what `load` does whatever the data set."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elle_fast.data import NAMES, load, of_pictures


@pytest.fixture(scope="module")
def digits():
    return load("digits")


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


def test_digits_do_not_depend_on_the_default_device(digits):
    with torch.device("meta"):
        again = load("digits", limit=30)
    assert torch.equal(again.train.images, digits.train.subset(30).images)
    assert again.test.digest() == digits.test.digest()


def test_load_limits_are_subsets(digits):
    limited = load("digits", limit=30, test_limit=20)
    assert torch.equal(limited.train.images, digits.train.subset(30).images)
    assert torch.equal(limited.test.labels, digits.test.subset(20).labels)


@pytest.mark.parametrize("limits", [{"limit": 0}, {"test_limit": 0}, {"limit": 10**6}, {"test_limit": 10**6}])
def test_load_rejects_limits_out_of_range(limits):
    with pytest.raises(ValueError, match="limit"):
        load("digits", **limits)


def test_load_rejects_an_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected one of .* got 'imagenet'") as error:
        load("imagenet")
    assert all(name in str(error.value) for name in NAMES)


def test_digits_take_no_root(tmp_path):
    with pytest.raises(ValueError, match="root: expected None, as digits come with scikit-learn, got"):
        load("digits", tmp_path)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_all_others_need_a_root(name, tmp_path):
    with pytest.raises(ValueError, match=f"root: expected the path of the files of {name}, got None"):
        load(name)
    with pytest.raises(FileNotFoundError, match=r"absent.*: expected .*, got nothing there"):
        load(name, tmp_path / "absent")


@pytest.mark.parametrize("root", [5, b"data", True])
def test_a_root_that_is_no_path(root):
    with pytest.raises(TypeError, match=rf"root: expected a path, got {root!r} \({type(root).__name__}\)"):
        load("cifar10", root)


def test_an_empty_root_is_not_the_current_folder():
    with pytest.raises(ValueError, match="root: expected the path of the files of cifar10, got ''"):
        load("cifar10", "")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_root_may_be_a_string(kind, tmp_path):
    np.savez(
        tmp_path / "m.npz",
        **{f"{a}_{b}": np.zeros((2, 3, 3)[: 3 if a == "x" else 1], np.uint8) for a in "xy" for b in ("train", "test")},  # type: ignore[arg-type]
    )
    assert len(load("mnist", kind(tmp_path / "m.npz")).train) == 2


@pytest.mark.parametrize("name", [name for name in NAMES if not of_pictures(name) and name != "digits"])
def test_image_size_is_for_pictures_and_digits(name, tmp_path):
    with pytest.raises(ValueError, match=r"image_size: only image-folder, .* take one, got 8"):
        load(name, tmp_path, image_size=8)


def test_digits_are_enlarged_between_their_pixels(digits):
    found = load("digits", image_size=24)
    assert torch.equal(found.train.labels, digits.train.labels)
    assert found.test.images.shape == (len(digits.test), 1, 24, 24)
    assert torch.equal(found.test.images[:, :, 1::3, 1::3], digits.test.images)  # the middles of three by three
    upper, lower = digits.test.images[:, :, :-1].double(), digits.test.images[:, :, 1:].double()
    assert torch.equal(found.test.images[:, :, 2:-3:3, 1::3], ((2 * upper + lower) / 3).round().byte())
    assert torch.equal(load("digits", image_size=8).test.images, digits.test.images)


def test_digits_are_not_made_smaller_or_larger_than_memory():
    with pytest.raises(ValueError, match="image_size: expected an integer >= 8, got 7"):
        load("digits", image_size=7)
    with pytest.raises(ValueError, match=r"image_size=10000000: 1797 images: expected at most .* memory, got"):
        load("digits", image_size=10**7)


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


def test_readers_are_imported_where_they_are_used():
    script = "import sys, elle_fast.data as d; before = {*sys.modules}; d.load('digits'); print(*before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before = set(done.stdout.split())
    assert "elle_fast.data.memory" in before
    assert not {"elle_fast.data.readers.digits", "scipy", "sklearn", "PIL"} & before
