"""A process that measures one point, either times or memory, and prints them as a line of JSON.

Memory has a process of its own because its allocator is told to give every block back, which costs time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.harness.tables import rounded
from benchmarks.harness.timing import DRY, Samples, Side, WallClock, in_turns
from benchmarks.scale.points import METHODS, OPS, Point
from benchmarks.step import train_memory
from benchmarks.step.compared import EPS, LAM, Setting, Trainer
from benchmarks.step.compared import METHODS as STEPS
from elle_fast import AdaptiveLambda, functional
from elle_fast._core.devices import fastest_convolutions

WARM = 2  # steps before the first that counts: the first compiles, allocates and fills caches


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("point", type=json.loads)
    options_of.add_argument("--what", choices=("times", "memory"), required=True)
    options_of.add_argument("--device", default="cpu")
    options_of.add_argument("--threads", type=int, default=1)
    options_of.add_argument("--rounds", type=int, default=7)
    options_of.add_argument("--rank", type=int, default=0)
    options_of.add_argument("--meeting", help="file by which the ranks find each other")
    options_of.add_argument("--timeout", type=float, default=300.0)
    options = options_of.parse_args(argv)
    torch.set_num_threads(options.threads)
    point = Point(**options.point)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", options.rank)
        torch.cuda.set_device(device)
    if point.ranks > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{options.meeting}",
            rank=options.rank,
            world_size=point.ranks,
            timeout=timedelta(seconds=options.timeout),
        )
    with fastest_convolutions():
        found = times(point, device, options.rounds) if options.what == "times" else memory(point, device)
    if point.ranks > 1:
        dist.destroy_process_group()
    print(json.dumps(found))
    return 0


def times(point: Point, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of each method, and of the two operations alone, by turns."""
    trainer = trainer_of(point, device)
    steps = {name: STEPS[name].make(trainer) for name in METHODS}
    calls: dict[str, Callable[[], Any]] = {name: step.call for name, step in steps.items()}
    if point.ranks == 1:
        calls |= operations(point, trainer)
    for call in calls.values():
        for _ in range(WARM):
            call()
    meet = dist.barrier if point.ranks > 1 else None
    sides = {name: Side(call, before=meet) for name, call in calls.items()}
    clock = WallClock(device.type)
    found = {name: Samples(1) for name in sides}
    # A fixed number of calls: ranks that chose it by the time would choose differently, and wait for each other.
    for _ in range(rounds):
        for name, samples in in_turns(sides, DRY, clock).items():
            found[name].seconds += samples.seconds
    for step in steps.values():
        step.check()
    return {name: _milliseconds(samples.seconds) for name, samples in found.items()}


def memory(point: Point, device: torch.device) -> dict[str, Any]:
    """Peak bytes of a step of each method, with weights and optimiser."""
    found: dict[str, Any] = {}
    for name in METHODS:
        trainer = trainer_of(point, device)
        step = STEPS[name].make(trainer)
        for _ in range(WARM):
            step.call()
        trainer.optimizer.zero_grad(set_to_none=True)
        found[name] = train_memory.peak_of(step.call, trainer.model, trainer.optimizer, device)
        del trainer, step
    return found


def trainer_of(point: Point, device: torch.device) -> Trainer:
    """The network, its optimiser and a batch, as a CUDA training has them: channels_last."""
    shape = (3, point.side, point.side)
    trainer = Trainer(Setting("preact", point.width, point.batch, "fp32", device, True, shape, point.classes))
    if point.ranks > 1:
        trainer.model = nn.parallel.DistributedDataParallel(
            trainer.model, device_ids=None if device.type == "cpu" else [device]
        )
    return trainer


def operations(point: Point, trainer: Trainer) -> dict[str, Callable[[], Any]]:
    """``pack``: pack_points of the batch; ``loss``: elle_loss of four points' logits, forward and backward."""
    device = trainer.device
    seed = torch.zeros((), dtype=torch.int64, device=device)
    gradient = torch.randn_like(trainer.x)
    alpha = torch.rand(point.batch, device=device)
    controller = AdaptiveLambda(LAM).to(device)
    logits = torch.randn(4 * point.batch, point.classes, device=device, requires_grad=True)

    def loss() -> Tensor:
        logits.grad = None
        total, _, _ = functional.elle_loss(logits, trainer.y, alpha, controller)
        total.backward()
        return total

    pack = partial(functional.pack_points, trainer.x, gradient, EPS, seed=seed)
    return dict(zip(OPS, (pack, loss), strict=True))


def _milliseconds(seconds: list[float]) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    values = {"least": min(seconds), "q1": q1, "median": median, "q3": q3}
    return {name: rounded(1e3 * value) for name, value in values.items()}


if __name__ == "__main__":
    sys.exit(main())
