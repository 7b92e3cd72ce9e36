"""The triton backend's host side without a GPU: something else stands in for each kernel, and nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from elle_fast import backends


@contextmanager
def stand_ins(make: Callable[[Any], Any]) -> Iterator[None]:
    """Within, ``make(kernel)`` is in the place of every kernel. Kept launches are forgotten: they hold their kernel."""
    from elle_fast.ops.elle_loss import triton as loss
    from elle_fast.ops.elle_loss import triton_reduce
    from elle_fast.ops.pack_points import triton as pack

    places = [(pack, name) for name in ("pack_cube", "pack_ball", "start_cube", "start_ball")]
    places += [(loss, name) for name in ("rows_forward", "rows_backward")]
    places += [(triton_reduce, name) for name in ("reduce_forward", "update_lam")]
    with ExitStack() as stack:
        stack.callback(forget_launches)
        for module, name in places:
            stack.enter_context(patch.object(module, name, make(getattr(module, name))))
        forget_launches()
        yield


def forget_launches() -> None:
    """The hosts plan each launch anew."""
    from elle_fast.ops.elle_loss import triton as loss
    from elle_fast.ops.pack_points import triton as pack

    for host in (pack, loss):
        for function in vars(host).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


class Stub:
    """In place of a kernel: a launch that does nothing."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *tensors: Any, **constants: Any) -> None:
        return None


@contextmanager
def no_launches() -> Iterator[None]:
    """Every kernel replaced by a stub, and the triton backend allowed on the CPU."""
    allowed = backends.Backend("any device", lambda device: True, lambda: None)
    with stand_ins(Stub), patch.dict(backends.BACKENDS, {"triton": allowed}):
        yield
