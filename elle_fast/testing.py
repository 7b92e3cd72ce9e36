"""For tests of training code, on any machine: does a step wait for the device, and what does it compute and launch?

::

    from elle_fast.testing import OpCounter, call_counter, no_host_sync

    with no_host_sync():
        criterion(model, x, y).backward()      # raises HostSyncError at the first .item(), .cpu(), bool(tensor), ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from elle_fast import backends
from elle_fast.backends import extension
from elle_fast.ops import dispatch

__all__ = [
    "HostSyncError",
    "OpCounter",
    "call_counter",
    "differentiable_inputs",
    "no_host_sync",
    "no_launches",
    "stand_ins",
    "use_isa",
]

# Functions of a tensor that hand its values to Python or NumPy, as Python calls them.
_FUNCTIONS = frozenset(
    [
        *("item", "cpu", "tolist", "numpy", "nonzero", "argwhere", "is_nonzero", "masked_select", "equal", "allclose"),
        *("unique", "__bool__", "__float__", "__int__", "__index__", "__array__"),
    ]
)
# Operators whose result's values or size the host needs, as torch dispatches them.
_READS = frozenset(["_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"])
_INDEXING = frozenset(["index", "index_put", "index_put_"])
_COPIES = frozenset(["_to_copy", "copy_"])
_NO_WORK = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


class HostSyncError(AssertionError):
    """Something inside :func:`no_host_sync` would wait for the device."""


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside it whatever would wait for a GPU raises :class:`HostSyncError`, on the CPU too.

    That is every call and operator that hands a tensor's values to the host (``.item()``, ``.cpu()``, ``bool(tensor)``,
    ``nonzero``, a mask as an index, ...), also inside the operators of this package.
    """
    original = dispatch.Op.kernel

    def guarded(op: dispatch.Op, backend: str) -> Callable[..., Any]:
        function = original(op, backend)

        def call(*args: Any) -> Any:
            # Torch turns the modes off inside an operator.
            with _NoSyncFunctions(), _NoSyncOperators():  # type: ignore[no-untyped-call]
                return function(*args)

        return call

    with ExitStack() as stack:
        stack.callback(setattr, dispatch.Op, "kernel", original)
        dispatch.Op.kernel = guarded  # type: ignore[assignment, method-assign]
        stack.enter_context(_NoSyncFunctions())
        stack.enter_context(_NoSyncOperators())  # type: ignore[no-untyped-call]
        yield


class _NoSyncFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FUNCTIONS:
            raise HostSyncError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


class _NoSyncOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads_values(func.overloadpacket.__name__, args):
            raise HostSyncError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _reads_values(name: str, args: Any) -> bool:
    """Whether an operator needs values of its arguments on the host, wherever they are."""
    if name in _INDEXING:
        return any(index.dtype in (torch.bool, torch.uint8) for index in args[1] if index is not None)
    return name in _READS


class OpCounter(TorchDispatchMode):
    """Counts what is dispatched inside it, forward, backward and optimiser: ``with OpCounter(device) as counter``.

    Attributes:
        flops: of convolutions and matrix products, from their shapes. Over those of one forward pass this is the number
            of model passes (1 = a forward, a data gradient or a weight gradient over B samples).
        operators: views and allocations not counted: about the number of launches of an eager step.
        host_syncs: operators that wait for ``device``: those that need a value on the host, copies to the host, and
            copies from the host but non-blocking ones from pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type
        self.flops = self.operators = self.host_syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if not func.is_view and packet.__name__ not in _NO_WORK:
            self.operators += 1
        self.host_syncs += self._waits(packet.__name__, args, kwargs or {}, result)
        return result

    def _waits(self, name: str, args: Any, options: Any, result: Any) -> bool:
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0]
            if source.device.type == result.device.type:
                return False
            free = options.get("non_blocking", args[2] if len(args) > 2 else False) and source.is_pinned()
            return result.device.type != self._device or not free
        if name == "lift_fresh":  # torch.tensor and the like, whose values come from Python; no copy is dispatched
            return self._device != "cpu" and result.device.type == self._device
        if not any(each.device.type == self._device for each in tree_leaves(args) if isinstance(each, Tensor)):
            return False
        elsewhere = name in _INDEXING and any(i.device.type != self._device for i in args[1] if i is not None)
        return elsewhere or _reads_values(name, args)


@contextmanager
def differentiable_inputs(model: nn.Module) -> Iterator[None]:
    """Inside it every input of the model requires grad where a graph is made.

    So that each backward pass has a data gradient in the first layer too, and :class:`OpCounter` counts whole passes.
    """

    def require(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled() or args[0].requires_grad:
            return None
        return (args[0].detach().requires_grad_(),)

    hook = model.register_forward_pre_hook(require)
    try:
        yield
    finally:
        hook.remove()


def call_counter(model: Callable[[Tensor], Any]) -> tuple[Callable[[Tensor], Any], list[int]]:
    """The model as a function, and a list that gets the number of rows of each of its calls."""
    rows: list[int] = []

    def counted(x: Tensor) -> Any:
        rows.append(x.shape[0])
        return model(x)

    return counted, rows


@contextmanager
def stand_ins(make: Callable[[Any], Any]) -> Iterator[None]:
    """Inside it, ``make(kernel)`` is in the place of every Triton kernel, as its launches ``[grid](...)`` call it."""
    from elle_fast.ops.elle_loss import triton as loss
    from elle_fast.ops.elle_loss import triton_reduce
    from elle_fast.ops.pack_points import triton as pack

    places = [(pack, name) for name in ("pack_cube", "pack_ball", "start_cube", "start_ball")]
    places += [(loss, name) for name in ("rows_forward", "rows_backward")]
    places += [(triton_reduce, name) for name in ("reduce_forward", "update_lam")]
    with ExitStack() as stack:
        stack.callback(dispatch.forget_plans)  # they hold their kernel
        for module, name in places:
            stack.enter_context(patch.object(module, name, make(getattr(module, name))))
        dispatch.forget_plans()
        yield


@contextmanager
def no_launches() -> Iterator[None]:
    """Every Triton kernel replaced by one that does nothing, and the backend allowed on the CPU."""
    allowed = backends.Backend("any device", lambda device: True, lambda: None)
    with stand_ins(_Idle), patch.dict(backends.BACKENDS, {"triton": allowed}):
        yield


class _Idle:
    """In place of a kernel: a launch that does nothing."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *tensors: Any, **constants: Any) -> None:
        return None


@contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Inside it the compiled CPU kernels are those for that instruction set, in all threads; ``""`` changes nothing."""
    module = extension.load() if isa else None
    if module is None:
        yield
        return
    before = module.isa()
    module.use_isa(isa)
    try:
        yield
    finally:
        module.use_isa(before)
