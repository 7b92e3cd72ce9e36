"""One training step of every method side by side: time, model passes, memory, launches, host syncs; one run.

    make bench-step
    make bench-step ARGS="--model preactresnet18 --device cuda --dtype bf16 --channels-last --out x.json"

The methods take turns, a step of each in every round, on one model; FGSM is the base of all ratios. JSON with
provenance goes to ``--out``, a plot beside it; without ``--out`` to runs/bench_step.json, which git ignores. How long
lam's state takes after ``--history`` steps, and how the times of some of the methods grow with the batch
(``--batches``), is measured as well.

It is an error if a method's steps are not what its row says: a loss that is not finite, or a full step in place of a
light one. A missed target is shown, and is no error.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.program import ROOT, command, listed, number, parser
from benchmarks.harness.tables import rounded
from benchmarks.harness.timing import NOT_MEASURED, Pace, Samples, Side, WallClock, in_turns, threads
from benchmarks.step import counters
from benchmarks.step.authors import AuthorsList
from benchmarks.step.compared import AUTHORS_HISTORY, DTYPES, LAM, METHODS, Setting, Step, Trainer, halves
from benchmarks.step.step_tables import SWEPT, mixes, plot, tables, targets
from elle_fast import AdaptiveLambda
from elle_fast._core.devices import fastest_convolutions
from elle_fast._core.files import write_json
from elle_fast.recipes import models
from elle_fast.recipes.provenance import provenance

BASE = "fgsm"

ABOUT = {
    "ms": "wall clock of a step (gradients zeroed, loss, backward, optimiser), device idle before and after; each "
    "round has a step of every method; median and quartiles over the rounds",
    "ratio": "median over FGSM's median of the same run",
    "forward_ms": "of ms, until there is a loss: the attack, forward passes, gradients that the loss is made of; "
    "backward_ms: loss.backward(); medians. Of a replay there are none",
    "learning_rate": "0, so that all steps are taken with the same weights; no loss scaling in fp16",
    "lam": "of the rows elle-a held at lam_max, in light steps at 0",
    "authors": f"its list holds {AUTHORS_HISTORY} values, those of half a Short run",
    "history": "microseconds of one update of lam after so many steps: AdaptiveLambda.update alone, and the authors' "
    "list",
    **counters.ABOUT,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options_of = _parser()
    options = options_of.parse_args(argv)
    words = command(options_of, options)
    out: Path = options.out
    left_out: list[str] = []
    if options.methods:
        options.methods = tuple(name for name in METHODS if name in (*options.methods, BASE))
    if options.device.type == "cuda":
        if not torch.cuda.is_available():
            options_of.error("device: expected one that is there, got cuda, and torch sees no CUDA device")
    else:
        left_out = [name for name in options.methods or METHODS if METHODS[name].on_cuda]
    if options.methods and left_out:
        options_of.error(f"methods: expected some that run on {options.device}, got {', '.join(left_out)}")
    options.methods = [name for name in options.methods or METHODS if name not in left_out]
    with threads(options.threads), fastest_convolutions():
        content = measure(options) | provenance(words)
    write_json(out, content)
    plot(content, out.with_suffix(".svg"))
    print(tables(content))
    if left_out:
        print(f"left out on {options.device}: {', '.join(left_out)}")
    print(f"written: {out.name}, {out.with_suffix('.svg').name}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes to JSON but the provenance."""
    load, begin = os.getloadavg()[0], time.monotonic()
    rows, sizes, names = {}, sorted({*options.batches, options.batch}), options.methods
    batches: dict[str, Any] = {}
    for size in sizes:
        trainer = Trainer(_setting(options, size))
        swept = [name for name in names if name in SWEPT]
        if size == options.batch:
            found = rows = steps(trainer, names, options.rounds, counted=True)
        else:
            found = steps(trainer, swept, options.rounds, counted=False)
        batches[str(size)] = {name: {key: found[name][key] for key in ("ms", "ratio")} for name in swept}
    history = lam_state(options.history, options.device, smoke=options.smoke)
    return {
        "note": NOT_MEASURED if options.smoke else None,
        "smoke": options.smoke,
        "about": ABOUT,
        "setting": {
            **{
                name: getattr(options, name) for name in ("model", "width", "batch", "dtype", "channels_last", "rounds")
            },
            "device": options.device.type,
        },
        "load_before": load,
        "seconds": round(time.monotonic() - begin, 1),
        "methods": rows,
        "mixes": mixes(rows),
        "history": history,
        "batches": batches,
        "targets": targets(rows, history, smoke=options.smoke),
    }


def steps(trainer: Trainer, names: Sequence[str], rounds: int, *, counted: bool) -> dict[str, dict[str, Any]]:
    """A row for each method: its times, and (``counted``) what else its step does."""
    made: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    last: dict[str, Tensor] = {}
    marks: dict[str, list[Any]] = {name: [] for name in names}
    # A CUDA graph holds memory once it is made, so make those after everything is counted.
    for name in sorted(names, key=lambda name: METHODS[name].on_cuda):
        made[name] = step = METHODS[name].make(trainer)
        # Twice: a light step may need the lam of the step before it.
        losses = [step.call() for _ in range(2)]
        assert all(loss.isfinite() for loss in losses), f"{name}: expected a finite loss, got {losses}"
        rows[name] = {"about": METHODS[name].about}
        if counted and not METHODS[name].on_cuda:
            rows[name] |= counters.counts(step.call, trainer)

    def timed(name: str, step: Step) -> Side:
        def call() -> None:
            trainer.marks = []
            last[name] = step.call()
            if trainer.marks:
                marks[name].append(trainer.marks)

        return Side(call)

    sides = {name: timed(name, step) for name, step in made.items()}
    pace = Pace(sample=0.0, side=0.0, fewest=rounds, most=rounds)
    found = in_turns(sides, pace, WallClock(trainer.device.type))
    assert all(each.isfinite().all() for each in trainer.model.parameters()), "expected finite weights after the rounds"
    for name, step in made.items():
        step.check()
        assert last[name].isfinite(), f"{name}: expected a finite loss in the last round, got {last[name]}"
        rows[name] |= {"ms": _milliseconds(found[name]), "ratio": rounded(found[name].median / found[BASE].median)}
        if marks[name]:
            # Without the calls before the first round.
            seconds = zip(*map(halves, marks[name][-len(found[name].seconds) :]), strict=True)
            parts = (rounded(1e3 * statistics.median(each)) for each in seconds)
            rows[name] |= dict(zip(("forward_ms", "backward_ms"), parts, strict=True))
        if "peak_bytes" in rows[name]:
            rows[name]["peak_ratio"] = rounded(rows[name]["peak_bytes"] / rows[BASE]["peak_bytes"])
    return rows


def lam_state(lengths: Sequence[int], device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Microseconds of an update of lam after so many steps."""
    e_lin = torch.full((), 1e-6, device=device)
    sides = {}
    for length in lengths:
        controller = AdaptiveLambda(1.0).to(device)
        authors = AuthorsList(LAM, length)

        def begin(controller: AdaptiveLambda = controller, length: int = length) -> None:
            controller.count.fill_(length)

        def shorten(authors: AuthorsList = authors, length: int = length) -> None:
            del authors.history[length:]

        sides[f"AdaptiveLambda {length}"] = Side(lambda controller=controller: controller.update(e_lin), begin)  # type: ignore[misc]
        sides[f"authors {length}"] = Side(lambda authors=authors: authors.update(e_lin), shorten)  # type: ignore[misc]
    pace = Pace(sample=0.0, side=0.0, fewest=2, most=2) if smoke else Pace(sample=0.002, side=0.5, fewest=5)
    found = in_turns(sides, pace, WallClock(device.type))
    return {
        str(length): {name: found[f"{name} {length}"].microseconds() for name in ("AdaptiveLambda", "authors")}
        for length in lengths
    }


def _milliseconds(samples: Samples) -> dict[str, Any]:
    q1, median, q3 = statistics.quantiles(samples.seconds, n=4, method="inclusive")
    values = {"median": median, "q1": q1, "q3": q3}
    return {name: rounded(1e3 * value) for name, value in values.items()} | {"rounds": len(samples.seconds)}


def _setting(options: argparse.Namespace, batch: int) -> Setting:
    return Setting(options.model, options.width, batch, options.dtype, options.device, options.channels_last)


_SMOKE = {"model": "cnn", "width": 2, "batch": 4, "rounds": 2, "batches": (2,), "history": (1, 100)}


def _parser() -> argparse.ArgumentParser:
    def device(text: str) -> torch.device:
        if text not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
        return torch.device(text)

    def method(text: str) -> str:
        if text not in METHODS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(METHODS)}, got {text!r}")
        return text

    class Smoke(argparse.Action):
        """Tiny sizes in place of the defaults; options after it hold."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            vars(namespace).update(_SMOKE, smoke=True)

    options_of = parser("benchmarks.step.bench_step", __doc__)
    options_of.add_argument("--smoke", action=Smoke, nargs=0, default=False, help="tiny sizes, to try the script")
    options_of.add_argument("--model", choices=models.NAMES, default="preact")
    options_of.add_argument("--width", type=number, help="of the model; its own default if left out")
    options_of.add_argument("--batch", type=number, default=128)
    options_of.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 and fp16 by autocast")
    options_of.add_argument("--device", type=device, default=torch.device("cpu"))
    options_of.add_argument("--channels-last", action="store_true")
    options_of.add_argument("--threads", type=number, help="of torch on the CPU")
    options_of.add_argument("--rounds", type=partial(number, low=2), default=20, help="steps of each method")
    options_of.add_argument("--methods", type=listed(method), help=f"names; {BASE} always joins; all if left out")
    options_of.add_argument("--batches", type=listed(number), default=(32, 64, 128), help="batch sizes besides --batch")
    options_of.add_argument(
        "--history", type=listed(number), default=(1, 1000, 100_000), help="steps taken before an update of lam"
    )
    options_of.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench_step.json", help="JSON file, a plot beside it"
    )
    return options_of


if __name__ == "__main__":
    sys.exit(main())
