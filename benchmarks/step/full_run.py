"""Whole trainings by turns: what ELLE-A and its preset ``fast`` add to the time of FGSM training; one process.

    python -m benchmarks.step.full_run --root cifar10-jpeg.tar.xz --out benchmarks/results/full_run.json

The setting is ``cifar10-jpeg-levers`` of benchmarks/paper: data, model, schedule and eps. Every variant has its own
model and optimiser; all take a step on each batch in turn, so that a disturbance of the machine hits all of them. A
ratio compares the sums over all steps of the run. PGD-20 at the end shows that what was timed is the training of the
robustness table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.program import command, listed, parser
from benchmarks.harness.tables import VERDICTS, markdown
from benchmarks.paper.settings import SETTINGS, Setting
from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.files import write_json
from elle_fast.evaluation import evaluate
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run

BASE = "fgsm"
# The preset's time over FGSM's, by eps times 255.
TARGETS = {8: 1.25, 16: 1.4}
FAST = "fast"
# The first steps, in which libraries choose their kernels, are not counted.
WARM_UP = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the JSON file."""
    options_of = _parser()
    options = options_of.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = SETTINGS["cifar10-jpeg-levers"]
    for name in options.variants:
        checks.choice("variants", name, setting.variants)
    if BASE not in options.variants or len(set(options.variants)) < len(options.variants):
        raise ValueError(f"variants: expected different names, {BASE} among them, got {','.join(options.variants)}")
    chosen = {} if options.epochs is None else {"epochs": options.epochs}
    root = None if options.root is None else str(options.root)
    setting = replace(setting, eps=tuple(map(float, options.eps)))
    content = measure(setting, options.variants, root=root, seed=options.seed, **chosen)
    write_json(options.out, content | provenance(command(options_of, options)))
    print(table(content))
    return 0


def measure(setting: Setting, variants: Sequence[str], **overrides: Any) -> dict[str, Any]:
    """The times of whole runs of the variants at each eps; ``overrides`` change the setting's configuration."""
    runs: list[dict[str, Any]] = []
    for eps in setting.eps:
        configs = {name: replace(setting.config, eps=eps, **overrides, **setting.variants[name]) for name in variants}
        done = _by_turns({name: config.resolved() for name, config in configs.items()})
        for run in done.values():
            run["ratio"] = float(f"{run['seconds'] / done[BASE]['seconds']:.4g}")
        wanted = TARGETS.get(round(255 * eps))
        if FAST in done and wanted is not None:
            done[FAST] |= {"wanted": wanted, "met": done[FAST]["ratio"] <= wanted}
        runs += [{"eps": eps, "variant": name, **run} for name, run in done.items()]
    return {"note": setting.note, "runs": runs}


def _by_turns(configs: dict[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """One run of each, a step of each on every batch."""
    dataset, base = configs[BASE].read_data(), configs[BASE]
    trainers = {name: _Trainer(config, dataset) for name, config in configs.items()}
    run = trainers[BASE].run
    for x, y in run.upcoming(run.steps):
        for trainer in trainers.values():
            trainer.step(x, y)
        epoch, rest = run.plan.place(run.step)
        if not rest:
            print(f"epoch {epoch}/{base.epochs} at eps {255 * base.eps:.3g}/255", file=sys.stderr, flush=True)
    return {name: trainer.result(dataset) for name, trainer in trainers.items()}


class _Trainer:
    """One training: the steps of ``elle-fast train``, without its log."""

    def __init__(self, config: TrainConfig, dataset: data.Dataset) -> None:
        self.config = config
        self.run = Run(config, dataset, Path(), Ranks(timeout=1.0))
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        """The next step, timed."""
        began = time.perf_counter()
        self.run.take_step(x, y)
        self.seconds.append(time.perf_counter() - began)
        self.run.step += 1

    def result(self, dataset: data.Dataset) -> dict[str, Any]:
        """Seconds of all steps but the first ones, their median, the share of full steps, and accuracies."""
        timed = self.seconds[min(WARM_UP, len(self.seconds) - 1) :]
        full, light = (self.run.criterion.stats.get(f"{kind}_steps") for kind in ("full", "light"))
        share = None if full is None or light is None else full.item() / (full.item() + light.item())
        found = evaluate(self.run.model, data.in_order(dataset.test), "clean,pgd-20", eps=self.config.eps)
        return {
            "steps": len(timed),
            "seconds": sum(timed),
            "median_ms": 1e3 * statistics.median(timed),
            "full_share": share,
            "accuracy": {name: numbers["accuracy"] for name, numbers in found.items()},
        }


def table(content: dict[str, Any]) -> str:
    """As Markdown."""
    rows = []
    for run in content["runs"]:
        wanted = f" (at most {run['wanted']:g}x: {VERDICTS[run['met']]})" if "wanted" in run else ""
        share = "-" if run["full_share"] is None else f"{100 * run['full_share']:.0f} %"
        accuracies = (f"{100 * run['accuracy'][name]:.1f} %" for name in ("clean", "pgd-20"))
        ratio = f"{run['ratio']:.2f}x{wanted}"
        rows.append((f"{255 * run['eps']:.3g}/255", run["variant"], ratio, share, *accuracies))
    return markdown(("eps", "variant", "time over FGSM's", "full steps", "clean", "PGD-20"), rows)


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.step.full_run", __doc__)
    options_of.add_argument("--root", type=Path, help="files of the data set")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--variants", type=listed(str), default=(BASE, FAST), help=f"names, {BASE} among them")
    options_of.add_argument(
        "--eps", type=listed(Fraction), default=tuple(Fraction(eps, 255) for eps in TARGETS), help="8/255,16/255"
    )
    options_of.add_argument("--seed", type=int, default=0)
    options_of.add_argument("--threads", type=int, default=torch.get_num_threads())
    options_of.add_argument("--epochs", type=int, help="instead of the setting's")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
