"""Can lam be set without a grid? Forms of a weight without a tuned number, on seven data and eps, beside the tuned one.

    python -m benchmarks.studies.auto_lam --root DATA --work FOLDER --out benchmarks/results/auto_lam.json

DATA holds mnist.npz and cifar10-jpeg.tar.xz. FOLDER gets a file of each run when it is done, and its weights. What
is there is not run again, so a study that was cut off goes on with the same command. ``--only TEXT`` runs the cells
whose name contains it, ``--limit`` the first so many. ``--strong`` adds PGD-50-10, on the first 200 test samples, to
FGSM, the tuned lam and the default.

A run is named cell, variant, seed. The variants: FGSM; ELLE-A with the lam of the literature or of earlier trials here
("tuned"); and forms of the weight that ELLE-A takes on at a detection, with t the detector's threshold, ce the
cross-entropy, g_ce and g_E the gradients of ce and E_lin in the packed rows, ~ a mean of logarithms with decay 0.99
over the steps without a detection:

- slope: rho / (2 sqrt t), which is :class:`elle_fast.AutoLambda`
- gradient: rho ~(|g_ce| / |g_E|)
- penalty: rho ~(ce / E_lin)
- threshold: rho ce / t
- gradient-threshold: rho |g_ce| / |g_E| sqrt(E_lin / t): the ratio of the gradients where E_lin is t

In a row: accuracies; ``e_lin`` on the test samples; ``lam``, median and largest over the steps; ``detections``;
``ended``: "nan" or "stands".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness.program import command, number, parser, write_lines
from benchmarks.harness.tables import markdown, spread
from benchmarks.studies import beyond_images
from benchmarks.studies.auto_lam_cells import Cell, Images, Vectors
from benchmarks.studies.auto_lam_forms import FORMS, measuring
from elle_fast import AdaptiveLambda, ELLELoss, loss
from elle_fast._core.files import write_atomically, write_json
from elle_fast.recipes.provenance import commit, machine, provenance
from elle_fast.weighted_sum import weighted_loss

_DEFAULT = "slope 50"
_CIFAR = Images(
    "cifar10-8", "image-folder", 8 / 255, 4_000, (0, 1), "preact", 8, 6, 0.2, root="cifar10-jpeg.tar.xz", limit=4_608
)
CELLS: tuple[Cell, ...] = (
    *(Vectors(example) for example in beyond_images.EXAMPLES),
    Images("digits", "digits", 0.3, 300, (0, 1, 2), "cnn", 16, 40, 0.1, batch_size=64, weight_decay=0.0),
    replace(_CIFAR, name="cifar10-16", eps=16 / 255),
    Images("mnist", "mnist", 0.3, 1_000, (0, 1, 2), "cnn", 8, 5, 0.1, root="mnist.npz", limit=4_608),
    replace(_CIFAR, name="cifar10-26", eps=26 / 255),
    _CIFAR,
)
VARIANTS = ("fgsm", "tuned", _DEFAULT, "slope 30")
# On the first seed.
OTHERS = (
    *("slope 15", "slope 100", "gradient 10", "gradient 30", "penalty 0.03", "penalty 0.3"),
    *("threshold 0.2", "threshold 1", "gradient-threshold 20", "gradient-threshold 60"),
)
SMOKE = (
    Vectors(replace(beyond_images.EXAMPLES[0], epochs=10), seeds=(0,)),
    Images("digits", "digits", 0.3, 300, (0,), "cnn", 2, 1, 0.1, batch_size=64),
)


def jobs(cells: Sequence[Cell]) -> Iterator[tuple[Cell, str, int]]:
    """The most telling ones first, so that a study that is cut off says something."""
    for place in range(max(len(cell.seeds) for cell in cells)):
        for cell in cells:
            for variant in VARIANTS if place < len(cell.seeds) else ():
                yield cell, variant, cell.seeds[place]
        for cell in cells[:3] if place == 0 else cells[3:] if place == 1 else ():
            for variant in OTHERS:
                yield cell, variant, cell.seeds[0]


def criterion_of(cell: Cell, variant: str) -> ELLELoss:
    """The criterion of a variant."""
    if variant == "fgsm":
        return ELLELoss(cell.eps, lam=0.0)
    if variant == "tuned":
        return ELLELoss(cell.eps, lam=AdaptiveLambda(cell.lam))
    form, rho = variant.split()
    return ELLELoss(cell.eps, lam=FORMS[form](float(rho)))


def run(cell: Cell, variant: str, seed: int, folder: Path | None, weights: Path) -> dict[str, Any]:
    """Train one model, keep its weights, and test it; its row."""
    dataset = cell.load(folder, seed)
    model, criterion = cell.build(dataset, seed), criterion_of(cell, variant)
    lams: list[float] = []
    detections = 0
    began = time.perf_counter()
    row: dict[str, Any] = {"ended": "stands"}
    with patch.object(loss, "weighted_loss", partial(measuring, then=weighted_loss)):
        for _ in cell.steps(criterion, model, dataset, seed):
            lam = criterion.stats["lam"].item()
            detections += bool(lams) and lam > lams[-1]
            lams.append(lam)
            if not math.isfinite(criterion.stats["loss"].item()):
                row["ended"] = "nan"
                break
    row |= {"seconds": time.perf_counter() - began, "detections": detections}
    row["lam"] = [statistics.median(lams), max(lams)]
    if row["ended"] == "stands":
        write_atomically(weights, lambda file: torch.save(model.state_dict(), file))
        row |= cell.test(model, dataset)
    return row


def strong(cell: Cell, seed: int, folder: Path | None, weights: Path) -> float:
    """Accuracy under PGD-50-10 of a run that is done."""
    dataset = cell.load(folder, seed)
    model = cell.build(dataset, seed)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return float(cell.strong(model.eval(), dataset))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, writing a file after each run; gather them; print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    # The tensors are so small that a second thread costs more than it saves.
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    cells = SMOKE if options.smoke else CELLS
    todo = [job for job in jobs(cells) if options.only in f"{job[0].name}, {job[1]}, seed {job[2]}"]
    for cell, variant, seed in todo[: options.limit]:
        name = f"{cell.name}, {variant}, seed {seed}"
        path = options.work / f"{name.replace(', ', '_').replace(' ', '-')}.json"
        weights = path.with_suffix(".pt")
        row = json.loads(path.read_text()) if path.exists() else None
        if row is None:
            row = {"cell": cell.name, "variant": variant, "seed": seed}
            row |= run(cell, variant, seed, options.root, weights) | {"commit": commit(), "machine": machine()}
            write_json(path, row)
            print(name, {key: row.get(key) for key in ("ended", "clean", "fgsm", "pgd-20", "lam")}, flush=True)
        if options.strong and variant in VARIANTS[:3] and row["ended"] == "stands" and "pgd-50-10" not in row:
            row["pgd-50-10"] = strong(cell, seed, options.root, weights)
            write_json(path, row)
    found = [json.loads(path.read_text()) for path in sorted(options.work.glob("*.json"))]
    rows = {f"{row['cell']}, {row['variant']}, seed {row['seed']}": row for row in found}
    settings = {cell.name: _settings(cell) for cell in cells}
    about = {"about": _about(), "smoke": options.smoke, "cells": settings, "rows": rows}
    write_lines(options.out, {**about, **provenance(command(options_of, options))})
    print(table(rows))
    return 0


def _settings(cell: Cell) -> dict[str, Any]:
    if isinstance(cell, Images):
        return asdict(cell)
    example = cell.example
    return {
        **asdict(example),
        "load": example.load.__name__,
        "build": example.build.__name__,
        "lam": cell.lam,
        "seeds": cell.seeds,
    }


def table(rows: dict[str, Any]) -> str:
    """Markdown: accuracies in %, mean and, in brackets, lowest to highest of several seeds; a NaN counts as 0."""
    head = ["cell", "variant", "runs", "NaN", "clean", "FGSM", "PGD-20", "PGD-50-10", "median lam", "highest"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault((row["cell"], row["variant"]), []).append(row)
    lines = []
    order = [cell.name for cell in CELLS]
    for (cell, variant), group in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        lost = [row["ended"] == "nan" for row in group]
        columns = [[row.get(name, 0.0) for row in group] for name in ("clean", "fgsm", "pgd-20")]
        columns.append([row["pgd-50-10"] for row in group if "pgd-50-10" in row])
        lams = [statistics.median(row["lam"][place] for row in group) for place in (0, 1)]
        texts = [*(spread(column) for column in columns), *(f"{lam:.0f}" for lam in lams)]
        lines.append((cell, variant, f"{len(group)}", f"{sum(lost)}", *texts))
    return markdown(head, lines)


def _about() -> str:
    return " ".join("\n".join((__doc__ or "").split("\n\n")[3:]).split())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.auto_lam", __doc__)
    options_of.add_argument("--root", type=Path, help="the folder of mnist.npz and cifar10-jpeg.tar.xz")
    options_of.add_argument("--work", type=Path, required=True, help="the folder of the runs")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--only", default="", help="the runs whose name contains this")
    options_of.add_argument("--limit", type=number, help="the first runs only")
    options_of.add_argument("--strong", action="store_true", help="PGD-50-10 too")
    options_of.add_argument("--smoke", action="store_true", help="two tiny cells: measures nothing")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
