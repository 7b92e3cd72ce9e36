"""Activation checkpointing of one forward pass of a training step: its activations are made again in the backward pass.

What :func:`torch.utils.checkpoint.checkpoint` leaves to its caller is done here: the recomputation changes no buffer of
the model, and its output is compared with the first one, so that gradients are not those of another function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

__all__ = ["checkpointed"]


def checkpointed(
    function: Callable[..., Tensor], callees: Sequence[Any], again: Sequence[Any], *inputs: Tensor | None
) -> Tensor:
    """``function(*callees, *inputs)`` without its activations: the backward pass calls ``function(*again, *inputs)``.

    Random numbers and autocast are in the recomputation what they were in the forward pass. (While a CUDA graph is
    captured torch cannot keep the state of its generator: dropout then counts as a difference.) Buffers, such as the
    running statistics of batch norm, are changed by the forward pass alone: the recomputation works on copies of what
    they were before it.

    The recomputed output may differ from the first by 4 machine epsilons of its dtype (at least 2^-13) times the
    first's largest absolute value, as kernels that add up in no fixed order do. If it differs by more, the backward
    pass raises RuntimeError on the CPU. Elsewhere it does not wait to know: this forward pass' gradients are then NaN.
    A smaller difference is not seen, such as that of a little dropout in bfloat16 whose state was not kept.

    Args:
        function: calls the callees and returns one floating-point tensor.
        callees: modules, functions that may call modules (which must not be compiled: torch.compile tells the two
            calls apart), or None.
        again: the same for the recomputation, where a module may stand for one that wraps it.
        inputs: tensors or None.
    """
    on_cuda = any(value is not None and value.is_cuda for value in inputs)
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    # With early stop a recomputation would end before its output is there to be compared.
    with checkpoint.set_checkpoint_early_stop(False):
        output: Tensor = checkpoint.checkpoint(
            _Repeatable(function, callees, again), *inputs, use_reentrant=False, preserve_rng_state=not capturing
        )
    return output


class _Repeatable:
    """A function whose first call is the forward pass and whose later calls are recomputations."""

    def __init__(self, function: Callable[..., Tensor], callees: Sequence[Any], again: Sequence[Any]) -> None:
        self.function, self.callees, self.again = function, callees, again
        self.buffers = _Buffers()
        self.first: Tensor | None = None

    def __call__(self, *kept: Tensor | None) -> Tensor:
        inputs = [None if each is None else each.clone() for each in kept]  # a model may change its input in place
        if self.first is None:
            output = self.function(*map(self.buffers.watched, self.callees), *inputs)
            self.first = output.detach()
            return output * torch.ones((), dtype=output.dtype, device=output.device)
        with self.buffers.as_before():
            output = self.function(*self.again, *inputs)
        # Autograd saved a factor of 1 in the forward pass; the backward pass takes this one in its place: 1, or NaN.
        return output * _agreement(self.first, output.detach())


class _Buffers:
    """Copies of the buffers of all modules that a forward pass calls, made before it."""

    def __init__(self) -> None:
        # Module and name of each; buffer and copy by the buffer's id, as modules may share one.
        self.places: dict[tuple[nn.Module, str], int] = {}
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def watched(self, callee: Any) -> Any:
        """A module, after its buffers are copied; a function that copies those of each module it calls, before that."""
        if callee is None:
            return None
        if isinstance(callee, nn.Module) and not isinstance(callee, DistributedDataParallel):
            self._copy(callee)
            return callee

        def call(*args: Any, **kwargs: Any) -> Any:
            hook = register_module_forward_pre_hook(self._copy)
            try:
                return callee(*args, **kwargs)
            finally:
                hook.remove()

        return call

    def _copy(self, root: nn.Module, _: Any = None) -> None:
        if isinstance(root, DistributedDataParallel):
            return  # before its own module is called it brings the first process' buffers
        for module in root.modules():
            for name, buffer in module._buffers.items():
                if buffer is None or (module, name) in self.places:
                    continue
                self.places[module, name] = id(buffer)
                if id(buffer) not in self.copies:
                    self.copies[id(buffer)] = (buffer, buffer.detach().clone())

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Put copies in their places, and afterwards what was there."""
        # Copies of the copies, as a graph that is kept may be recomputed more than once.
        copies = {key: copy.clone() for key, (_, copy) in self.copies.items()}
        now = [(module._buffers, name, module._buffers[name]) for module, name in self.places]
        try:
            for (module, name), key in self.places.items():
                module._buffers[name] = copies[key]
            yield
        finally:
            for buffers, name, buffer in now:
                buffers[name] = buffer


@torch.no_grad()
def _agreement(first: Tensor, again: Tensor) -> Tensor:
    """1 where the two outputs agree, else NaN; 0-dim, of their dtype. On the CPU RuntimeError instead of NaN."""
    if again.shape == first.shape and again.dtype == first.dtype:
        # A largest value that is not finite says nothing; a model that has diverged agrees with itself in its NaN.
        largest = first.abs().nan_to_num(nan=0, posinf=0).amax()
        near = (again - first).abs() <= max(4 * torch.finfo(first.dtype).eps, 2.0**-13) * largest
        agreed = (near | (again == first) | (again.isnan() & first.isnan())).all()
        if not _raises(first.device) or agreed:
            return torch.where(agreed, 1.0, math.nan).to(first.dtype)
    raise RuntimeError(
        "forward='checkpoint': expected the model to repeat its output when the backward pass calls it again, got "
        "another output. Take out of the model what a call changes or cannot repeat (random numbers not torch's, "
        "state outside of buffers), switch between train() and eval() only after the backward pass, or choose "
        "forward='packed' or 'split', which do not call it again"
    )


def _raises(device: torch.device) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return device.type == "cpu"
