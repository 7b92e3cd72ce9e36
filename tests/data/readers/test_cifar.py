"""CIFAR: tiny binary files come back as written, broken ones are named, pickles are refused."""

import pickle
import tarfile

import numpy as np
import pytest
import torch

from elle_fast.data import load


def pixels(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


class _Bomb:
    """A pickle of this runs code when loaded."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def records(images, labels, coarse=None):
    columns = [labels] if coarse is None else [coarse, labels]
    header = np.stack([np.asarray(column, np.uint8) for column in columns], 1)
    return np.concatenate([header, images.reshape(len(images), -1)], 1).tobytes()


def write_cifar10(folder, names=True):
    """Five train batches of 2 images with labels 0..9, a test batch of 3; returns the images."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = pixels(10, 3, 32, 32), pixels(3, 3, 32, 32, seed=1)
    for k in range(5):
        here = slice(2 * k, 2 * k + 2)
        (folder / f"data_batch_{k + 1}.bin").write_bytes(records(train[here], np.arange(10)[here]))
    (folder / "test_batch.bin").write_bytes(records(test, [9, 0, 4]))
    if names:
        (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n\n")
    return train, test


def write_cifar100(folder):
    folder.mkdir(parents=True, exist_ok=True)
    train, test = pixels(3, 3, 32, 32), pixels(2, 3, 32, 32, seed=1)
    (folder / "train.bin").write_bytes(records(train, [99, 0, 50], coarse=[1, 2, 3]))
    (folder / "test.bin").write_bytes(records(test, [7, 98], coarse=[19, 0]))
    return train, test


def check_cifar10(dataset, written):
    train, test = written
    assert np.array_equal(dataset.train.images.numpy(), train)
    assert np.array_equal(dataset.test.images.numpy(), test)
    assert dataset.train.labels.tolist() == list(range(10))
    assert dataset.test.labels.tolist() == [9, 0, 4]
    assert dataset.augment is True


def test_cifar10_from_its_folder_and_from_the_parent(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    written = write_cifar10(folder)
    check_cifar10(load("cifar10", folder), written)
    check_cifar10(load("cifar10", str(tmp_path)), written)
    assert load("cifar10", folder).classes == tuple("abcdefghij")


@pytest.mark.parametrize("top", ["cifar-10-batches-bin", "./cifar-10-batches-bin", "."])
def test_cifar10_from_the_archive(tmp_path, top):
    written = write_cifar10(tmp_path / "files")
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "files", top)
    dataset = load("cifar10", tmp_path / "cifar-10-binary.tar.gz")
    check_cifar10(dataset, written)
    assert dataset.classes == tuple("abcdefghij")


def test_cifar10_without_names_numbers_its_classes(tmp_path):
    write_cifar10(tmp_path, names=False)
    assert load("cifar10", tmp_path).classes == tuple("0123456789")


def test_cifar10_limit_is_a_subset(tmp_path):
    write_cifar10(tmp_path)
    whole, limited = load("cifar10", tmp_path), load("cifar10", tmp_path, limit=4, test_limit=1)
    assert torch.equal(limited.train.images, whole.train.subset(4).images)
    assert torch.equal(limited.test.labels, whole.test.subset(1).labels)


def test_cifar100_uses_the_fine_labels(tmp_path):
    train, test = write_cifar100(tmp_path / "cifar-100-binary")
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("\n".join(f"fine{k}" for k in range(100)))
    dataset = load("cifar100", tmp_path)
    assert np.array_equal(dataset.train.images.numpy(), train)
    assert np.array_equal(dataset.test.images.numpy(), test)
    assert dataset.train.labels.tolist() == [99, 0, 50]
    assert dataset.test.labels.tolist() == [7, 98]
    assert dataset.classes[99] == "fine99"
    assert dataset.name == "cifar100"


def test_cifar_missing_file_is_named(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"expected data_batch_3\.bin \(from cifar-10-binary\.tar\.gz\), got no"
    ):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [0, 3072, 2 * 3073 - 1, 2 * 3073 + 1])
def test_cifar_odd_size_is_named(tmp_path, size):
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_2.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"data_batch_2\.bin: expected a multiple of 3073 bytes.* got {size}$"):
        load("cifar10", tmp_path)


def test_cifar_label_out_of_range(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(records(pixels(2, 3, 32, 32), [3, 10]))
    with pytest.raises(ValueError, match=r"test_batch\.bin: labels: expected integers in \[0, 10\), got 3 \.\. 10"):
        load("cifar10", tmp_path)


def test_cifar_wrong_number_of_class_names(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"batches\.meta\.txt: expected 10 class names, got 2"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.999])
def test_cifar_truncated_archive(tmp_path, keep):
    write_cifar10(tmp_path / "files")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "files", "cifar-10-batches-bin")
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: truncated, corrupt"):
        load("cifar10", archive)


@pytest.mark.parametrize(
    "name,folder,file,archive",
    [
        ("cifar10", "cifar-10-batches-py", "data_batch_1", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-python", "train", "cifar-100-binary.tar.gz"),
        ("cifar10", "mine", "cifar.pkl", "cifar-10-binary.tar.gz"),
    ],
)
def test_cifar_pickles_are_refused(tmp_path, name, folder, file, archive):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).write_bytes(pickle.dumps(_Bomb()))
    with tarfile.open(tmp_path / "python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / folder, folder)
    roots = [tmp_path / folder, tmp_path / folder / file, tmp_path / "python.tar.gz"]
    if folder != "mine":
        roots.append(tmp_path)
    for root in roots:
        with pytest.raises(ValueError, match=r"binary version, .* got python pickles .* never loaded") as error:
            load(name, root)
        assert archive in str(error.value)


def test_an_image_folder_is_not_taken_for_pickles(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected train\.bin, test\.bin .* got no such file"):
        load("cifar100", tmp_path)
