"""Peak memory of an epoch of each row of bench_train.py, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.program import ROOT
from benchmarks.step.train_rows import Net, Place, Row

ABOUT = {
    "peak_bytes": "of an epoch of two steps, full ones with --fast, in a process of its own, after a first such epoch. "
    "CUDA: max_memory_allocated of that process. CPU: the process' resident memory at its highest less that before the "
    "epoch, and weights, buffers and the optimiser's state; large blocks go back to the system as soon as they are "
    "freed. null where the system does not tell",
}
# glibc: each block of 64 KiB or more is a mapping of its own, which freeing it gives back.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_MAX_": str(1 << 30), "MALLOC_TOP_PAD_": "0"}


def child(name: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of a row of a net, by a process that calls :func:`peak`."""
    words = [sys.executable, "-m", "benchmarks.step.bench_train", *(["--quick"] if options.quick else [])]
    words += [f"--peak={name}/{row}", f"--device={options.device.type}", f"--threads={torch.get_num_threads()}"]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {row}: the process that measures memory failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(net: Net, row: Row, place: Place) -> dict[str, Any]:
    """Of this process: train for an epoch, and look at the memory of the next."""
    training = row.make(replace(net, batches=2), place)
    for measured in (False, True):
        if training.recipe is not None and row.kinds:
            training.recipe.hold("full")
        training.optimizer.zero_grad(set_to_none=True)
        if measured:
            found = peak_of(training.epoch, training.model, training.optimizer, place.device)
        else:
            training.epoch()
    return {"peak_bytes": found}


def peak_of(
    call: Callable[[], Any], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> int | None:
    """Bytes at the highest moment of a call, with what is held before it; None where the system does not tell.

    On the CPU the process has to have :data:`ALLOCATOR` in its environment.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    before = _resident()
    call()
    highest = _highest()
    return None if before is None or highest is None else _held(model, optimizer) + highest - before


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that are there before a step: weights, buffers, the optimiser's state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    held = [*model.parameters(), *model.buffers(), *state]
    return sum(each.nbytes for each in held if isinstance(each, Tensor))


def _resident() -> int | None:
    """Bytes of this process in memory now, from which its highest is counted anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _highest() -> int | None:
    return _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
