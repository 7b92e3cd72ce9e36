"""Freed memory is kept, in a process of its own each time, as nothing takes that back."""

import os
import subprocess
import sys

import pytest

from elle_fast._core import kept_memory

SCRIPT = """
import resource, torch
from elle_fast import keep_freed_memory

kept = keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    blocks = [torch.ones(2**22) for _ in range(4)]
    del blocks
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GLIBC = sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


def printed(**variables: str) -> list[str]:
    whole = {name: value for name, value in os.environ.items() if name not in kept_memory._VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=whole, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not GLIBC, reason="not glibc")
def test_pages_are_touched_once():
    kept, faults = printed()
    assert kept == "True"
    assert int(faults) < 25_000  # the 64 MiB of a turn are 16,384 pages
    kept, faults = printed(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert kept == "False"
    assert int(faults) > 60_000  # in each of five turns


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kept_memory.keep_freed_memory() is False
