"""Webdataset shards: what webdataset's writer wrote and its reader reads; cut-off, missing and odd ones named."""

import io
import json
import tarfile
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from webdataset import tariterators

from elle_fast import data
from elle_fast.data.readers.tar_index import members
from tests.data.stand_in import encoded, scene

load: Any = data.load


def write(path, samples, **options):
    """A shard by webdataset's writer; a sample is (key, picture's kind, bytes, label's kind, label)."""
    with webdataset.TarWriter(str(path), **options) as writer:
        for key, kind, picture, label_kind, label in samples:
            writer.write({"__key__": key, kind: picture, label_kind: label, "txt": "a caption"})


def sample(label, index, kind="png", label_kind="cls"):
    picture = encoded(scene(label, index, 10, 14), {"jpg": "JPEG"}.get(kind, kind.upper()))
    given = {"cls": label, "json": {"label": label, "other": "x"}}[label_kind]
    return f"dir.d/{label}_{index:04}", kind, picture, label_kind, given


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for number in range(3):
        samples = [sample((number + k) % 3, 10 * number + k, ("png", "jpg", "webp")[k % 3]) for k in range(7)]
        write(root / f"train-{number:06}.tar", samples)
    write(root / "val-000000.tar", [sample(k % 3, 100 + k, label_kind="json") for k in range(5)])
    return root


def streamed(root, **options):
    return load("webdataset", root, **{"image_size": 8, "stream": "always", "workers": 0, **options})


def test_the_samples_are_those_that_webdataset_reads(shards):
    found = streamed(shards)
    assert found.classes == ("0", "1", "2")
    for split, part in ((found.train, "train"), (found.test, "val")):
        expected = []
        for shard in sorted(shards.glob(f"{part}-*.tar")):
            with shard.open("rb") as stream:  # webdataset's own leaves closing to the garbage collector
                files = ({**each, "__url__": str(shard)} for each in tariterators.tar_file_iterator(stream))
                expected += list(tariterators.group_by_keys(files))
        assert len(split) == len(expected)
        for index, each in enumerate(expected):
            kind = next(kind for kind in ("png", "jpg", "webp") if kind in each)
            assert split.source.read(index) == each[kind]
            label = int(each["cls"]) if "cls" in each else json.loads(each["json"])["label"]
            assert int(split.labels[index]) == label
            assert split.source.name(index).endswith(f"{each['__key__']}.{kind}")


def test_in_memory_and_streamed_are_the_same(shards):
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    memory, stream = load("webdataset", shards, image_size=8, workers=0), streamed(shards, workers=1)
    assert (memory.streamed, stream.streamed) == (False, True)
    assert memory.classes == stream.classes == ("ant", "bee", "cat")
    for a, b in zip(data.in_order(memory.train, 9), data.in_order(stream.train, 9), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    (shards / "classes.txt").unlink()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["0.png", "a/" * 40 + "b.png", "ä/" * 60 + "ö.png", "x" * 140 + "/y.png"])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, form, name):
    path = tmp_path / "x.tar"
    if form == tarfile.USTAR_FORMAT and len(name.encode()) > 100 and "/" not in name[-101:]:
        pytest.skip("no such name in this format")
    with tarfile.open(path, "w", format=form) as tar:
        for member, size in ((name, 700), ("folder", -1), (f"{name[:60]}2.cls", 0), ("last.cls", 512)):
            entry = tarfile.TarInfo(member)
            entry.mtime = 1.5
            if size < 0:
                entry.type = tarfile.DIRTYPE
            else:
                entry.size = size
            tar.addfile(entry, io.BytesIO(bytes(max(size, 0))))
    with tarfile.open(path) as tar:
        expected = [(each.name, each.offset_data, each.size) for each in tar if each.isreg()]
    assert [tuple(each) for each in members(path)] == expected


def spoil(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda content: b"", "expected a tar, got an empty file"),
        (lambda content: content[: 3 * 512 + 100], "cut off"),
        (lambda content: content[:512], r"cut off"),
        (lambda content: content.rstrip(b"\0"), "cut off"),
        (lambda content: content[:100] + b"7" + content[101:], "header at byte 0, got one with another checksum"),
        (lambda content: bytes(1024), "expected samples of a picture and a label, got none"),
        (lambda content: b"\x1f\x8b" + content, "expected an uncompressed tar"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, change, message):
    for name in ("train-000000", "train-000001", "test-000000"):
        write(tmp_path / f"{name}.tar", [sample(k % 2, k) for k in range(4)])
    spoil(tmp_path / "train-000001.tar", change)
    with pytest.raises(ValueError, match=rf"train-000001\.tar: .*{message}"):
        streamed(tmp_path)


@pytest.mark.parametrize(
    "odd,message",
    [
        (("k", "png", b"x", "cls", b"one"), r"k\.cls: expected the text of an integer, got b'one'"),
        (("k", "png", b"x", "json", b"[1]"), r'k\.json: expected an integer under "label" or "cls", got'),
        (("k", "png", b"x", "json", b'{"label": true}'), r'k\.json: expected an integer under "label" or "cls", got'),
        (("k", "png", b"x", "cls", b"-1"), r"000\.tar: k\.cls: expected a label in \[0, 1048576\), got b'-1'"),
        (("k", "png", b"x", "cls", b"1048576"), r"000\.tar: k\.cls: expected a label in \[0, 1048576\), got"),
        (("k", "png", b"x", "json", b'{"cls": 99999999999999999999}'), r"000\.tar: k\.json: expected a label in \[0,"),
        (("k", "png", b"x", "tx", b"1"), r"expected a picture and its \.cls or \.json for k, got k\.png"),
        (("k", "bin", b"x", "cls", b"1"), r"expected a picture and its \.cls or \.json for k, got k\.cls"),
    ],
)
def test_an_odd_sample_is_named(tmp_path, odd, message):
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar"), encoder=False) as writer:
        for key, kind, picture, label_kind, label in (sample(0, 0), sample(1, 1), odd):
            coded = label if isinstance(label, bytes) else str(label).encode()
            writer.write({"__key__": key, kind: picture, label_kind: coded})
    write(tmp_path / "test-000000.tar", [sample(0, 3)])
    with pytest.raises(ValueError, match=message):
        streamed(tmp_path)


def test_missing_shards_and_splits_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected train-\*\.tar, got none"):
        streamed(tmp_path)
    for number in (0, 1, 4):
        write(tmp_path / f"train-{number:06}.tar", [sample(0, number)])
    with pytest.raises(FileNotFoundError, match=r"numbered from 0 to 4, got none called train-000002\.tar and 1 more"):
        streamed(tmp_path)
    for number in (2, 3):
        write(tmp_path / f"train-{number:06}.tar", [sample(0, number)])
    with pytest.raises(FileNotFoundError, match=r"expected test-\*\.tar or val-\*\.tar .*, got none"):
        streamed(tmp_path)
    write(tmp_path / "test-000000.tar", [sample(1, 0)])
    with pytest.raises(ValueError, match=r"labels in \[0, 1\), got 1 of .*test-000000\.tar: dir\.d/1_0000\.png"):
        streamed(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"only classes of the training in the test split, got 'b' of .*test-000000"):
        streamed(tmp_path)
    (tmp_path / "classes.txt").write_text("a\na\n")
    with pytest.raises(ValueError, match=r"classes\.txt: expected different class names"):
        streamed(tmp_path)


def test_a_shard_that_is_cut_off_later_is_named(tmp_path):
    write(tmp_path / "train-000000.tar", [sample(k % 2, k) for k in range(6)])
    write(tmp_path / "test-000000.tar", [sample(0, 9)])
    train = streamed(tmp_path).train
    spoil(tmp_path / "train-000000.tar", lambda content: content[:2000])
    with pytest.raises(ValueError, match=r"train-000000\.tar: dir\.d/.*\.png: .* the tar is cut off"):
        list(data.in_order(train))


def test_more_shards_than_files_are_kept_open(tmp_path, monkeypatch):
    from elle_fast.data import sources

    monkeypatch.setattr(sources, "_OPEN_FILES", 2)
    for number in range(5):
        write(tmp_path / f"train-{number:03}.tar", [sample(0, number), sample(1, number)])
    write(tmp_path / "test-000.tar", [sample(0, 9)])
    source = streamed(tmp_path).train.source
    for index in np.random.default_rng(0).permutation(40) % 10:
        number, label = divmod(int(index), 2)
        assert source.read(int(index)) == sample(label, number)[2]
    assert len(source._open) == 2
