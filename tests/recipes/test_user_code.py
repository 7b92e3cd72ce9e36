"""The digest of the source that a callable is in."""

from __future__ import annotations

import importlib
import sys

import pytest

from elle_fast.recipes import user_code


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """Imports a module of a folder of the test and says its digest."""

    def of(name, folder="here"):
        with monkeypatch.context() as context:
            context.syspath_prepend(tmp_path / folder)
            importlib.invalidate_caches()
            context.setattr("sys.modules", dict(sys.modules))
            importlib.import_module(name)
            return user_code.source_digest(f"{name}:build")

    return of


def written(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_of_a_package_it_is_of_all_its_source(digest, tmp_path):
    for folder in ("here", "there"):
        for name in ("__init__", "nets/__init__", "nets/a", "layers"):
            written(tmp_path / folder / "a_package_of_this_test" / f"{name}.py", "build = 1")
    package, name = tmp_path / "here" / "a_package_of_this_test", "a_package_of_this_test.nets.a"
    first = digest(name)
    assert digest(name, "there") == first
    # What Python cannot import is no source of it.
    written(package / "readme.txt", "text")
    written(package / ".venv" / "x.py", "build = 2")
    written(package / "site-packages" / "x.py", "build = 2")
    assert digest(name) == first
    written(package / "layers.py", "build = 2")
    second = digest(name)
    assert second != first
    (package / "layers.py").rename(package / "others.py")
    assert digest(name) not in (first, second)


def test_of_a_single_file_and_of_a_folder_that_is_a_package_without_init(digest, tmp_path):
    written(tmp_path / "here" / "a_file_of_this_test.py", "build = 1")
    written(tmp_path / "here" / "a_folder_of_this_test" / "nets.py", "build = 1")
    for name, file in (
        ("a_file_of_this_test", "a_file_of_this_test.py"),
        ("a_folder_of_this_test.nets", "a_folder_of_this_test/nets.py"),
    ):
        first = digest(name)
        written(tmp_path / "here" / "beside.py", "build = 2")
        assert digest(name) == first
        written(tmp_path / "here" / file, "build = 3")
        assert digest(name) != first
