"""The paper's comparison on small settings: every variant x eps x seed, resumable, ending in JSON, pictures, a table.

    python benchmarks/paper.py --setting digits --out benchmarks/results/digits.json
    python benchmarks/paper.py --setting cifar10-jpeg-small --root cifar10-jpeg.tar.xz --out benchmarks/results/x.json
    python benchmarks/paper.py --setting cifar10-jpeg-levers --root cifar10-jpeg.tar.xz --out benchmarks/results/y.json

A variant is a method, or a method with options of ELLELoss. Each cell is a run in its own folder under --work. A cell
that is done is skipped, one that was cut off is resumed, so the same command can be typed again after anything.
``--variants fgsm,elle-a`` does the cells of some variants, ``--shard 0/2`` and ``--shard 1/2`` split the cells over two
processes. Each writes the JSON file of all cells of the setting that are done when it ends, with the number of those
that are missing, and beside it the curves of the first seed of each eps.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elle_fast.ops import checks
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint, data, demo
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.files import write_json
from elle_fast.recipes.plot import plot_curves
from elle_fast.recipes.train import CHECKPOINT, RESULT, train


@dataclass(frozen=True)
class Setting:
    """One data set, model and schedule, and the variants compared on it."""

    config: TrainConfig
    variants: dict[str, dict[str, Any]]  # by name, what of the configuration differs
    seeds: tuple[int, ...]
    note: str
    eps: tuple[float, ...] = ()  # the configuration's own if empty

    def cells(self, root: str | None) -> list[tuple[str, TrainConfig]]:
        """Name and configuration of each; a seed is gone through before the next one."""
        base = replace(self.config, root=root)
        return [
            (name, replace(base, eps=eps, seed=seed, **options))
            for seed in self.seeds
            for eps in self.eps or (base.eps,)
            for name, options in self.variants.items()
        ]


def _methods(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"method": name} for name in names}


def _levers(**options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name.replace("_", " "): {"method": "elle-a", **levers} for name, levers in options.items()}


_CIFAR = TrainConfig(
    data="image-folder",
    limit=10_000,
    test_limit=1_000,
    model="preact",
    width=16,
    eps=16 / 255,
    epochs=12,
    augment=False,
    watch=256,
)
_JPEG = "JPEG-compressed CIFAR-10, not comparable with published numbers"


SETTINGS = {
    "digits": Setting(
        config=demo.SETTING,
        variants=_methods("fgsm", "elle-a"),
        seeds=(0, 1, 2, 3, 4),
        note="scikit-learn's digits, the setting of make demo",
    ),
    "cifar10-jpeg-small": Setting(
        config=_CIFAR,
        variants=_methods("fgsm", "n-fgsm", "elle", "elle-a", "n-fgsm+elle-a"),
        seeds=(0, 1, 2),
        note=_JPEG,
    ),
    # What each option that makes ELLE-A cheaper costs in robustness.
    "cifar10-jpeg-levers": Setting(
        config=replace(_CIFAR, watch=128),
        variants={
            **_methods("fgsm", "elle-a"),
            **_levers(
                skip={"skip_below": 1e-2},
                eighth={"triplet_fraction": 0.125},
                fast=FAST,
                split={"forward": "split"},
                lagged={"lagged": True},
                checkpoint={"forward": "checkpoint"},
            ),
        },
        seeds=(0, 1, 2),
        note=_JPEG,
        eps=(8 / 255, 16 / 255),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells of this shard, then write what is there of all of them."""
    options = _parser().parse_args(arguments)
    setting = SETTINGS[options.setting]
    shard, shards = (int(part) for part in options.shard.split("/"))
    chosen = list(setting.variants) if options.variants is None else options.variants.split(",")
    for name in chosen:
        checks.choice("variants", name, setting.variants)
    base, cells = setting.config, setting.cells(options.root)
    own = [(name, config) for name, config in cells if name in chosen]
    work = options.work / options.setting
    dataset = data.load(
        base.data, options.root, limit=base.limit, test_limit=base.test_limit, image_size=base.image_size
    )
    for name, config in own[shard::shards]:
        folder = _folder(work, name, config)
        if not _is_done(folder, config):
            print(f"{name}, eps {config.eps:.4g}, seed {config.seed}", flush=True)
            train(config, folder, resume=(folder / CHECKPOINT).exists(), dataset=dataset)
    command = ["python", "benchmarks/paper.py", "--setting", options.setting]
    if options.root is not None:
        command += ["--root", Path(options.root).name]
    # Reading takes a while, in which another shard may end a cell and write the file with it.
    done: list[tuple[str, TrainConfig]] = []
    runs: list[dict[str, Any]] = []
    while done != (now := _done(work, cells)):
        done, runs = now, [{"variant": name, **_read(_folder(work, name, config))} for name, config in now]
    summary = {
        "setting": options.setting,
        "note": setting.note,
        "command": shlex.join([*command, "--out", options.out.name]),
        "missing": len(cells) - len(done),
        "runs": runs,
    }
    write_json(options.out, summary)
    _plot(setting, work, done, options.out)
    print(table(summary))
    if len(done) < len(cells):
        print(f"{len(cells) - len(done)} of {len(cells)} cells are still to be done")
    return 0


def _done(work: Path, cells: list[tuple[str, TrainConfig]]) -> list[tuple[str, TrainConfig]]:
    return [(name, config) for name, config in cells if _is_done(_folder(work, name, config), config)]


def _plot(setting: Setting, work: Path, done: list[tuple[str, TrainConfig]], out: Path) -> None:
    """The curves of the first seed, a picture for each eps."""
    for eps in setting.eps or (setting.config.eps,):
        first = [(name, config) for name, config in done if config.seed == setting.seeds[0] and config.eps == eps]
        if not first:
            continue
        histories = {
            name: checkpoint.load(_folder(work, name, config) / CHECKPOINT)["history"] for name, config in first
        }
        which = f"-eps{round(255 * eps)}" if setting.eps else ""
        title = f"{setting.note}; eps {round(255 * eps)}/255, seed {setting.seeds[0]}"
        plot_curves(histories, out.with_name(f"{out.stem}{which}.png"), title=title)


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table: mean and, in brackets, lowest to highest over the seeds, in per cent.

    Time is that of training, each run against the one of the setting's first variant with the same eps and seed.
    """
    attacks = list(summary["runs"][0]["accuracy"])
    head = ["eps", "variant", "train, own attack", *(f"test {each}" for each in attacks), "collapsed", "full steps"]
    head.append("time")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    first = next(iter(SETTINGS[summary["setting"]].variants))
    base = {
        (run["config"]["eps"], run["seed"]): run["training_seconds"]
        for run in summary["runs"]
        if run["variant"] == first
    }
    for eps in dict.fromkeys(run["config"]["eps"] for run in summary["runs"]):
        for variant in dict.fromkeys(run["variant"] for run in summary["runs"]):
            runs = [run for run in summary["runs"] if run["variant"] == variant and run["config"]["eps"] == eps]
            if not runs:
                continue
            columns = [[run["train_adv"] for run in runs]]
            columns += [[run["accuracy"][attack]["accuracy"] for run in runs] for attack in attacks]
            cells = " | ".join(_spread(column) for column in columns)
            collapsed = f"{sum(run['collapsed'] for run in runs)} of {len(runs)}"
            shares = [run["full_share"] for run in runs if run["full_share"] is not None]
            share = f"{100 * statistics.mean(shares):.0f} %" if shares else "-"
            times = [run["training_seconds"] / base[eps, run["seed"]] for run in runs if (eps, run["seed"]) in base]
            ratio = f"{statistics.median(times):.2f}x" if times else "-"
            lines.append(f"| {255 * eps:.3g}/255 | {variant} | {cells} | {collapsed} | {share} | {ratio} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, choices=list(SETTINGS))
    parser.add_argument("--root", help="files of the data set; digits need none")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs") / "paper", help="folder of the runs")
    parser.add_argument("--variants", help="names, with commas between: do the cells of these alone")
    parser.add_argument("--shard", default="0/1", help="I/N: do every N-th cell, beginning with the I-th")
    return parser


def _read(folder: Path) -> dict[str, Any]:
    """What the summary keeps of a run: no path of the machine, but machine, versions and commit of this very run."""
    result = json.loads((folder / RESULT).read_text())
    kept = (
        "accuracy",
        "e_lin",
        "train_adv",
        "collapsed",
        "collapsed_in_epoch",
        "training_seconds",
        "machine",
        "versions",
        "commit",
    )
    return {
        "method": result["config"]["method"],
        "seed": result["config"]["seed"],
        "config": {name: value for name, value in result["config"].items() if name != "root"},
        **{name: result[name] for name in kept},
        # Of the steps, those that took the whole gradient of E_lin; None where no step may be without.
        "full_share": result["full_steps"] / (result["full_steps"] + result["light_steps"])
        if "full_steps" in result
        else None,
        "epochs": checkpoint.load(folder / CHECKPOINT)["history"]["epochs"],
    }


def _is_done(folder: Path, config: TrainConfig) -> bool:
    """Whether the folder holds the result of this very configuration."""
    if not (folder / RESULT).exists():
        return False
    done = TrainConfig(**json.loads((folder / RESULT).read_text())["config"])
    if done.identity() != config.resolved().identity():
        raise ValueError(f"work: expected runs of this setting, got {str(folder)!r} of another; choose another --work")
    return True


def _folder(work: Path, name: str, config: TrainConfig) -> Path:
    return work / f"{name.replace(' ', '-')}-eps{255 * config.eps:.3g}-seed{config.seed}"


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
