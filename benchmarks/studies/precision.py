"""What low precision hides of E_lin: its floor, and the smallest rise that ELLE-A's detector sees.

    python -m benchmarks.studies.precision --run RUN_FOLDER --root cifar10-jpeg.tar.xz --out precision.json

For trained models (folders that ``elle-fast train`` wrote) and batches of their training images, in train mode as in a
step, the residual r of each triplet is found in float64, and in every way of precision_ways.py on the same points.

floor: the mean of (r - exact r)^2, the E_lin that would be measured if it were 0. e_lin, measured: the mean over the
batches of the true E_lin (of the way's own points) and of what the way makes of it. spread: the standard deviation of
the true E_lin between batches, rounding_spread that of what rounding adds to it. threshold: AdaptiveLambda's mean + 2
std of the measured values. The true E_lin rises if the ball of the triplets grows to (1 + rise / E_lin)^(1/4) eps, as
it is a fourth power of their distance at first. seen: the smallest rise of the true E_lin (of Algorithm 1's points)
with which half of the batches are above the threshold, between two of the rises tried; null if none was large enough.
alarms: the part of the batches above it, with no rise, and with one of about 1e-7. low_alpha: what bf16 makes of E_lin
if every alpha is 0, where r = 0, or 1/64, where r is small and rounding is not. own_threshold: that of the run itself
at its end, with the history of all its steps; null without ELLE-A, or with a window. The tables' last column: over how
many batches the mean of E_lin shows a rise of 1e-7 as 2 standard deviations.

What the file holds is not measured again: a run is known by its folder's name, method, eps and seed, with the device,
the number of batches and their size. Machine and versions are those of the last call.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import terminal
from benchmarks.studies.precision_ways import BF16, EXACT, Way, ways
from elle_fast import AdaptiveLambda, data, functional
from elle_fast._core.files import write_json
from elle_fast.ops.layout import triplet_rows
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.train import CHECKPOINT

RISE = 1e-7  # the target of issue 18
RISES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of the true E_lin
FRACTIONS = (1.0, FAST["triplet_fraction"])
LOW_ALPHAS = (0.0, 1 / 64)
_COLUMNS = ("e_lin", "measured", "floor", "spread", "rounding_spread", "seen")

Batch = tuple[Tensor, Tensor, Tensor]  # x, y and the seed of its noise
Residuals = list[Tensor]  # of a batch, from each forward pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the runs that the JSON file does not hold, writing it after each; print the tables."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.batches < 2 or options.batch < 1:
        # A standard deviation needs two.
        options_of.error(f"expected --batches >= 2 and --batch >= 1, got {options.batches} and {options.batch}")
    device = torch.device(options.device)
    root = None if options.root is None else str(options.root)
    sizes = {"batches": options.batches, "batch": options.batch}
    about_call = provenance(command(options_of, options))
    of_rows = {name: about_call.pop(name) for name in ("commit", "command")}
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    about = " ".join((__doc__ or "").split("\n\n", 2)[-1].split())
    for folder in options.run:
        model, config, saved = checkpoint.load_model(folder / CHECKPOINT)
        run = f"{config.method}, eps {255 * config.eps:.3g}/255, seed {config.seed}"
        key = {"run": run, "folder": folder.resolve().name, "device": device.type, **sizes}
        if any(key.items() <= row.items() for row in rows):
            continue
        threshold = {"own_threshold": own_threshold(saved["criterion"])}
        about_run = {**key, "data": config.data, "model": f"{config.model}, width {config.width}", **threshold}
        found = measure(model, config, root, device, **sizes)
        rows += [{**about_run, **row, **of_rows} for row in found]
        write_json(options.out, {"about": about, "rows": rows, **about_call})
    print(table(rows))
    return 0


def measure(
    model: nn.Module, config: TrainConfig, root: str | None, device: torch.device, *, batches: int, batch: int
) -> list[dict[str, Any]]:
    """A row for each way and part of the batch, of a run's model on its own training images, which must suffice."""
    split = config.read_data(root).train.to(device)
    if len(split) < batches * batch:
        raise ValueError(f"batches: expected at most {len(split) // batch}, as there are images for, got {batches}")
    shuffled = data.batches(split, batch, seed=config.seed, epoch=0, augment=bool(config.augment))
    drawn = [
        (x.contiguous(memory_format=torch.channels_last), y, torch.tensor(i, device=device))
        for i, (x, y) in islice(enumerate(shuffled), batches)
    ]
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    rows = []
    for fraction in FRACTIONS:
        by_way = compare(model, config.eps, fraction, drawn)
        part = {"samples": triplet_rows(batch, fraction)}
        rows += [{**part, "precision": name, **row} for name, row in by_way.items()]
    return rows


def compare(model: nn.Module, eps: float, fraction: float, drawn: Sequence[Batch]) -> dict[str, dict[str, Any]]:
    """What each way, by name, finds of E_lin on the first samples of each batch."""
    found_by = partial(found, eps=eps, fraction=fraction, drawn=drawn)
    compared, exact_model = ways(drawn[0][0].device), copy.deepcopy(model).double()
    exact = {
        each: found_by(replace(EXACT, triplets=each[0], spread=each[1]), exact_model, dtype=torch.float64)
        for each in {way.points_drawn for way in compared.values()}
    }
    at_rest = {name: found_by(way, model) for name, way in compared.items()}
    e_lin = statistics.mean(map(e_lin_of, exact[EXACT.points_drawn]))
    # fp32, whose floor is nothing beside it, tells how far the true E_lin rises.
    risen = [
        {name: e_lins(found_by(way, model, eps=(1 + rise / e_lin) ** 0.25 * eps)) for name, way in compared.items()}
        for rise in (RISE, *(share * e_lin for share in RISES))
    ]
    true_rises = [statistics.mean(each["fp32"]) - e_lin for each in risen]
    rows = {}
    for name, way in compared.items():
        seen = detection(e_lins(at_rest[name]), [each[name] for each in risen], true_rises)
        rows[name] = {**rounding(at_rest[name], exact[way.points_drawn]), **seen}
    rows["bf16"]["low_alpha"] = {
        f"{alpha:g}": statistics.mean(e_lins(found_by(BF16, model, alpha=alpha))) for alpha in LOW_ALPHAS
    }
    return rows


def found(
    way: Way,
    model: nn.Module,
    *,
    eps: float,
    fraction: float,
    drawn: Sequence[Batch],
    dtype: torch.dtype = torch.float32,
    alpha: float | None = None,
) -> list[Residuals]:
    """The residuals of each batch; ``dtype``: the model's; ``alpha``: instead of one drawn for each triplet."""
    of_batches = []
    for x, y, seed in drawn:
        part = triplet_rows(len(x), fraction)
        given: Any = "uniform" if alpha is None else torch.full((way.triplets * part,), alpha, device=x.device)
        options = {"alpha": given, "triplets": way.triplets, "fraction": fraction}
        points, alphas = functional.pack_points(x, None, way.spread * eps, seed=seed, **options)
        of_batches.append(way.residuals(model, points.to(dtype), y, alphas))
    return of_batches


def e_lin_of(residuals: Residuals) -> float:
    """E_lin of a batch: the mean square, or of two passes the mean product."""
    return (residuals[0] * residuals[-1]).mean().item()


def e_lins(of_batches: Sequence[Residuals]) -> list[float]:
    """E_lin of each batch."""
    return [*map(e_lin_of, of_batches)]


def rounding(measured: Sequence[Residuals], exact: Sequence[Residuals]) -> dict[str, float]:
    """What rounding makes of E_lin, and of its spread over the batches."""
    errors = [[r - true[0] for r in batch] for batch, true in zip(measured, exact, strict=True)]
    values, true = e_lins(measured), e_lins(exact)
    return {
        "e_lin": statistics.mean(true),
        "measured": statistics.mean(values),
        "floor": statistics.mean(e_lins(errors)),
        "spread": statistics.pstdev(true),
        "rounding_spread": statistics.pstdev([one - other for one, other in zip(values, true, strict=True)]),
    }


def detection(at_rest: list[float], risen: list[list[float]], rises: list[float]) -> dict[str, Any]:
    """The detector's threshold after the values at rest, and which rises of the true E_lin it then sees.

    Args:
        at_rest: E_lin of each batch.
        risen: the same for each of ``rises``, the first of which is about RISE.
    """
    detector = AdaptiveLambda(1.0)
    for value in at_rest:
        detector.update(torch.tensor(value, dtype=torch.float64))
    mean, std = detector.moments()
    threshold = (mean + detector.sensitivity * std).item()
    tried = sorted(zip([0.0, *rises], [at_rest, *risen], strict=True), key=lambda each: each[0])
    seen = crossing([(rise, statistics.median(values)) for rise, values in tried], threshold)
    alarms = [statistics.mean(value > threshold for value in values) for values in (at_rest, risen[0])]
    return {"threshold": threshold, "seen": seen, "alarms": alarms[0], "alarms_after_rise": alarms[1]}


def crossing(line: Sequence[tuple[float, float]], height: float) -> float | None:
    """Where a line through points, from left to right, first reaches a height; None if it does not."""
    for (x, y), (next_x, next_y) in pairwise(line):
        if next_y > height:
            return x + max(0.0, height - y) / (next_y - y) * (next_x - x)
    return None


def own_threshold(criterion: dict[str, Any]) -> float | None:
    """The threshold that the run's own detector had at its end, after all its steps; None if it had none."""
    if "controller.mean" not in criterion:
        return None
    mean, deviations, count = (float(criterion[f"controller.{name}"]) for name in ("mean", "deviations", "count"))
    return mean + AdaptiveLambda(1.0).sensitivity * math.sqrt(deviations / count)


def steps(row: dict[str, Any], e_lin: float) -> int:
    """The independent batches whose mean shows a rise of RISE as 2 of its standard deviations.

    A way with other points, whose E_lin is larger than Algorithm 1's ``e_lin``, sees a rise that is larger by as much.
    """
    two_std, rise = row["threshold"] - row["measured"], RISE * row["e_lin"] / e_lin
    return math.ceil(float(two_std / rise) ** 2)


def table(rows: list[dict[str, Any]]) -> str:
    """As text, a table for each run and part of the batch."""
    head = ("precision", "E_lin", "measured", "floor", "spread", "by rounding", "seen", "alarms", "after 1e-7", "steps")
    tables: dict[str, list[tuple[str, ...]]] = {}
    e_lin = math.nan
    for row in rows:
        e_lin = row["e_lin"] if row["precision"] == "fp32" else e_lin  # the first of each table
        numbers = ["never" if row[key] is None else f"{row[key]:.1e}" for key in _COLUMNS]
        shares = [f"{row[key]:.0%}" for key in ("alarms", "alarms_after_rise")]
        title = f"{row['run']} ({row['folder']}, {row['device']})"
        title += f"; E_lin on {row['samples']} of {row['batch']} samples a batch, {row['batches']} batches"
        count = steps(row, e_lin)
        length = f"{count:,}" if count < 1e6 else f"{count:.0e}"
        tables.setdefault(title, []).append((row["precision"], *numbers, *shares, length))
    return "\n".join(terminal(title, head, [lines]) for title, lines in tables.items())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.precision", __doc__)
    options_of.add_argument("--run", type=Path, action="append", required=True, help="a run's folder; may be repeated")
    options_of.add_argument("--root", type=Path, help="files of the data set; digits need none")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--device", default="cpu")
    options_of.add_argument("--batches", type=int, default=32)
    options_of.add_argument("--batch", type=int, default=128)
    return options_of


if __name__ == "__main__":
    sys.exit(main())
