"""The CUDA kernels, compiled as C++ and run on the CPU, through the tests of the ops: what they compute, no speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATRIX = ["tests/ops/pack_points", "tests/ops/elle_loss", "tests/test_adaptive.py", "tests/test_relative.py"]


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++").split()[0]) is None or sys.platform != "linux",
    reason="the emulation needs a C++ compiler and Linux",
)
def test_the_matrix(tmp_path):
    library = tmp_path / "_C.so"
    build = [sys.executable, "tests/cuda_emulation/build.py", str(library)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *MATRIX],
        cwd=ROOT,
        env={**os.environ, "ELLE_FAST_EXTENSION": str(library), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 500
