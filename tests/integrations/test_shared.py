"""A library that is missing or too old, and nothing of them in a plain import."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from elle_fast.integrations import shared

ADAPTERS = ("accelerate", "lightning", "timm", "transformers")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_or_old_library_names_its_extra(name, monkeypatch):
    version = metadata.version

    def missing(library: str) -> str:
        if library == name:
            raise metadata.PackageNotFoundError(library)
        return version(library)

    module = f"elle_fast.integrations.{name}"
    importlib.import_module(module)
    held: dict[str, Any] = {each: sys.modules[each] for each in sys.modules if each.startswith("elle_fast.integ")}
    for made, said in (
        (missing, rf"^{name} is missing: pip install 'elle-fast\[{name}\]'$"),
        (
            lambda library: "0.9.1" if library == name else version(library),
            rf"^{name}: expected version .* or newer, got 0.9.1: pip install --upgrade 'elle-fast\[{name}\]'$",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "version", made)
            for each in held:
                if each != shared.__name__ and each != "elle_fast.integrations":
                    patch.delitem(sys.modules, each)
            with pytest.raises(ImportError, match=said):
                importlib.import_module(module)
        sys.modules.update(held)


@pytest.mark.parametrize(
    "found, least, enough",
    [
        ("2.4.0", "2.4", True),
        ("2.10", "2.9", True),
        ("2.3.9", "2.4", False),
        ("5.0.0rc1", "5.0", True),
        ("1", "1.1", False),
    ],
)
def test_versions_are_numbers(found, least, enough, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda library: found)
    if enough:
        shared.require("some", least)
    else:
        with pytest.raises(ImportError, match=f"expected version {least} or newer, got {found}"):
            shared.require("some", least)


def test_the_package_imports_none_of_them():
    script = f"import elle_fast, sys; print([name for name in {ADAPTERS} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
