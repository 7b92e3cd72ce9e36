"""What a result was measured on: machine, versions, commit and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import elle_fast
from elle_fast._core import checks


def provenance(command: list[str] | None = None) -> dict[str, Any]:
    """All of it as JSON types; the command, a list of strings, is by default that of this process."""
    if command is not None and not (isinstance(command, list) and all(isinstance(word, str) for word in command)):
        raise TypeError(f"command: expected None or a list of strings, got {checks.describe(command)}")
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join(command if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads torch uses, and the accelerator, if one is in use."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_initialized():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str | None]:
    """Versions of elle_fast, Python, torch and triton (None if it is not installed)."""
    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "elle_fast": elle_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def commit() -> str | None:
    """The commit of the checkout that holds the package, ``-dirty`` if changed since; None outside a checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        # Below another project's checkout, the package is not one of its files.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
