"""MNIST: tiny idx and npz files come back as written, broken ones are named, pickles are refused."""

import gzip
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from elle_fast.data import load
from elle_fast.data.readers import limits


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


class _Bomb:
    """A pickle of this runs code when loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def write_idx(file, array, magic=None, sizes=None):
    sizes = array.shape if sizes is None else sizes
    data = struct.pack(f">{1 + len(sizes)}I", 2048 + array.ndim if magic is None else magic, *sizes) + array.tobytes()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


def write_mnist(folder, suffix=""):
    """Images of 5x4, to tell height from width."""
    train, test = pixels(6, 5, 4), pixels(2, 5, 4, seed=1)
    for part, images, labels in (("train", train, [0, 9, 1, 8, 2, 7]), ("t10k", test, [3, 6])):
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.array(labels, np.uint8))
    return train, test


def check_mnist(dataset, written):
    train, test = written
    assert np.array_equal(dataset.train.images.numpy(), train[:, None])
    assert np.array_equal(dataset.test.images.numpy(), test[:, None])
    assert dataset.train.labels.tolist() == [0, 9, 1, 8, 2, 7]
    assert dataset.test.labels.tolist() == [3, 6]
    assert dataset.classes == tuple("0123456789")
    assert dataset.augment is False


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_from_idx_files(tmp_path, suffix):
    written = write_mnist(tmp_path, suffix)
    check_mnist(load("mnist", tmp_path), written)


def npz_arrays():
    train, test = pixels(6, 5, 4), pixels(2, 5, 4, seed=1)
    return {
        "x_train": train,
        "y_train": np.array([0, 9, 1, 8, 2, 7], np.uint8),
        "x_test": test,
        "y_test": np.array([3, 6], np.uint8),
    }


def test_mnist_from_npz(tmp_path):
    arrays = npz_arrays()
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)
    check_mnist(load("mnist", tmp_path / "mnist.npz"), (arrays["x_train"], arrays["x_test"]))


def test_mnist_missing_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda data: data[:-1], "expected 136 bytes for the sizes .* got 135"),
        (lambda data: data + b"x", "expected 136 bytes for the sizes .* got 137 or more"),
        (lambda data: data[:9], "expected a header of 16 bytes, got 9"),
        (lambda data: b"\0\0\x08\1" + data[4:], "expected the magic number 2051, got 2049"),
        (lambda data: struct.pack(">4I", 2051, 2**31, 2**31, 2**31), r"expected \d+ bytes for .* got 16$"),
    ],
)
def test_mnist_broken_idx_is_named(tmp_path, change, message):
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: {message}"):
        load("mnist", tmp_path)


def test_mnist_truncated_gz_is_named(tmp_path):
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz \(\d+ bytes\): truncated"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "labels,message",
    [([1, 2], r"labels: expected int64 \[6\] .* got .* \[2\]"), ([1, 2, 3, 4, 5, 10], r"\[0, 10\), got 1 \.\. 10")],
)
def test_mnist_rejects_labels(tmp_path, labels, message):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.array(labels, np.uint8))
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"y_test": None}, "got no y_test"),
        ({"x_train": pixels(6, 20)}, r"expected x_train of \[N, H, W\], got \[6, 20\]"),
        ({"x_train": np.zeros((6, 5, 4))}, "images: expected uint8 .* torch.float64"),
        ({"y_train": np.array([-1, 0, 0, 0, 0, 0])}, r"labels: expected integers in \[0, 10\), got -1 \.\. 0"),
        ({"y_train": np.zeros(6)}, r"labels: expected integers, got float64"),
        ({"y_test": np.zeros((2, 10), np.uint8)}, r"labels: expected int64 \[2\] .* got .* \[2, 10\]"),
        ({"x_test": pixels(2, 6, 6)}, r"mnist: expected test images .* \[1, 5, 4\], got \[1, 6, 6\]"),
        ({"x_test": pixels(0, 5, 4), "y_test": np.zeros(0, np.uint8)}, "with N >= 1"),
    ],
)
def test_mnist_rejects_other_arrays(tmp_path, changes, message):
    arrays = {key: value for key, value in (npz_arrays() | changes).items() if value is not None}
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path / "mnist.npz")


def test_mnist_npz_never_unpickles(tmp_path):
    bomb = np.array([_Bomb()], dtype=object)
    np.savez(tmp_path / "mnist.npz", **(npz_arrays() | {"y_train": bomb}))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load("mnist", tmp_path / "mnist.npz")


def test_mnist_broken_npz_is_named(tmp_path):
    file = tmp_path / "mnist.npz"
    np.savez(file, **npz_arrays())
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"mnist\.npz \(300 bytes\): truncated"):
        load("mnist", file)
    with file.open("wb") as stream:
        np.save(stream, pixels(2, 3))
    with pytest.raises(ValueError, match="got a single array"):
        load("mnist", file)


def test_mnist_file_of_another_kind(tmp_path):
    (tmp_path / "mnist.pkl").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ValueError, match=r"mnist\.pkl: expected a folder of idx files, or an \.npz"):
        load("mnist", tmp_path / "mnist.pkl")


# Sizes that a file claims, and what small files unpack to


def npy_header(shape, version=(1, 0), kind="|u1"):
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode() + b"\n"
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text


@pytest.mark.parametrize("shape", [(10**12, 28, 28), (10**9, 28, 28), (10**30, 28, 28), (7, 5, 4)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_is_as_large_as_its_header_says(shape, version, tmp_path):
    np.savez(tmp_path / "mnist.npz", **{key: array for key, array in npz_arrays().items() if key != "x_train"})
    with zipfile.ZipFile(tmp_path / "mnist.npz", "a") as file:
        file.writestr("x_train.npy", npy_header(shape, version) + bytes(6 * 5 * 4))
    with pytest.raises(
        ValueError, match=r"x_train\.npy: expected \d+ bytes for the sizes \[.*\] of its header, got \d+$"
    ):
        load("mnist", tmp_path / "mnist.npz")


def test_an_npz_that_unpacks_to_more_than_memory(tmp_path, monkeypatch):
    shape = (8 << 20, 1, 1)
    np.savez_compressed(tmp_path / "mnist.npz", **(npz_arrays() | {"x_train": np.zeros(shape, np.uint8)}))
    monkeypatch.setattr(limits, "memory", lambda: 8 << 20)
    with pytest.raises(
        ValueError, match=r"x_train\.npy: expected at most 0\.0078.* GiB, this machine's memory, got 0\.0078"
    ):
        load("mnist", tmp_path / "mnist.npz")


@pytest.mark.parametrize("sizes", [(2**31, 2**31, 2**31), (2**31, 1, 1), (6 << 20, 1, 1)])
def test_a_gz_whose_header_claims_more_than_it_can_hold(sizes, tmp_path):
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, *sizes) + bytes(99)))
    with pytest.raises(ValueError, match=r"ubyte\.gz: expected \d+ bytes for the sizes .* of its header, got 115$"):
        load("mnist", tmp_path)


def test_a_gz_is_unpacked_no_further_than_its_header_says(tmp_path):
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, 6, 5, 4) + bytes(64 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected 136 bytes for .* got 137 or more"):
            load("mnist", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_gz_that_unpacks_to_more_than_memory(tmp_path, monkeypatch):
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, 9 << 20, 1, 1) + bytes(9 << 20), 1))
    monkeypatch.setattr(limits, "memory", lambda: 8 << 20)
    with pytest.raises(
        ValueError, match=r"ubyte\.gz: expected at most 0\.0078.* GiB, this machine's memory, got 0\.0087"
    ):
        load("mnist", tmp_path)
