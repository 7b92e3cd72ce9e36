"""The compiled extension ``elle_fast._C``: loads it when first asked for, and remembers why it could not.

Two variables of the environment are read then:

- ``ELLE_FAST_ISA=avx512|avx2|baseline``: the instruction set to use, instead of the widest that the machine has;
- ``ELLE_FAST_EXTENSION=/path/to/_C.so``: the file to load instead of the package's own (``make sanitize``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import sys
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of csrc/common/plans.h

_NAME = "elle_fast._C"
_FOLDER = Path(__file__).parents[1]
_FAILURE = _FOLDER / "_build_failure.txt"  # written by setup.py
_HOW = "g++ or clang++ in place, `pip install --force-reinstall --no-deps .` in a checkout builds it"
_NO_CUDA = (
    "the extension was built without CUDA; with nvcc in place, "
    "`ELLE_FAST_CUDA=1 pip install --force-reinstall --no-deps .` in a checkout builds it"
)

_forked = False  # whether this process is a child of one that had imported this, and perhaps OpenMP's threads


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def load() -> ModuleType | None:
    """The extension, or ``None`` if it cannot be loaded; afterwards ``from elle_fast import _C`` gives the same."""
    return _loaded()[0]


def loaded() -> ModuleType:
    """The extension, for a backend that is there because it could be loaded."""
    module = load()
    assert module is not None
    return module


def cpp_why_not() -> str | None:
    """``None`` if the CPU kernels can run on this machine, else what is missing and how to get it.

    Raises:
        ValueError: if ``ELLE_FAST_ISA`` names an instruction set that is unknown or that this machine lacks.
    """
    return _cpp_reason()


def cuda_why_not() -> str | None:
    """``None`` if the CUDA kernels can run on this machine, else what is missing and how to get it."""
    return _cuda_reason()


# Constants to torch.compile, as triton_host.why_not is.
cpp_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def describe() -> dict[str, str]:
    """What ``elle-fast info`` says about the extension."""
    module, reason = _loaded()
    if module is None:
        return {"extension": f"not available: {reason}"}
    facts = module.facts()
    rows = {"extension": f"{module.version}, {facts['compiler']}, for {facts['isas']}"}
    try:
        cpp_why_not()
        rows["extension isa"] = module.isa()
    except ValueError as error:
        rows["extension isa"] = str(error)
    rows["extension cuda"] = f"for {facts['cuda']}" if module.cuda_built() else _NO_CUDA + _recorded()
    return rows


@lru_cache(maxsize=1)
def _cpp_reason() -> str | None:
    module, reason = _loaded()
    if module is not None and (name := os.environ.get("ELLE_FAST_ISA")):
        if name not in (usable := module.isas()):
            raise ValueError(
                f"ELLE_FAST_ISA: expected an instruction set that this machine and this build have "
                f"({', '.join(usable)}), got {name!r}"
            )
        module.use_isa(name)
    return reason


@lru_cache(maxsize=1)
def _cuda_reason() -> str | None:
    module, reason = _loaded()
    if module is None:
        return reason
    if not module.cuda_built():
        return _NO_CUDA + _recorded()
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if error := module.cuda_probe():
        return f"the kernels, built for {module.facts()['cuda']}, cannot run on this device or driver: {error}"
    return None


def _recorded() -> str:
    """What the build of the extension wrote down when it failed."""
    try:
        lines = _FAILURE.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return "\n".join([". Its build failed:", *("  " + line for line in lines)])


@lru_cache(maxsize=1)
def _loaded() -> tuple[ModuleType | None, str | None]:
    """The extension, or why there is none."""
    file = _file()
    if file is None:
        return None, f"the extension is not built; with {_HOW}{_recorded()}"
    try:
        _check_length(file)
        module = _import(file)
    except (ImportError, OSError) as error:
        return None, f"the extension cannot be loaded ({error}); with {_HOW} anew"
    if _forked:
        module.forked()
    # Not imported above: the package itself imports this module.
    version, built = sys.modules["elle_fast"].__version__, getattr(module, "version", None)
    if built != version:
        return None, f"the extension was built for elle_fast {built}, this is {version}; with {_HOW} anew"
    return module, None


def _file() -> Path | None:
    if given := os.environ.get("ELLE_FAST_EXTENSION"):
        return Path(given)
    return next((path for suffix in EXTENSION_SUFFIXES if (path := _FOLDER / ("_C" + suffix)).exists()), None)


def _check_length(file: Path) -> None:
    """Refuse a file that was cut off: the system's loader maps it without a look, and a bus error ends the process."""
    with file.open("rb") as stream:
        header = stream.read(64)
    if len(header) == 64 and header[:6] == b"\x7fELF\x02\x01":
        # The section headers come last: their offset, then the size and the number of them.
        (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if file.stat().st_size < offset + size * count:
            raise ImportError(f"{file} is shorter than it says")


def _import(file: Path) -> ModuleType:
    if "ELLE_FAST_EXTENSION" not in os.environ:
        return importlib.import_module(_NAME)
    spec = importlib.util.spec_from_file_location(_NAME, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"ELLE_FAST_EXTENSION: expected the path of an extension module, got {str(file)!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[_NAME] = module  # where `from elle_fast import _C` finds it
    return module
