"""Draw the figures of benchmarks/results anew from the JSON files beside them; nothing is measured or trained.

    make figures                        # all of them
    make figures ARGS=bench_ops.json      # those of one file

Each is drawn by the function that the program with the measurement calls at its end. Of the figures of a comparison of
methods, those that a page shows are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.detector.figures import draw as draw_detectors
from benchmarks.detector.packed import unpack
from benchmarks.guard.figure import draw as draw_rescue
from benchmarks.harness.program import parser
from benchmarks.ops.ops_tables import plot as plot_ops
from benchmarks.paper.figures import draw as draw_comparison
from benchmarks.paper.summary import renamed
from benchmarks.scale.scale_tables import plot as plot_scale
from benchmarks.step.step_tables import plot as plot_step
from benchmarks.step.train_tables import plot as plot_train
from benchmarks.tables.registry import RESULTS
from elle_fast._core import checks

Content = dict[str, Any]


def _one(plot: Callable[[Content, Path], None]) -> Callable[[Content, Path], object]:
    return lambda content, out: plot(content, out.with_suffix(".svg"))


def _detectors(content: Content, out: Path) -> None:
    draw_detectors(content, unpack(RESULTS / "detector_traces.npz"), out)


def _comparison(content: Content, out: Path) -> None:
    draw_comparison(renamed(content), out)


# By JSON file: how its figures are drawn, and what the pages show of them.
FIGURES: dict[str, tuple[Callable[[Content, Path], object], tuple[str, ...]]] = {
    "bench_ops.json": (_one(plot_ops), ("bench_ops",)),
    "bench_scale.json": (_one(plot_scale), ("bench_scale",)),
    "bench_step.json": (_one(plot_step), ("bench_step",)),
    "bench_train.json": (_one(plot_train), ("bench_train",)),
    "cifar10-ablations.json": (_comparison, ("cifar10-ablations-forms",)),
    "cifar10-jpeg-levers.json": (_comparison, ("cifar10-jpeg-levers-eps8", "cifar10-jpeg-levers-eps16")),
    "cifar10-small.json": (
        _comparison,
        tuple(f"cifar10-small-{name}" for name in ("eps8", "eps16", "eps26", "lam", "robust", "time")),
    ),
    "detector_curves.json": (
        _detectors,
        ("detector_curves", "detector_curves-collapse", "detector_curves-healthy"),
    ),
    "guard_trainings.json": (lambda content, out: draw_rescue(content["rows"], out), ("guard_trainings",)),
    "mnist-small.json": (_comparison, ("mnist-small-eps76.5",)),
}


def redraw(name: str, folder: Path) -> list[Path]:
    """Draw the figures of one JSON file into ``folder``; their paths."""
    draw, wanted = FIGURES[checks.choice("file", name, FIGURES)]
    content = json.loads((RESULTS / name).read_text())
    with TemporaryDirectory(dir=folder) as drawn:
        draw(content, Path(drawn) / name)
        return [(Path(drawn) / f"{each}.svg").replace(folder / f"{each}.svg") for each in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and say which files were written."""
    options_of = parser("benchmarks.tables.redraw", __doc__)
    options_of.add_argument("files", nargs="*", metavar="FILE", help="JSON files of benchmarks/results; by default all")
    options = options_of.parse_args(arguments)
    for name in options.files or FIGURES:
        for path in redraw(name, RESULTS):
            print(path.relative_to(RESULTS))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"redraw: {problem}")
