"""Files that are whole or not there, without leftovers, and errors that name them."""

import errno
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from elle_fast._core import files
from elle_fast._core.files import write_atomically, write_csv, write_json


@contextmanager
def full_disk(limit=4096):
    """Files may not grow beyond ``limit`` bytes, so that writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_csv(path, [{"x": value}])])
def test_a_full_disk_is_named_with_the_file(write, tmp_path):
    path = tmp_path / "result.json"
    write(path, "old")
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*/result\.json'"):
        write(path, "x" * 10_000)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"'.*/file/result\.json'") as raised:
        write_json(tmp_path / "file" / "result.json", 1)
    assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST)


def started(path):
    """A process in the middle of a write, and its temporary file."""
    script = f"""
import pathlib, runpy, time
def half(file):
    file.write(b"half")
    file.flush()
    time.sleep(60)
runpy.run_path({files.__file__!r})["write_atomically"](pathlib.Path({str(path)!r}), half)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    for _ in range(500):
        if found := [each for each in path.parent.iterdir() if each.stat().st_size]:
            return process, found
        time.sleep(0.01)
    pytest.fail("the process has not begun to write")


def test_what_a_killed_write_leaves_is_removed_by_the_next_one_and_nothing_else(tmp_path):
    path = tmp_path / "curves[1].png"
    others = [tmp_path / name for name in (".curves[1].png.backup", ".curves1.png.abcdefgh.tmp", ".other.abcdefgh.tmp")]
    for other in others:
        other.touch()
    process, temporary = started(path)
    write_atomically(path, lambda file: file.write(b"one"))
    assert [each for each in tmp_path.iterdir() if each in temporary] == temporary  # it is still being written
    process.kill()
    process.wait()
    write_atomically(path, lambda file: file.write(b"two"))
    assert {*tmp_path.iterdir()} == {path, *others}
    assert path.read_bytes() == b"two"


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "result.json", []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((os.fstat(handle).st_size, path.exists())))
    write_atomically(path, lambda file: file.write(b"one"))
    assert synced == [(3, False)]


def test_without_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    left = Path(tmp_path / ".x.json.abcdefgh.tmp")
    left.touch()
    write_json(tmp_path / "x.json", 1)
    assert {*tmp_path.iterdir()} == {tmp_path / "x.json", left}  # somebody may be writing it


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_replaced_goes_only_when_the_new_is_there(folder, tmp_path):
    path = tmp_path / "x"

    def make(made, content):
        if folder:
            made.mkdir()
            made = made / "inside"
        made.write_text(content)

    def found():
        return (path / "inside" if folder else path).read_text()

    with files.replacing(path) as made:
        make(made, "old")
        assert not path.exists()
    assert found() == "old"

    def fail():
        with files.replacing(path) as made:
            make(made, "new")
            raise ValueError("not good")

    with pytest.raises(ValueError, match="not good"):
        fail()
    assert found() == "old"
    with files.replacing(path) as made:
        make(made, "new")
    assert found() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_left_by_a_killed_process_goes_with_the_next_write(tmp_path):
    path = tmp_path / "x"
    (tmp_path / ".x.abcdefgh.dir").mkdir()
    (tmp_path / ".x.abcdefgh.dir" / "x").write_text("half")
    (tmp_path / ".x.too-long.but-mine.dir").mkdir()
    with files.replacing(path) as outer:
        outer.write_text("outer")
        with files.replacing(path) as inner:  # leaves the folder of who is still at work alone
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert sorted(each.name for each in tmp_path.iterdir()) == [".x.too-long.but-mine.dir", "x"]


def test_nothing_written_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*/x'"), files.replacing(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
