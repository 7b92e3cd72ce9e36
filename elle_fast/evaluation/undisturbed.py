"""Attacks leave no trace on the model, on random generators, or on the standard output."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elle_fast._core.checks import describe
from elle_fast._core.default_device import host_by_default


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside; afterwards each module and parameter is as it was.

    Raises:
        TypeError: if the model is not a module.
        RuntimeError: if a buffer has changed, as batch norm's do in train mode; it is restored first.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(name, buffer, buffer.clone()) for name, buffer in model.named_buffers()]
    model.eval()
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
        changed = [name for name, buffer, before in buffers if not _same(buffer, before)]
    finally:
        with torch.no_grad():
            for _, buffer, before in buffers:
                buffer.copy_(before)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    if changed:
        raise RuntimeError(
            f"model: expected buffers that an evaluation leaves alone, got changes of {', '.join(changed)}; "
            "the accuracies are not those of one model"
        )


@contextlib.contextmanager
def foreign_code(seed: int) -> Iterator[list[str]]:
    """For attacks of other packages, which use and set global state; yields a list of AutoAttack's warnings.

    Inside, the generators of torch, NumPy and Python are seeded, and prints go to the standard error. Afterwards the
    generators, the trace function and the logger are as before.
    """
    import numpy as np  # the packages need it; our own attacks do not

    notes: list[str] = []
    logger = logging.getLogger("auto-attack")
    python_state, trace = random.getstate(), sys.gettrace()
    numpy_state = np.random.get_state()  # noqa: NPY002  the packages use the global generator
    # The generators of devices that are not in use yet have no state.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            notes.append(record.getMessage())
        return False  # nobody else gets it

    logger.addFilter(collect)
    try:
        # The packages draw where torch's default is, and move it to the device of x.
        with torch.random.fork_rng(devices=devices), contextlib.redirect_stdout(sys.stderr), host_by_default():
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield notes
    finally:
        logger.removeFilter(collect)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        sys.settrace(trace)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal values, or NaN in both."""
    return bool(((one == other) | ((one != one) & (other != other))).all())
