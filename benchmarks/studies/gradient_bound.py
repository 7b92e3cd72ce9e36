"""Does a bound on E_lin's gradient (``max_ratio``) keep a training from NaN and from chance, and what does it cost?

    python -m benchmarks.studies.gradient_bound --data mnist --root mnist.npz --out gradient_bound_mnist.json
    python -m benchmarks.studies.gradient_bound --data cifar --root cifar10-jpeg.tar.xz --out gradient_bound_cifar.json

Every cell is a run of ``elle-fast train`` with a fixed number of steps; what the file holds already is not run again.

In a row: ``ended`` is "nan" if the run ended with a loss or weights that are not finite, "chance" if the clean accuracy
is below 15 % (of ten classes), "collapsed" if it stands but PGD-20's accuracy is below 5 %, else "stands". ``ratio`` is
|lam E_lin's gradient| / |the cross-entropy's| in the logits before the bound, over the steps with lam > 0: median, 90 %
quantile and largest; ``bound`` the part of those steps in which it was above max_ratio. Both are null without a bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.harness.program import command, parser, write_lines
from benchmarks.paper.cells import diverged
from elle_fast import data, gradient_bound
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import commit, machine, provenance
from elle_fast.recipes.train import train

_RESULT = "pgd-20"
_COMMON = TrainConfig(limit=4_708, validation=100, test_limit=500, epochs=4, augment=False)
_COMMON = replace(_COMMON, eval_attacks=f"clean,{_RESULT}")
_MNIST = replace(_COMMON, data="mnist", model="cnn", width=8, learning_rate=0.1, eps=0.3)
_CIFAR = replace(_COMMON, data="image-folder", model="preact", width=16)
# ELLE-A's lam is 0 in most steps of so short a run, which then have nothing to bound.
_MNIST_RUNS = (("elle", (None, 100.0, 30.0)), ("elle-a", (None, 100.0)), ("elle", (10.0, 1.0)))
_CIFAR_RUNS = ((8, None), (8, 100.0), (16, None), (16, 100.0), (16, 30.0), (8, 30.0))


def cells(name: str) -> Iterator[TrainConfig]:
    """The most telling ones first, so that a study that is cut off says something."""
    if name == "mnist":
        for method, ratios in _MNIST_RUNS:
            for seed, lam, ratio in itertools.product((0, 1, 2), (20_000.0, 4_000.0), ratios):
                yield replace(_MNIST, method=method, lam=lam, max_ratio=ratio, seed=seed)
    else:
        for seed, (eps, ratio) in itertools.product((0, 1), _CIFAR_RUNS):
            for method, lam in (("elle-a", 4_000.0), ("elle", 5_000.0)):
                yield replace(_CIFAR, method=method, lam=lam, max_ratio=ratio, seed=seed, eps=eps / 255)


def run(config: TrainConfig, dataset: data.Dataset) -> dict[str, Any]:
    """Train one cell; its row."""
    ratios: list[float] = []

    def recorded(g_ce: Tensor, g: Tensor, max_ratio: float) -> Tensor:
        if g.any():
            ratios.append((g.norm() / g_ce.norm()).item())
        return factor(g_ce, g, max_ratio)

    factor = gradient_bound._factor
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, patch.object(gradient_bound, "_factor", recorded):
        try:
            result = train(config, Path(folder) / "run", dataset=dataset, console=Console(quiet=True))
        except RuntimeError as error:
            if not diverged(error):
                raise
            row["ended"] = "nan"
        else:
            row |= {name: numbers["accuracy"] for name, numbers in result["accuracy"].items()}
            row["e_lin"] = result["e_lin"]
            row["ended"] = "chance" if row["clean"] < 0.15 else "collapsed" if row[_RESULT] < 0.05 else "stands"
    row["ratio"] = row["bound"] = None
    if config.max_ratio is not None and (seen := torch.tensor([each for each in ratios if each == each])).numel():
        row["ratio"] = seen.quantile(torch.tensor([0.5, 0.9, 1.0])).tolist()
        row["bound"] = (seen > config.max_ratio).double().mean().item()
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, writing the file after each cell; print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    held = json.loads(options.out.read_text()) if options.out.exists() else {"rows": {}}
    content: dict[str, Any] = {"about": _about(), **held}
    rows, dataset = content["rows"], None
    chosen = list(cells(options.data))
    for config in chosen[: options.limit]:
        name = (
            f"{config.method} eps {255 * config.eps:.3g}/255 lam {config.lam:g} c {config.max_ratio} seed {config.seed}"
        )
        if name in rows:
            continue
        if dataset is None:
            dataset = replace(config, root=str(options.root)).read_data()
        torch.set_num_threads(1)
        begin = time.perf_counter()
        rows[name] = run(config, dataset) | {"method": config.method, "eps": config.eps, "lam": config.lam}
        rows[name] |= {"max_ratio": config.max_ratio, "seed": config.seed, "commit": commit(), "machine": machine()}
        rows[name]["seconds"] = round(time.perf_counter() - begin, 1)
        write_lines(options.out, {**content, **provenance(command(options_of, options))})
        print(name, {key: rows[name].get(key) for key in ("ended", "clean", _RESULT, "bound")}, flush=True)
    print(table(rows))
    return 0


def table(rows: dict[str, Any]) -> str:
    """A line for each method, eps, lam and bound: how the seeds ended, and mean accuracies of those that stand."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows.values():
        groups.setdefault((row["method"], round(255 * row["eps"], 1), row["lam"], row["max_ratio"]), []).append(row)
    lines = []
    for key, group in groups.items():
        ended = ", ".join(row["ended"] for row in group)
        means = [100 * sum(row.get(name, 0.0) for row in group) / len(group) for name in ("clean", _RESULT)]
        lines.append(f"{key}: {ended}; clean {means[0]:.1f}, PGD-20 {means[1]:.1f} (NaN counts as 0)")
    return "\n".join(lines)


def _about() -> str:
    return " ".join((__doc__ or "").split("\n\n")[-1].split())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.gradient_bound", __doc__)
    options_of.add_argument("--data", choices=("mnist", "cifar"), default="cifar")
    options_of.add_argument("--root", type=Path, required=True, help="the data set's files")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--limit", type=int, help="the first cells only")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
