"""What the host does for each call of a public function: Python, checks, allocations, dispatch; needs no GPU.

    python -m benchmarks.ops.overhead --out benchmarks/results/overhead.json

Every launch is replaced by one that does nothing, so a GPU has no part in the numbers; nor has Triton's own work at a
launch. One thread; the functions take turns.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import terminal
from benchmarks.harness.timing import Pace, Side, in_turns, threads
from benchmarks.ops.loss_cases import CALL_US, fixed_calls
from benchmarks.ops.sizes import EPS
from elle_fast import AdaptiveLambda, functional
from elle_fast._core.files import write_json
from elle_fast.backends import triton_host
from elle_fast.recipes.provenance import provenance
from elle_fast.testing import no_launches

BATCH, BACKEND = 128, "triton"


def calls() -> dict[str, Callable[[], Any]]:
    """Those of the fixed cost, with more options, and with a backward pass."""
    x, seed = torch.rand(BATCH, 3, 32, 32), torch.tensor(1)
    grad, one = torch.randn_like(x), torch.ones(())
    logits = torch.randn(4 * BATCH, 10).requires_grad_()
    target, alpha = torch.randint(10, (BATCH,)), torch.rand(BATCH)
    controller = AdaptiveLambda(4000.0)
    options: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "bounds": (0.0, 1.0)}
    options |= {"start": 1.0, "step_size": 1.25 * EPS, "project": True}

    def there_and_back() -> None:
        values = functional.elle_loss(logits, target, alpha, controller, backend=BACKEND)
        logits.grad = None
        values[0].backward(one)

    packed = partial(functional.pack_points, x, grad, EPS, seed=seed, backend=BACKEND, **options)
    return {
        **fixed_calls(BACKEND, (BATCH, 3, 32, 32)),
        "pack_points, rs-fgsm, normalised": packed,
        "elle_loss forward and backward, adaptive": there_and_back,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a public function misses the target."""
    options_of = parser("benchmarks.ops.overhead", __doc__)
    options_of.add_argument("--out", type=Path, help="JSON file to write")
    options_of.add_argument("--quick", action="store_true", help="few samples, to try the program")
    options = options_of.parse_args(arguments)
    if triton_host.interpreted():
        options_of.error("TRITON_INTERPRET is set: the stubs stand for compiled kernels; unset it")
    pace = Pace(sample=0.001, fewest=2, most=2) if options.quick else Pace(sample=0.02, fewest=15, most=15)
    with threads(1), no_launches():
        found = in_turns({name: Side(call) for name, call in calls().items()}, pace)
        public = {name: samples.microseconds() for name, samples in found.items()}
        content = {"target_us": CALL_US, "load": os.getloadavg()[0], "public": public}
        content |= provenance(command(options_of, options))
    rows = [(name, *(f"{row[key]:.1f}" for key in ("median_us", "low_us", "high_us"))) for name, row in public.items()]
    print(terminal("us a call", ("", "median", "low", "high"), [rows]), end="")
    # A backward pass is a second call.
    missed = {name: row["median_us"] for name, row in public.items() if row["median_us"] > CALL_US}
    missed.pop("elle_loss forward and backward, adaptive", None)
    print(f"target {CALL_US:g} us: " + (", ".join(f"{n} {v:.1f}" for n, v in missed.items()) or "held"))
    if options.out is not None:
        write_json(options.out, content)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
