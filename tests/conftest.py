"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.cuda_emulation.emulate import emulate, emulated


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The long ones first, so that two processes end at about the same time.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def no_waits_for_the_disk() -> Iterator[None]:
    """A sync keeps a file through a loss of power, which no test has, and takes 8 ms; a short run makes a hundred."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def every_test_is_looked_at_from_its_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are looked at now and then in a process: whether a test is warned must not depend on those before it."""
    from elle_fast import ranges  # not before the extension is emulated, below

    monkeypatch.setattr(ranges._pixel_watch, "calls", 0)
    monkeypatch.setattr(ranges._pixel_watch, "warned", False)


def mend_the_interpreter() -> None:
    """Its bfloat16 is not the hardware's: it cuts off the bits that do not fit, and loses subnormal numbers."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast_impl = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        kinds, shape = (source.dtype.scalar, target.scalar), source.data.shape
        if kinds == (tl.bfloat16, tl.float32):
            wide = np.ascontiguousarray(source.data).view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(wide.view(np.float32).reshape(shape), target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            number = np.ascontiguousarray(source.data, dtype=np.float32)
            bits = number.view(np.uint32).astype(np.uint64)
            # To the nearest, ties to even; a NaN could become infinite, and stays one.
            rounded = np.where(np.isnan(number), 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
            return interpreter.TensorHandle(rounded.astype(np.uint16).reshape(shape), target.scalar)
        return cast_impl(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Older ones leave it to NumPy to make a number of an array, which it no longer does since 2.4.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch

    patch_lang, patched = interpreter._patch_lang, set[frozenset[int]]()

    def patch_once(function: Any) -> Any:
        # A launch replaces the functions of triton.language; so would each call of a device function inside it, anew:
        # a quarter of the interpreter's time.
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return None
        scope = patch_lang(function)
        if not patched:  # the launch's own, which it undoes at its end
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        patched.add(modules)
        return scope

    interpreter._patch_lang = patch_once


if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, so it is set before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        mend_the_interpreter()

if emulated():
    emulate()
