"""SVHN: tiny MATLAB files come back as written, broken ones are named."""

import numpy as np
import pytest

from elle_fast.data import load


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def write_svhn(folder, part="train", n=4, y=(10, 1, 9, 2), **changes):
    from scipy.io import savemat

    images = pixels(n, 3, 32, 32)
    content = {"X": images.transpose(2, 3, 1, 0), "y": np.array(y, np.uint8)[:, None]} | changes
    savemat(folder / f"{part}_32x32.mat", {key: value for key, value in content.items() if value is not None})
    return images


def test_svhn_round_trip_and_ten_means_zero(tmp_path):
    train = write_svhn(tmp_path)
    test = write_svhn(tmp_path, "test", n=2, y=(3, 10))
    dataset = load("svhn", tmp_path)
    assert np.array_equal(dataset.train.images.numpy(), train)
    assert np.array_equal(dataset.test.images.numpy(), test)
    assert dataset.train.labels.tolist() == [0, 1, 9, 2]
    assert dataset.test.labels.tolist() == [3, 0]
    assert dataset.classes == tuple("0123456789")
    assert dataset.augment is False


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"y": (0, 1, 2, 3)}, r"expected labels in 1 \.\. 10, got 0 \.\. 3"),
        ({"y": (11, 1, 2, 3)}, r"expected labels in 1 \.\. 10, got 1 \.\. 11"),
        ({"y": (1, 2, 3)}, r"labels: expected int64 \[4\] .* got .* \[3\]"),
        ({"X": np.zeros((32, 32, 3, 4))}, "images: expected uint8 .* torch.float64"),
        ({"X": np.zeros((28, 28, 4), np.uint8)}, r"expected X of \[32, 32, 3, N\], got \[28, 28, 4\]"),
        ({"X": None}, "got no X"),
    ],
)
def test_svhn_rejects_other_content(tmp_path, changes, message):
    write_svhn(tmp_path, **changes)
    write_svhn(tmp_path, "test")
    with pytest.raises(ValueError, match=rf"train_32x32\.mat.*{message}"):
        load("svhn", tmp_path)


def test_svhn_rejects_fractional_labels(tmp_path):
    from scipy.io import savemat

    savemat(tmp_path / "train_32x32.mat", {"X": pixels(32, 32, 3, 2), "y": np.array([[1.5], [2.0]])})
    write_svhn(tmp_path, "test")
    with pytest.raises(ValueError, match="expected integers in y, got float64"):
        load("svhn", tmp_path)


def test_svhn_missing_and_broken_files_are_named(tmp_path):
    write_svhn(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test_32x32\.mat"):
        load("svhn", tmp_path)
    whole = (tmp_path / "train_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match=r"test_32x32\.mat \(5000 bytes\): truncated"):
        load("svhn", tmp_path)
