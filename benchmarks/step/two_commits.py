"""Two checkouts side by side: calls of the ops, and the loss and gradient of a step, by turns in two processes.

    python -m benchmarks.step.two_commits --other ../before --out benchmarks/results/two_commits.json

Both checkouts need their extension built. Each has a process of its own, which imports its own elle_fast. A round times
a sample of every case in one process and then in the other, the other one first in every second round. Only what both
commits have is used: ``ELLELoss``, the two functions, and the recipes' narrow network. A ratio is this checkout's
median over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
EPS = 8 / 255


def cases() -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many calls make a sample."""
    from elle_fast import ELLELoss, functional
    from elle_fast.recipes import models

    torch.manual_seed(0)
    found: dict[str, tuple[Callable[[], Any], int]] = {}
    large, small, seed = torch.rand(64, 3, 224, 224), torch.rand(128, 3, 32, 32), torch.tensor(1)
    forms: dict[str, dict[str, Any]] = {
        "fgsm": {},
        "rs-fgsm": {"start": 1.0, "project": True, "step_size": 1.25 * EPS, "bounds": (0.0, 1.0)},
        "n-fgsm": {"start": 2.0},
        "l2": {"norm": "l2"},
    }
    for form, options in forms.items():
        out = functional.pack_points(large, large - 0.5, EPS, seed=seed, **options)

        def pack(options: dict[str, Any] = options, out: Any = out) -> Any:
            return functional.pack_points(large, large - 0.5, EPS, seed=seed, out=out, **options)

        found[f"pack_points {form}, 64x3x224x224, out="] = pack, 1
    found["pack_points fgsm, 128x3x32x32"] = lambda: functional.pack_points(small, small, EPS, seed=seed), 40
    for rows, classes, calls in ((512, 10, 100), (4096, 1000, 2)):
        logits, target = torch.randn(rows, classes).requires_grad_(), torch.randint(classes, (rows // 4,))
        alpha = torch.rand(rows // 4)

        def loss(logits: torch.Tensor = logits, target: torch.Tensor = target, alpha: torch.Tensor = alpha) -> Any:
            return torch.autograd.grad(functional.elle_loss(logits, target, alpha, 4000.0)[0], logits)

        found[f"elle_loss and gradient, {rows}x{classes}"] = loss, calls
    labels = torch.randint(10, (128,))
    levers: dict[str, dict[str, Any]] = {
        "elle": {},
        "elle-a": {"adaptive": True},
        "elle-a fast": {"adaptive": True, "skip_below": 0.01, "triplet_fraction": 0.125},
        "n-fgsm+elle, split": {"attack": "n-fgsm", "bounds": (0.0, 1.0), "forward": "split"},
    }
    for name, options in levers.items():
        model = models.build("preact", in_shape=(3, 32, 32), classes=10)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        criterion, x = ELLELoss(EPS, 4000.0, **options), small.contiguous(memory_format=torch.channels_last)

        def step(criterion: Any = criterion, model: torch.nn.Module = model, x: torch.Tensor = x) -> Any:
            return torch.autograd.grad(criterion(model, x, labels), list(model.parameters()))

        found[f"loss and gradient of {name}, batch 128"] = step, 1
    return found


def serve() -> None:
    """Time a sample of each case for each line that comes in; ends with the input."""
    torch.set_num_threads(1)
    made = cases()
    for call, calls in made.values():
        for _ in range(max(3, calls)):
            call()
    for _ in sys.stdin:
        times = {}
        for name, (call, calls) in made.items():
            call()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            times[name] = (time.perf_counter() - began) / calls
        print(json.dumps(times), flush=True)


def measure(other: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Medians in milliseconds, and their ratio."""
    processes = {}
    for side, root in (("this", ROOT), ("other", other.resolve())):
        environment = {**os.environ, "PYTHONPATH": str(root)}
        processes[side] = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env=environment,
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    samples: dict[str, dict[str, list[float]]] = {}
    for i in range(rounds):
        for side in ("this", "other") if i % 2 else ("other", "this"):
            process = processes[side]
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            for name, seconds in json.loads(process.stdout.readline()).items():
                samples.setdefault(name, {"this": [], "other": []})[side].append(1e3 * seconds)
    for process in processes.values():
        process.communicate()
    medians = {name: {side: statistics.median(times) for side, times in both.items()} for name, both in samples.items()}
    return {name: {**both, "ratio": both["this"] / both["other"]} for name, both in medians.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options_of = argparse.ArgumentParser(
        prog="python -m benchmarks.step.two_commits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options_of.add_argument("--other", type=Path, required=True, help="the other checkout")
    options_of.add_argument("--rounds", type=int, default=25, help="samples of each case a side (25)")
    options_of.add_argument("--out", type=Path, help="the JSON file")
    options = options_of.parse_args(arguments)
    # Not imported above: a serving process has the other checkout's package.
    from benchmarks.harness.program import command, write_lines
    from elle_fast.recipes.provenance import provenance

    rows = measure(options.other, options.rounds)
    for name, row in rows.items():
        print(f"{name:45s} {row['this']:9.3f} ms  {row['other']:9.3f} ms  {row['ratio']:.3f}")
    if options.out is not None:
        git = ["git", "-C", str(options.other), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        about = {**provenance(command(options_of, options)), "other_commit": commit, "rounds": options.rounds}
        write_lines(options.out, {**about, "cases": rows})
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
