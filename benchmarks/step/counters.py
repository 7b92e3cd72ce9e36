"""What a step does besides taking time: model passes, operators, host syncs, memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from benchmarks.harness.device import launches
from benchmarks.harness.timing import Call
from benchmarks.step.compared import Trainer

ABOUT = {
    "units": "model passes (1 = a forward, a data gradient or a weight gradient over B samples): FLOPs of convolutions "
    "and matrix products, from the shapes of all that a step dispatches, over those of one forward pass; for this "
    "count every input of the model requires grad, so that a backward pass has a data gradient in the first layer too",
    "flop_units": "the same of the step as it is: a backward pass needs no data gradient in the first layer",
    "forward_samples": "samples of all forward passes, recomputed ones too, over B, counted by a hook of the model",
    "operators": "operators dispatched in a step, forward, backward and optimiser, views and allocations not counted",
    "launches": "kernels in torch's profile of a step; null on the CPU, see operators",
    "host_syncs": "operators that need a value of the device on the host (item, nonzero, equal, masks as indices, "
    "copies to the host, also those that do not block, and copies from the host but non-blocking ones from pinned "
    "memory); on the CPU the same operators, and forward='checkpoint' there compares what it has recomputed, which it "
    "does not on a GPU",
    "peak_bytes": "weights, buffers, the optimiser's state, the batch, and the peak of what a step allocates besides. "
    "CUDA: max_memory_allocated of a step less memory_allocated before. CPU: the highest sum of the allocator's events "
    "in torch's profile of a step; memory past that allocator is not seen",
}

_COPIES = frozenset(["_to_copy", "copy_"])
# Operators whose result's values or size the host needs.
_SYNCS = frozenset(["_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2"])
_INDEXING = frozenset(["index", "index_put", "index_put_"])
_FREE = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"])


class OpCounter(TorchDispatchMode):
    """Counts FLOPs, operators and host syncs of what runs inside it, on a device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type
        self.flops = self.operators = self.host_syncs = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        if not func.is_view and packet.__name__ not in _FREE:
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
        tensors = [each for each in tree_leaves(args) if isinstance(each, Tensor)]
        if not any(each.device.type == self._device for each in tensors):
            return False
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            return masks or any(index.device.type != self._device for index in indices)
        return name in _SYNCS


def counts(call: Call, trainer: Trainer) -> dict[str, Any]:
    """Everything but times, of a step that was taken before."""
    once = OpCounter(trainer.device)
    with torch.no_grad(), trainer.autocast(), once:
        trainer.model(trainer.x)
    paper, step = OpCounter(trainer.device), OpCounter(trainer.device)
    with differentiable_inputs(trainer.model), paper:
        call()
    samples: list[int] = []
    hook = trainer.model.register_forward_hook(lambda module, args, output: samples.append(len(args[0])))
    with step:
        call()
    hook.remove()
    cuda = trainer.device.type == "cuda"
    return {
        "units": round(paper.flops / once.flops, 2),
        "flop_units": round(step.flops / once.flops, 2),
        "forward_samples": round(sum(samples) / len(trainer.x), 2),
        "operators": step.operators,
        "launches": launches(call) if cuda else None,
        "host_syncs": step.host_syncs,
        "peak_bytes": _held(trainer) + (_peak_cuda(call, trainer) if cuda else _peak_cpu(call)),
    }


@contextmanager
def differentiable_inputs(model: nn.Module) -> Iterator[None]:
    """Every input of the model requires grad where a graph is made, as a data gradient in every layer is the unit."""

    def require(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled() or args[0].requires_grad:
            return None
        return (args[0].detach().requires_grad_(),)

    hook = model.register_forward_pre_hook(require)
    try:
        yield
    finally:
        hook.remove()


def _held(trainer: Trainer) -> int:
    """Bytes of what every method's step needs before it begins; drops what an earlier step has left."""
    trainer.optimizer.zero_grad(set_to_none=True)
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *state, trainer.x, trainer.y]
    return sum(each.nbytes for each in held if isinstance(each, Tensor))


def _peak_cuda(call: Call, trainer: Trainer) -> int:
    """Above what is there before, which other methods may hold."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(trainer.device)
    before = torch.cuda.memory_allocated(trainer.device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(trainer.device) - before


def _peak_cpu(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    recorded: Any = profiled.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    # The profile has no event when memory is freed that was there before it.
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
