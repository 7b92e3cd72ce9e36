"""What the host does for each call of a public function: Python, checks, allocations, dispatch; needs no GPU.

    python -m benchmarks.ops.overhead --out benchmarks/results/overhead.json

Every launch is replaced by one that does nothing, so a GPU has no part in the numbers; nor has Triton's own work at a
launch. One thread; each number is the median of repeats of many calls, with the fastest and the slowest repeat. The
target is 25 us a call on one core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elle_fast import AdaptiveLambda, backends, functional
from elle_fast._core.files import write_json
from elle_fast.backends import triton_host
from elle_fast.ops.elle_loss import autograd
from elle_fast.ops.elle_loss.validation import FIXED, checked
from elle_fast.ops.pack_points import validation as pack_validation
from elle_fast.ops.pack_points.validation import packing_options
from elle_fast.recipes.provenance import provenance

TARGET = 25.0
EPS = 8 / 255


class Stub:
    """In place of a kernel: a launch that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *tensors: Any, **constants: Any) -> None:
        return None


@contextmanager
def no_launches() -> Iterator[None]:
    """Every kernel of the triton backend replaced by a stub, and the backend allowed on the CPU."""
    from elle_fast.ops.elle_loss import triton as loss
    from elle_fast.ops.elle_loss import triton_reduce
    from elle_fast.ops.pack_points import triton as pack

    caches = (pack.pack_launch, pack.start_launch, loss.forward_launches, loss.backward_launch)
    kernels = [(pack, name) for name in ("pack_cube", "pack_ball", "start_cube", "start_ball")]
    kernels += [(loss, "rows_forward"), (loss, "rows_backward")]
    kernels += [(triton_reduce, "reduce_forward"), (triton_reduce, "update_lam")]
    allowed = backends.Backend("any device", lambda device: True, lambda: None)
    patches: list[Any] = [patch.object(module, name, Stub()) for module, name in kernels]
    patches.append(patch.dict(backends.BACKENDS, {"triton": allowed}))
    for cache in caches:
        cache.cache_clear()
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()
        for cache in caches:
            cache.cache_clear()


def calls() -> dict[str, dict[str, Callable[[], Any]]]:
    """The public functions, and the parts that their time goes to."""
    x, seed = torch.rand(128, 3, 32, 32), torch.tensor(1)
    grad = torch.randn_like(x)
    logits = torch.randn(512, 10)
    wanted = logits.clone().requires_grad_()
    triplets = torch.randn(384, 10, requires_grad=True)
    target, alpha = torch.randint(10, (128,)), torch.rand(128)
    controller = AdaptiveLambda(4000.0)
    one, backend = torch.ones(()), "triton"
    packing = packing_options(eps=EPS)
    packed_call = pack_validation.checked(x, grad, None, None, seed, packing)
    call = checked(wanted, target, alpha, "elle", 1, "loss", "squared", 0.0, first=True)
    arguments: tuple[Any, ...] = (target, alpha, 1.0, None, [], *FIXED, backend, True, *call.options)
    from elle_fast.ops.elle_loss import triton as loss
    from elle_fast.ops.pack_points import schema as pack_schema
    from elle_fast.ops.pack_points import triton as pack

    normalised = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "bounds": (0.0, 1.0)}
    start = {"start": 1.0, "step_size": 1.25 * EPS, "project": True}

    def there_and_back() -> None:
        values = functional.elle_loss(wanted, target, alpha, controller, backend=backend)
        wanted.grad = None
        values[0].backward(one)

    def packed(**options: Any) -> Callable[[], Any]:
        return lambda: functional.pack_points(x, grad, EPS, seed=seed, backend=backend, **options)

    def lost(logits: Tensor, lam: Any) -> Callable[[], Any]:
        return lambda: functional.elle_loss(logits, target, alpha, lam, backend=backend)

    public: dict[str, Callable[[], Any]] = {
        "draw_seed": lambda: functional.draw_seed(x.device),
        "random_start": lambda: functional.random_start(x, EPS, seed=seed, backend=backend),
        "pack_points": packed(),
        "pack_points, rs-fgsm, normalised": packed(**normalised, **start),
        "elle_loss, no gradient wanted": lost(logits, 4000.0),
        "elle_loss": lost(wanted, 4000.0),
        "elle_loss, adaptive": lost(wanted, controller),
        "local_linearity": lambda: functional.local_linearity(triplets, target, alpha, backend=backend),
        "AdaptiveLambda.update": lambda: controller.update(one, backend),
    }
    parts: dict[str, Callable[[], Any]] = {
        "two 0-dim allocations": lambda: (torch.empty(()), torch.empty(())),
        "pack_points: options, checked and cached": lambda: packing_options(
            eps=EPS, step_size=None, start=0.0, project=False, bounds=None, mean=None, std=None, norm="linf"
        ),
        "pack_points: tensors, checked before": lambda: pack_validation.checked(x, grad, None, None, seed, packing),
        "pack_points: two allocations and the launch": lambda: pack.pack_points(
            x, grad, None, None, seed, None, packed_call
        ),
        "pack_points: by way of the dispatcher": lambda: torch.ops.elle_fast.pack_points.default(
            x, grad, None, None, seed, None, backend, *packing
        ),
        "pack_points: past the dispatcher": lambda: pack_schema.pack_points(
            x, grad, None, None, seed, packed_call, backend
        ),
        "elle_loss: options and tensors, checked before": lambda: checked(
            wanted, target, alpha, "elle", 1, "loss", "squared", 0.0, first=True
        ),
        "elle_loss: choice of the backend": lambda: backends.choose(
            backend, logits.device, ("logits",), (logits.dtype,)
        ),
        "elle_loss: four allocations and two launches": lambda: loss.elle_loss(
            logits, target, alpha, 1.0, [], FIXED, call
        ),
        "elle_loss: by way of the dispatcher": lambda: torch.ops.elle_fast.elle_loss.default(logits, *arguments),
        "elle_loss: with the autograd.Function": lambda: autograd.elle_loss(
            wanted, target, alpha, 1.0, [], FIXED, call, backend
        ),
        "elle_loss forward and backward, adaptive": there_and_back,
    }
    return {"public": public, "parts": parts}


def measure(call: Callable[[], Any], number: int, repeats: int) -> dict[str, float]:
    """Microseconds of one call: median, lowest and highest of the repeats."""
    for _ in range(max(1, number // 4)):
        call()
    each = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(number):
            call()
        each.append(1e6 * (time.perf_counter() - begin) / number)
    return {"median_us": statistics.median(each), "low_us": min(each), "high_us": max(each)}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a public function misses the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--number", type=int, default=2000, help="calls in a repeat")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args(argv)
    if triton_host.interpreted():
        parser.error("TRITON_INTERPRET is set: the stubs stand for compiled kernels; unset it")
    torch.set_num_threads(1)
    with no_launches():
        found = {
            group: {name: measure(call, options.number, options.repeats) for name, call in members.items()}
            for group, members in calls().items()
        }
    console = Console(width=100)
    for group, rows in found.items():
        table = Table(title=f"{group}: us a call", title_justify="left")
        for heading in ("", "median", "lowest", "highest"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, row in rows.items():
            table.add_row(name, *(f"{row[key]:.1f}" for key in ("median_us", "low_us", "high_us")))
        console.print(table)
    missed = {name: row["median_us"] for name, row in found["public"].items() if row["median_us"] > TARGET}
    console.print(f"target {TARGET:g} us: " + (", ".join(f"{n} {v:.1f}" for n, v in missed.items()) or "held"))
    if options.out is not None:
        content = {"target_us": TARGET, "load": os.getloadavg()[0], **found, **provenance()}
        write_json(options.out, content)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
