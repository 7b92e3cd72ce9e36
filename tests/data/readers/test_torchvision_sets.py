"""torchvision's data sets on disk: its files and labels, read by this package; no download, no pickle."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from elle_fast import data
from tests.data.stand_in import encoded, scene
from tests.optional import import_torchvision

load: Any = data.load


@pytest.fixture(scope="module", autouse=True)
def datasets():
    import_torchvision()
    from torchvision import datasets

    return datasets


def write(path, label, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(scene(label, index, 14, 18), "JPEG" if path.suffix == ".jpg" else "PPM"))


def food(root):
    """Food101's layout: meta/ with lists of names, images/ with a folder for each class."""
    base = root / "food-101"
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(("apple_pie", "waffles")):
        for index in range(5):
            part = "train" if index < 3 else "test"
            lists[part].setdefault(name, []).append(f"{name}/{index}")
            write(base / "images" / name / f"{index}.jpg", label, index)
    (base / "meta").mkdir()
    for part, found in lists.items():
        (base / "meta" / f"{part}.json").write_text(json.dumps(found))


def dtd(root):
    """DTD's layout: labels/ with a list of names for each split."""
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for part, start in (("train", 0), ("val", 3), ("test", 6)):
        names = [f"{name}/{start + k}.jpg" for name in ("banded", "dotted") for k in range(3)]
        (base / "labels" / f"{part}1.txt").write_text("\n".join(names))
        for k, name in enumerate(names):
            write(base / "images" / name, k // 3, k)


def country(root):
    """Country211's layout: a folder for each split, with one for each class."""
    for part in ("train", "valid", "test"):
        for label, name in enumerate(("AD", "AE")):
            for index in range(2):
                write(root / "country211" / part / name / f"{index}.jpg", label, index)


@pytest.mark.parametrize("name,make", [("Food101", food), ("DTD", dtd), ("Country211", country)])
def test_files_and_labels_are_torchvisions(name, make, tmp_path, datasets):
    make(tmp_path)
    stream = load(f"torchvision:{name}", tmp_path, stream="always", workers=0)
    for split, part in ((stream.train, "train"), (stream.test, "test")):
        expected = getattr(datasets, name)(tmp_path, split=part)
        assert len(split) == len(expected) > 0
        for index, (image, label) in enumerate(expected):
            assert int(split.labels[index]) == label
            found = split.view.of_test(Image, split.source.read(index))
            assert np.array_equal(found, np.asarray(image))
    assert stream.name == f"torchvision:{name}"
    assert len(stream.classes) == 2
    memory = load(f"torchvision:{name}", tmp_path, workers=0)
    assert not memory.streamed
    assert memory.classes == stream.classes


def test_files_that_are_not_there_are_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected the files of torchvision's Food101: Dataset not found"):
        load("torchvision:Food101", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="expected the folder that torchvision's Food101 is in, got nothing"):
        load("torchvision:Food101", tmp_path / "absent")


@pytest.mark.parametrize(
    "name,hint",
    [
        ("CIFAR10", "its files are pickles; take the binary version, --data cifar10"),
        ("FashionMNIST", "take --data mnist"),
        ("ImageNet", "take --data image-folder"),
        ("Nonsense", "expected torchvision: and one of Country211, DTD, "),
    ],
)
def test_others_are_refused_with_what_to_take_instead(name, hint, tmp_path):
    with pytest.raises(
        ValueError, match=f"name: expected torchvision: and one of .*{hint}" if name != "Nonsense" else hint
    ):
        load(f"torchvision:{name}", tmp_path)


def test_every_known_name_is_a_data_set_of_torchvision_with_these_splits(datasets):
    import inspect

    from elle_fast.data.readers.torchvision_sets import NAMES

    for name in NAMES:
        parameters = inspect.signature(getattr(datasets, name)).parameters
        assert {"split", "download"} <= parameters.keys()
