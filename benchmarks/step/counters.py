"""What a step does besides taking time: model passes, operators, host syncs, memory."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.device import launches
from benchmarks.harness.timing import Call
from benchmarks.step.compared import Trainer
from elle_fast.testing import OpCounter, differentiable_inputs

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


def counts(call: Call, trainer: Trainer) -> dict[str, Any]:
    """Everything but times, for a step that has been taken before."""
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


def _held(trainer: Trainer) -> int:
    """Bytes that every method's step needs before it begins; frees the gradients of an earlier step."""
    trainer.optimizer.zero_grad(set_to_none=True)
    state = [value for values in trainer.optimizer.state.values() for value in values.values()]
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *state, trainer.x, trainer.y]
    return sum(each.nbytes for each in held if isinstance(each, Tensor))


def _peak_cuda(call: Call, trainer: Trainer) -> int:
    """Peak bytes above those allocated before, which may belong to other methods."""
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
