"""Builds the extension with the CUDA kernels as plain C++, for a machine without a GPU or nvcc.

    python tests/cuda_emulation/build.py /some/where/_C.so
    ELLE_FAST_EXTENSION=/some/where/_C.so ...

Its CUDA functions take addresses in the CPU's memory. Half a minute on one core; no instruction set but the baseline.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-std=c++17 -O0 -ffp-contract=off -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
DEFINES = ["-DELLE_CUDA", '-DELLE_CUDA_ARCHITECTURES="emulated"', "-DELLE_ISA=baseline"]


def build(library: Path, flags: str = "") -> None:
    """Compile csrc into ``library``; ``flags``: more of them, such as ``"-fsanitize=undefined"``."""
    import pybind11

    init = (ROOT / "elle_fast" / "__init__.py").read_text()
    version = re.findall(r'__version__ = (".*")', init)[0]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [ROOT / "tests" / "cuda_emulation", pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder) / f"{place}.o") for place in range(len(sources))]
        options = [
            *FLAGS.split(),
            *flags.split(),
            *DEFINES,
            f"-DELLE_VERSION={version}",
            *(f"-I{path}" for path in includes),
        ]
        for source, target in zip(sources, objects, strict=True):
            subprocess.run([*compiler, *options, "-x", "c++", "-c", str(source), "-o", target], check=True)
        subprocess.run(
            [*compiler, *flags.split(), "-shared", "-pthread", *objects, "-ldl", "-o", str(library)], check=True
        )


if __name__ == "__main__":
    build(Path(sys.argv[1]))
