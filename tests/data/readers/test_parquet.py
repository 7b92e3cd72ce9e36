"""Parquet as the `datasets` library writes it, read offline; nothing is written beside it."""

import socket
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from elle_fast import data
from tests.data.stand_in import CLASSES, encoded, scene

load: Any = data.load


def table(labels, start=0, names=CLASSES, picture="image", label="label"):
    pictures = [{"bytes": encoded(scene(y, start + k, 12, 12)), "path": f"{k}.png"} for k, y in enumerate(labels)]
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({picture: datasets.Image(), label: kind, "text": datasets.Value("string")})
    rows = {picture: pictures, label: list(labels), "text": ["x"] * len(labels)}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(autouse=True)
def apart(tmp_path_factory, monkeypatch):
    """A cache of its own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    connect = socket.socket.connect

    def here_only(self, address):
        assert self.family == socket.AF_UNIX, "a connection to elsewhere"  # worker processes have their own
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", here_only)
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("parquet")
    (root / "data").mkdir()
    table([0, 1, 2, 0, 1]).to_parquet(root / "data/train-00000-of-00002.parquet")
    table([2, 1, 0, 2], start=5).to_parquet(root / "data/train-00001-of-00002.parquet")
    table([-1, -1], start=30).to_parquet(root / "data/test-00000-of-00001.parquet")
    table([1, 2, 2], start=20).to_parquet(root / "data/validation-00000-of-00001.parquet")
    return root


def test_rows_are_those_that_datasets_decodes(root):
    before = sorted(root.rglob("*"))
    stream = load("parquet", root, stream="always", workers=0)
    assert stream.classes == CLASSES
    assert stream.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 0, 2]
    files = sorted(str(file) for file in root.glob("data/train-*"))
    expected = datasets.Dataset.from_parquet(files)
    x, _ = next(data.in_order(stream.train))
    for row, found in zip(expected, (x * 255).round().byte(), strict=True):
        assert np.array_equal(np.asarray(row["image"].convert("RGB")), found.permute(1, 2, 0).numpy())
    # A test split without labels gives way to the validation's.
    assert stream.test.labels.tolist() == [1, 2, 2]
    assert stream.train.source.name(5) == f"{files[1]}: row 0"
    assert sorted(root.rglob("*")) == before


def test_in_memory_and_streamed_are_the_same(root):
    memory, stream = load("parquet", root, workers=0), load("parquet", root, stream="always", workers=2)
    assert not memory.streamed
    given: dict[str, Any] = {"seed": 0, "epoch": 0, "augment": True}
    for a, b in zip(data.batches(memory.train, 4, **given), data.batches(stream.train, 4, **given), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_other_names_of_columns_and_no_names_of_classes(tmp_path):
    for split, labels in (("train", [0, 3, 1]), ("test", [3])):
        table(labels, names=(), picture="img", label="fine_label").to_parquet(tmp_path / f"{split}.parquet")
    found = load("parquet", tmp_path, workers=0)
    assert found.classes == ("0", "1", "2", "3")
    assert found.test.labels.tolist() == [3]


@pytest.mark.parametrize(
    "train,test,message",
    [
        (None, [0], r"expected train-\*\.parquet"),
        ([0], None, r"expected test-\*\.parquet or validation-\*\.parquet .*, got none"),
        ([0], [-1], "got test without labels"),
        ([0, 1], [2], r"only classes of the training in the test split, got 'cat' of .*test-0\.parquet: row 0"),
        ([], [0], r"train-0\.parquet"),
    ],
)
def test_what_is_missing_is_named(tmp_path, train, test, message):
    for split, labels in (("train", train), ("test", test)):
        if labels is not None:
            table(labels).to_parquet(tmp_path / f"{split}-0.parquet")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load("parquet", tmp_path, workers=0)


def test_files_that_are_damaged_or_of_another_form_are_named(tmp_path):
    for split in ("train", "test"):
        table([0, 1, 2]).to_parquet(tmp_path / f"{split}-0.parquet")
    good = (tmp_path / "train-0.parquet").read_bytes()
    for content in (b"", b"PAR1", good[:-30]):
        (tmp_path / "train-0.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"train-0\.parquet \(\d+ bytes\): truncated, corrupt"):
            load("parquet", tmp_path, workers=0)
    table([0, 1, 2], names="abc").to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"test-0\.parquet: expected columns and classes as in train-0\.parquet"):
        load("parquet", tmp_path, workers=0)
    table([0, 1, 2], picture="photo").to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: expected a column of pictures called image or img"):
        load("parquet", tmp_path, workers=0)


def test_a_row_that_is_no_picture_is_named(tmp_path):
    rows = table([0, 1, 2]).cast_column("image", datasets.Image(decode=False))
    features = rows.features
    broken = rows.map(lambda row, k: {"image": {"bytes": b"no", "path": None}} if k == 1 else row, with_indices=True)
    broken.cast(features).to_parquet(tmp_path / "train-0.parquet")
    table([0]).to_parquet(tmp_path / "test-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: row 1 \(2 bytes\): truncated, corrupt"):
        load("parquet", tmp_path, workers=0, image_size=8)


def test_labels_beyond_all_classes_are_named(tmp_path):
    for split, labels in (("train", [0, 1 << 20]), ("test", [0])):
        table(labels, names=()).to_parquet(tmp_path / f"{split}-0.parquet")
    with pytest.raises(ValueError, match=r"train-0\.parquet: expected label below 1048576, got 1048576$"):
        load("parquet", tmp_path, workers=0)


def test_a_damaged_page_is_named_with_its_file(tmp_path):
    for name in ("train-0", "train-1", "train-2", "test-0"):
        table([0, 1, 2]).to_parquet(tmp_path / f"{name}.parquet")
    file = tmp_path / "train-1.parquet"
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)  # the first page, of pictures; the index of pages is at the end
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-1\.parquet \(\d+ bytes\): truncated, corrupt") as caught:
        load("parquet", tmp_path, workers=0, image_size=8)
    assert "generating the dataset" not in str(caught.value)  # what `datasets` says of any cause


def test_what_no_file_is_the_cause_of_has_its_reason(tmp_path, monkeypatch):
    for name in ("train-0", "train-1", "test-0"):
        table([0, 1, 2]).to_parquet(tmp_path / f"{name}.parquet")

    def full(*args, **options):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    with pytest.raises(OSError, match=r"datasets cannot read train-0\.parquet and 1 more: .*No space left on device"):
        load("parquet", tmp_path, workers=0)
