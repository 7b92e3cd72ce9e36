"""Trainings with ELLE-A's detector at work: what each rule costs, and whether any model collapses.

    python -m benchmarks.detector.closed_loop --root cifar10-jpeg.tar.xz --only n-fgsm-eps16-seed0

A cell is `elle-fast train` in the setting cifar10-medium of benchmarks/paper (narrow PreActResNet, all images with crop
and flip) for 30 epochs, and then PGD-50-10 and AutoAttack on the same 1,000 test images as clean and PGD-20. A variant
is a base and a rule: "n-fgsm" is N-FGSM alone, "n-fgsm+paper" and "n-fgsm+relative" are ELLE-A `fast` around it with
that rule of :class:`elle_fast.AdaptiveLambda`, "fgsm+constant" is ELLE. A variant clamps its adversarial points as its
base does, so that they differ by E_lin alone. Training is in bf16, which takes half of the time of fp32 where the
processor has it, with the triplets in fp32; all attacks that evaluate are in fp32.

Cells are run in order of worth. A cell that was stopped goes on where it was; one whose row is whole is not run again.
--only chooses cells by name, or by patterns such as "n-fgsm+*-eps16-seed0". Several processes may share --work and
--out, on one machine: each takes the next cell that no other one is at.

In a row: "accuracy" is that of the last weights. "val_pgd" is PGD-10 on the validation images after each epoch.
"ended" is "nan", "collapsed" or "never robust", as `elle-fast train` says, or "stands".
"detections" is the number of steps in which the detector set lam to lam_max; "alarms" are those of them that count, as
in benchmarks/detector/curves.py: none in the 20 steps after another one that does. "mean_lam" is over all steps,
"full_share" the share of steps with the gradient of E_lin. "units" is the mean cost of a step in the units of
:class:`elle_fast.methods.Method`, of which FGSM takes 5. "seconds" is wall clock of the training alone, on a
machine that has other work too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from ctypes import c_float
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.detector.alarms import counted
from benchmarks.detector.closed_loop_tables import table, targets
from benchmarks.harness.program import ROOT, command, listed, parser
from benchmarks.harness.rows import Row, add_rows, chosen, read_rows, taken
from benchmarks.paper.cells import FAILED, HISTORY, Cell, Strong, read_json
from benchmarks.paper.settings import SETTINGS
from elle_fast import data, methods
from elle_fast.presets import FAST
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.train import InterruptedRunError

# Each step is logged, for lam; and the average of the weights, which nothing here looks at, would be attacked too.
CONFIG = replace(SETTINGS["cifar10-medium"].config, epochs=30, average=None, log_every=1, checkpoint_every=0)
STRONG = Strong("pgd-50-10,autoattack", masking=False)
RULES = ("paper", "relative")
# N-FGSM clamps its points; with ELLE-A around it the paper's does not, which has nothing to do with a detector.
_ADAPTIVE: dict[str, dict[str, Any]] = {
    "fgsm": {"method": "elle-a"},
    "n-fgsm": {"method": "n-fgsm+elle-a", "clamp": "attack"},
    "rs-fgsm": {"method": "rs-fgsm+elle-a", "clamp": "attack"},
}
# By name, what differs from CONFIG.
VARIANTS: dict[str, dict[str, Any]] = {
    **{base: {"method": base} for base in _ADAPTIVE},
    "fgsm+constant": {"method": "elle"},
    **{f"{base}+{rule}": {**own, **FAST, "rule": rule} for base, own in _ADAPTIVE.items() for rule in RULES},
}
_FIRST = ("n-fgsm", "n-fgsm+relative", "fgsm+relative", "fgsm+paper", "n-fgsm+paper")
_SECOND, _LAST = ("fgsm", "fgsm+constant"), ("rs-fgsm+relative", "rs-fgsm", "rs-fgsm+paper")


def jobs() -> list[tuple[str, int, int]]:
    """Variant, eps in 255ths and seed of each cell, the most telling ones first."""
    found = [(name, 16, seed) for seed in (0, 1, 2) for name in _FIRST]
    found += [(name, 16, seed) for seed in (0, 1) for name in _SECOND]
    found += [(name, eps, seed) for seed in (0, 1) for eps in (8, 26) for name in (*_FIRST, *_SECOND)]
    return found + [(name, eps, seed) for seed in (0, 1) for eps in (16, 8, 26) for name in _LAST]


def cell_of(variant: str, eps: int, seed: int, work: Path, root: str | None) -> Cell:
    """The cell of a variant; its folder's name is that of its row."""
    config: TrainConfig = replace(CONFIG, root=root, eps=eps / 255, seed=seed, device="cpu", **VARIANTS[variant])
    return Cell(work, None, variant, config, STRONG)


def alarms(lam: Sequence[float], lam_max: float) -> tuple[int, list[int]]:
    """From lam in each step: in how many it was set to lam_max, and the steps of those that count, from 1."""
    highest = c_float(lam_max).value  # rounded as lam is
    detections = np.array([each == highest for each in lam], dtype=bool)
    return int(detections.sum()), [step + 1 for step in counted(detections)]


def units(config: TrainConfig, base: str, full_share: float | None) -> float:
    """Mean cost of a step: of the triplets, a light one has the forward passes alone, a third of a full one's."""
    own = methods.find(base).units
    added = config.triplet_fraction * (methods.find(config.method).units - own)
    full = 1.0 if full_share is None else full_share
    return own + added * (full + (1 - full) / 3)


def row_of(cell: Cell) -> Row:
    """What is known of a cell that is trained, or whose training failed."""
    base, _, rule = cell.name.partition("+")
    about = {"variant": cell.name, "base": base, "rule": rule or None, "seed": cell.config.seed}
    about["eps"] = round(255 * cell.config.eps)
    if (error := cell.failure()) is not None:
        failed = read_json(cell.folder / FAILED)
        failed["config"].pop("root")
        return {**about, "ended": "nan", **failed, "error": error}
    run = cell.read()
    lam = [step["lam"] for step in read_json(cell.folder / HISTORY)["steps"]]
    val_pgd = [epoch["val_pgd"] for epoch in run["epochs"]]
    never_robust = run["never_robust"]
    row: Row = {**about, "ended": "collapsed" if run["collapsed"] else "never robust" if never_robust else "stands"}
    found = {**run["accuracy"], **(run["strong"] or {"accuracy": {}})["accuracy"]}
    row["accuracy"] = {name: each["accuracy"] for name, each in found.items()}
    if rule in RULES:
        row["detections"], row["alarms"] = alarms(lam, run["config"]["lam"])
    row["mean_lam"] = statistics.mean(lam) if lam else None
    row["full_share"] = run["full_share"]
    row["units"] = units(cell.config, base, run["full_share"])
    row["val_pgd"] = [round(each, 4) for each in val_pgd]
    row["seconds"] = round(run["training_seconds"], 1)
    kept = ("collapsed_in_epoch", "machine", "versions", "commit", "commits", "config")
    return {**row, "attacked": run["strong"] is not None, **{name: run[name] for name in kept}}


def is_whole(cell: Cell, row: Row | None) -> bool:
    """Whether a row leaves nothing to do; ValueError if it is one of another setting."""
    return row is not None and cell.kept(row) and (row["ended"] == "nan" or row["attacked"])


def run(cell: Cell, dataset: data.Dataset) -> Iterator[None]:
    """Train and attack a cell, as far as that is not done; yields when there is a new row."""
    failed = cell.failure() is not None or (not cell.is_done() and not cell.train(dataset))
    yield
    if not failed:
        cell.attack(dataset)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, writing a row after each training and its attacks; 130 if asked to stop."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    about = {"about": _about(), "variants": VARIANTS}
    root = None if options.root is None else str(options.root)
    dataset: data.Dataset | None = None

    def is_left(cell: Cell) -> bool:
        return not is_whole(cell, read_rows(options.out).get(cell.folder.name))

    def write(cell: Cell) -> None:
        add_rows({cell.folder.name: row_of(cell)}, options.out, about, provenance(command(options_of, options)))

    try:
        asked = chosen({f"{job[0]}-eps{job[1]}-seed{job[2]}": job for job in jobs()}, options.only)
    except ValueError as error:
        options_of.error(str(error))
    cells = [cell_of(*job, options.work, root) for job in asked]
    for cell in taken(cells, lambda cell: cell.folder, is_left):
        print(cell.folder.name, file=sys.stderr)
        dataset = cell.config.read_data() if dataset is None else dataset
        try:
            for _ in run(cell, dataset):
                write(cell)
        except InterruptedRunError as error:
            print(error, file=sys.stderr)
            return 130
    rows = read_rows(options.out)
    print(table(rows), "", targets(rows), sep="\n")
    return 0


def _about() -> str:
    return " ".join((__doc__ or "").split("\n\n")[-1].split())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.detector.closed_loop", __doc__)
    options_of.add_argument("--root", type=Path, help="JPEG-compressed CIFAR-10")
    options_of.add_argument("--work", type=Path, default=Path("runs") / "detector", help="folder of the runs")
    out = ROOT / "benchmarks" / "results" / "detector_closed_loop.json"
    options_of.add_argument("--out", type=Path, default=out, help="the JSON file")
    options_of.add_argument("--only", type=listed(str), help="NAME,...: these cells")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
