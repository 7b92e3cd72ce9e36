"""Whole training epochs, data and all: what people run today against ``elle-fast train``; one program, one table.

    make bench-train
    make bench-train ARGS="--quick"
    make bench-train ARGS="--nets preactresnet18 --device cuda --out x.json"

The rows take turns, an epoch of each in every round, each with a model of its own; the first epochs, in which libraries
choose their kernels and torch.compile compiles, are not counted. Where time goes (torch's profiler), peak memory (a
process of its own for each row), and forward and backward alone in each layout and precision are measured as well.
JSON with provenance goes to ``--out``, rewritten after each part, and a picture beside it; without ``--out`` to
runs/bench_train.json, which git ignores. A missed target is shown, and is no error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.program import ROOT, command, listed, number, parser
from benchmarks.harness.tables import rounded
from benchmarks.harness.timing import NOT_MEASURED, Pace, Side, WallClock, in_turns, threads
from benchmarks.step import train_layouts, train_memory, train_parts
from benchmarks.step.train_rows import NETS, ROWS, TINY, Net, Place, Training
from benchmarks.step.train_tables import plot, tables, targets
from elle_fast._core.devices import fastest_convolutions
from elle_fast._core.files import write_json
from elle_fast.recipes.provenance import provenance

ABOUT = {
    "ms": "wall clock of an epoch over its steps: batches drawn and augmented, loss, backward, optimiser, log; device "
    "idle before and after; median and quartiles over the rounds. Of elle-fast train, what follows an epoch's last "
    "step is left out, validation and checkpoint among it, as real epochs are longer; of all rows, a first epoch, in "
    "which models are compiled",
    "images_per_second": "of the median",
    "light, full": "kinds of steps with --fast, timed apart: all steps of an epoch are of one kind, as lam is held",
    "host_ms": "of ms, outside of the steps: batches, log, schedule; median. On the CPU, where a step returns when it "
    "is done",
    "full_share": "the part of steps that are full in the mix of both kinds, as asked for; the default is that of a "
    "run at 16/255, while these rows are at 8/255",
    "data": "random pictures, padded by 4 pixels, cropped and flipped; for the authors and the plain loop by Pillow in "
    "torch's DataLoader, as in the authors' trainer, with so many workers",
    **train_memory.ABOUT,
    **train_parts.ABOUT,
    **train_layouts.ABOUT,
}
PARTS = ("times", "memory", "layouts", "profile")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options_of = _parser()
    options = options_of.parse_args(argv)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        options_of.error("device: expected one that is there, got cuda, and torch sees no CUDA device")
    nets = TINY if options.quick else NETS
    with threads(options.threads), _compiled_or_not_at_all(), fastest_convolutions():
        if options.peak is not None:
            name, row = options.peak
            with Place(options.device, options.workers) as place:
                print(json.dumps(train_memory.peak(nets[name], ROWS[row], place)))
            return 0
        measure(options, {name: nets[name] for name in options.nets}, command(options_of, options))
    return 0


def measure(options: argparse.Namespace, nets: dict[str, Net], words: list[str]) -> dict[str, Any]:
    """Everything, written after each part."""
    began, content = time.monotonic(), _beginning(options, nets)

    def done(part: str) -> None:
        content["seconds"] = round(time.monotonic() - began, 1)
        _say(f"{part}: done after {content['seconds']:.0f} s")
        content["targets"] = targets(content)
        write_json(options.out, content | provenance(words))

    for name, net in nets.items():
        rows = [row for row in options.rows if name in options.compiled or not ROWS[row].compiled]
        found: dict[str, Any] = {"rows": {row: {"about": ROWS[row].about} for row in rows}}
        content["nets"][name] = {**vars(net), **found}
        if "times" in options.parts:
            for row, values in times(net, rows, options).items():
                found["rows"][row] |= values
            done(f"{name}: times")
        if "memory" in options.parts:
            for row in (row for row in options.memory if row in rows):
                found["rows"][row] |= train_memory.child(name, row, options)
            done(f"{name}: memory")
        if "layouts" in options.parts and name in options.compiled:
            content["nets"][name]["layouts"] = train_layouts.times(net, options.device, options.rounds)
            done(f"{name}: layouts")
        if "profile" in options.parts:
            profiled = [row for row in train_parts.PROFILED if row in rows]
            content["nets"][name]["profile"] = train_parts.profiles(net, profiled, options)
            done(f"{name}: profile")
    plot(content | provenance(words), options.out.with_suffix(".svg"))
    print(tables(content | provenance(words)))
    print(f"written: {options.out.name}, {options.out.with_suffix('.svg').name}")
    return content


def _compiled_or_not_at_all() -> AbstractContextManager[Any]:
    """A model with too many graphs is an error, where torch would go on without compiling."""
    import torch._dynamo.config as config

    known = hasattr(config, "fail_on_recompile_limit_hit")  # since torch 2.5
    return config.patch(fail_on_recompile_limit_hit=True) if known else nullcontext()


def _beginning(options: argparse.Namespace, nets: dict[str, Net]) -> dict[str, Any]:
    capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return {
        "note": NOT_MEASURED if options.quick else None,
        "quick": options.quick,
        "about": ABOUT,
        "setting": {
            "device": options.device.type,
            "rounds": options.rounds,
            "workers": options.workers,
            "full_share": options.full_share,
            **{name: bool(capable.get(name)) for name in ("amx_bf16", "avx512_bf16")},
        },
        "load_before": os.getloadavg()[0],
        "nets": {},
    }


def times(net: Net, names: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each row, and of each of its kinds of steps: milliseconds of a step, images per second, the host's part."""
    sides: dict[str, Side] = {}
    seen: dict[str, list[tuple[float, float]]] = {}
    pace = Pace(sample=0.0, side=0.0, fewest=options.rounds, most=options.rounds)
    with Place(options.device, options.workers) as place:
        for name in names:
            training = ROWS[name].make(net, place)
            for kind in ROWS[name].kinds or ("",):
                side = f"{name}/{kind}"
                seen[side] = []
                sides[side] = _side(training, net, kind, seen[side], f"{net.model}, {side.strip('/')}")
        found = in_turns(sides, pace, WallClock(options.device.type))
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for side, samples in found.items():
        name, _, kind = side.partition("/")
        epochs = samples.seconds
        own = seen[side][-len(epochs) :]  # without the first epochs
        if own:
            epochs = [whole - after for whole, (_, after) in zip(epochs, own, strict=True)]
        q1, median, q3 = (1e3 * each / net.batches for each in statistics.quantiles(epochs, n=4, method="inclusive"))
        values: dict[str, Any] = {
            "ms": {"median": rounded(median), "q1": rounded(q1), "q3": rounded(q3), "rounds": len(epochs)},
            "images_per_second": rounded(1e3 * net.batch / median),
        }
        if own and options.device.type == "cpu":
            outside = [whole - inside for whole, (inside, _) in zip(epochs, own, strict=True)]
            values["host_ms"] = rounded(1e3 * statistics.median(outside) / net.batches)
        rows[name] |= {kind: values} if kind else values
    return rows


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _side(training: Training, net: Net, kind: str, seen: list[tuple[float, float]], name: str) -> Side:
    """An epoch; to ``seen`` go the seconds of it that are within steps, and those after the last one."""
    recipe = training.recipe
    if recipe is None:
        return Side(_announced(training.epoch, name))

    def call() -> None:
        steps, ends, counts = recipe.in_steps, recipe.after_steps, recipe.run.step_counts()
        recipe.epoch()
        seen.append((recipe.in_steps - steps, recipe.after_steps - ends))
        if kind:
            taken = recipe.run.step_counts()[f"{kind}_steps"] - counts.get(f"{kind}_steps", 0)
            assert taken == net.batches, f"expected {net.batches} {kind} steps, got {taken}"

    return Side(_announced(call, name), (lambda: recipe.hold(kind)) if kind else None)


def _announced(call: Callable[[], Any], name: str) -> Callable[[], None]:
    """The call, whose first time is printed: that of a compiled training is long."""
    began: list[float] = []

    def announced() -> None:
        first = not began
        began.append(time.perf_counter())
        call()
        if first:
            _say(f"{name}: first epoch {time.perf_counter() - began[0]:.1f} s")

    return announced


_QUICK: dict[str, Any] = {"rounds": 2}


def _parser() -> argparse.ArgumentParser:
    def device(text: str) -> torch.device:
        if text not in ("cpu", "cuda"):
            raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
        return torch.device(text)

    def one_of(names: Sequence[str]) -> Callable[[str], str]:
        def read(text: str) -> str:
            if text not in names:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, got {text!r}")
            return text

        return read

    def share(text: str) -> float:
        if not 0 <= (value := float(text)) <= 1:
            raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text}")
        return value

    def child(text: str) -> tuple[str, str]:
        net, _, row = text.partition("/")
        return one_of(list(NETS))(net), one_of(list(ROWS))(row)

    class Quick(argparse.Action):
        """Tiny sizes in place of the defaults; options after it hold."""

        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            vars(namespace).update(_QUICK, quick=True)

    options_of = parser("benchmarks.step.bench_train", __doc__)
    options_of.add_argument("--quick", action=Quick, nargs=0, default=False, help="tiny sizes, to try the program")
    options_of.add_argument("--nets", type=listed(one_of(list(NETS))), default=tuple(NETS), help="names")
    options_of.add_argument("--rows", type=listed(one_of(list(ROWS))), default=tuple(ROWS), help="names")
    options_of.add_argument("--parts", type=listed(one_of(PARTS)), default=PARTS, help=", ".join(PARTS))
    options_of.add_argument(
        "--compiled",
        type=listed(one_of(list(NETS))),
        default=("preact", "preactresnet18"),
        help="nets with rows that compile, which takes minutes",
    )
    options_of.add_argument(
        "--memory",
        type=listed(one_of(list(ROWS))),
        default=("authors", "plain", "elle-a", "fgsm", "fast", "fgsm bf16", "fast bf16", "fast bf16 compiled"),
        help="rows whose peak memory is measured",
    )
    options_of.add_argument("--rounds", type=lambda text: number(text, low=2), default=5, help="epochs of each row")
    options_of.add_argument("--device", type=device, default=torch.device("cpu"))
    options_of.add_argument("--threads", type=number, help="of torch on the CPU")
    options_of.add_argument(
        "--workers", type=lambda text: number(text, low=0), default=0, help="processes of torch's DataLoader"
    )
    options_of.add_argument(
        "--full-share",
        type=share,
        default=0.78,
        help="of --fast: 0.78 in 30 epochs of CIFAR-10 at 16/255, 0.49 in 12 of 10,000 images",
    )
    options_of.add_argument("--peak", type=child, help=argparse.SUPPRESS)
    options_of.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench_train.json", help="JSON file, a picture beside it"
    )
    return options_of


if __name__ == "__main__":
    sys.exit(main())
