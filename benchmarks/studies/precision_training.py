"""What low precision does to a training: ELLE-A `fast` in fp32, in bf16 with exact triplets, and in bf16 throughout.

    python -m benchmarks.studies.precision_training --root cifar10-jpeg.tar.xz --work runs --out precision_training.json

Each cell is `elle-fast train` in the setting cifar10-medium of benchmarks/paper (narrow PreActResNet, all images with
crop and flip, 15 epochs, eps 16/255), the first seed of each precision first. A run that was stopped goes on where it
was; what the file holds already is not run again. Several processes may share --out, on one machine, if they have
different --seeds.

The table has the accuracies of all seeds, in order: "nan" of a run that ended in NaN, "-" of one that is still to be
made. What is said of the difference to fp32 is the mean over the seeds that stand in both.

In a row: "accuracy" is that on the test images, in fp32, of the last weights, the averaged ones, and the best of both.
"e_lin" is the median of the logged steps, as they measured it, "exact_e_lin" that of the last weights on the validation
images in fp32. "lam" is the mean of the logged steps, "detected" the share of them whose lam shows a detection within
ten steps, "full_share" the share of steps with the gradient of E_lin. "seconds" is wall clock of the training alone,
on a machine that has other work too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.harness.program import command, listed, number, parser
from benchmarks.harness.rows import Rows, add_rows, read_rows
from benchmarks.harness.tables import markdown
from benchmarks.paper.cells import diverged
from benchmarks.paper.settings import SETTINGS
from elle_fast import AdaptiveLambda, data
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import commit, provenance
from elle_fast.recipes.train import CHECKPOINT, InterruptedRunError, train

SEEDS, ATTACK = (0, 1, 2), "pgd-20"
BASE = replace(SETTINGS["cifar10-medium"].config, method="elle-a", **FAST)
# By name, what differs from BASE; the first is what the others are compared with.
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, triplets fp32": {"precision": "bf16", "triplet_precision": "fp32"},
    "bf16": {"precision": "bf16", "triplet_precision": "same"},
}


def cells(seeds: Sequence[int]) -> Iterator[tuple[str, TrainConfig]]:
    """Precision and configuration of each run, seed by seed."""
    for seed in seeds:
        for name, options in PRECISIONS.items():
            yield name, replace(BASE, seed=seed, **options)


def run(config: TrainConfig, folder: Path, dataset: data.Dataset, console: Console) -> dict[str, Any]:
    """Train one cell, or go on with it; its row."""
    resume = (folder / CHECKPOINT).exists()
    try:
        result = train(config, folder, resume=resume, dataset=dataset, console=console)
    except RuntimeError as error:
        if not diverged(error):
            raise
        return {"ended": "nan"}
    history = checkpoint.load(folder / CHECKPOINT)["history"]
    steps = history["steps"]
    # To which a detection's lam has decayed when the next step is logged, at the latest.
    least = result["config"]["lam"] * AdaptiveLambda(1.0).gamma ** config.log_every
    full, light = result["full_steps"], result["light_steps"]
    return {
        "ended": "collapsed" if result["collapsed"] else "stands",
        "accuracy": {
            name: {attack: found["accuracy"] for attack, found in model["accuracy"].items()}
            for name, model in result["models"].items()
        },
        "e_lin": statistics.median(row["e_lin"] for row in steps),
        "exact_e_lin": result["e_lin"],
        "lam": statistics.mean(row["lam"] for row in steps),
        "detected": statistics.mean(row["lam"] > least for row in steps),
        "full_share": full / (full + light),
        "seconds": round(result["training_seconds"], 1),
        "machine": result["machine"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, writing the file after each cell, and print the table; 130 if asked to stop."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    dataset, console = None, Console(stderr=True)
    for name, config in cells(options.seeds):
        key = f"{name}, seed {config.seed}"
        if key in read_rows(options.out):
            continue
        if dataset is None:
            dataset = replace(config, root=str(options.root)).read_data()
        console.print(key, highlight=False)
        folder = options.work / key.replace(", ", "-").replace(" ", "-")
        try:
            found = run(config, folder, dataset, console)
        except InterruptedRunError as error:
            print(error, file=sys.stderr)
            return 130
        row = {"precision": name, "seed": config.seed, "commit": commit(), **found}
        about = {"about": _about(), "precisions": PRECISIONS}
        add_rows({key: row}, options.out, about, provenance(command(options_of, options)))
    print(table(read_rows(options.out)))
    return 0


def table(rows: Rows) -> str:
    """Markdown: a line for each precision, accuracies in per cent of each seed; then how far the means are apart."""
    seeds = sorted({row["seed"] for row in rows.values()})
    groups: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in PRECISIONS}
    for row in rows.values():
        groups[row["precision"]][row["seed"]] = row
    lines, robust = [], {}
    for name, group in groups.items():
        if not group:
            continue
        ended = [group[seed] for seed in seeds if seed in group and group[seed]["ended"] != "nan"]
        robust[name] = found = {row["seed"]: 100 * row["accuracy"]["last"][ATTACK] for row in ended}
        each = ", ".join(_text(group.get(seed), "last", ATTACK) for seed in seeds)
        texts = [f"{statistics.mean(found.values()):.1f} ({each})" if found else each]
        for model, attack in (("averaged", ATTACK), ("last", "clean")):
            texts.append(", ".join(_text(group.get(seed), model, attack) for seed in seeds))
        for key, layout in (("e_lin", ".1e"), ("exact_e_lin", ".1e"), ("lam", ".0f"), ("seconds", ".0f")):
            texts.append(f"{statistics.median(row[key] for row in ended):{layout}}" if ended else "-")
        lines.append((name, *texts))
    heads = ("PGD-20", "PGD-20, averaged weights", "clean", "E_lin of steps", "exact E_lin", "lam", "seconds")
    said = [markdown(["precision", *heads], lines)]
    for name, group in groups.items():
        if lost := len(group) - len(robust.get(name, ())):
            said.append(f"{name}: {lost} of {len(group)} runs ended in NaN")
    exact, *others = PRECISIONS
    for name in others:
        both = [seed for seed in robust.get(exact, ()) if seed in robust.get(name, ())]
        if both:
            apart = statistics.mean(robust[name][seed] - robust[exact][seed] for seed in both)
            spread = max(robust[exact].values()) - min(robust[exact].values())
            said.append(
                f"{name}: mean PGD-20 {apart:+.1f} against {exact} over seeds {', '.join(map(str, both))}; the "
                f"{len(robust[exact])} of {exact} spread over {spread:.1f}"
            )
    return "\n".join(said)


def _text(row: dict[str, Any] | None, model: str, attack: str) -> str:
    """An accuracy in per cent, or why there is none."""
    if row is None:
        return "-"
    return "nan" if row["ended"] == "nan" else f"{100 * row['accuracy'][model][attack]:.1f}"


def _about() -> str:
    return " ".join((__doc__ or "").split("\n\n")[-1].split())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.precision_training", __doc__)
    options_of.add_argument("--root", type=Path, required=True, help="JPEG-compressed CIFAR-10")
    options_of.add_argument("--work", type=Path, required=True, help="folder of the runs")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--seeds", type=listed(lambda text: number(text, 0)), default=SEEDS, help="0,1,2")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
