"""The paper's comparison on small settings: every method x seed, resumable, ending in JSON, a picture and a table.

    python benchmarks/paper.py --setting digits --out benchmarks/results/digits.json
    python benchmarks/paper.py --setting cifar10-jpeg-small --root cifar10-jpeg.tar.xz --out benchmarks/results/x.json

Each cell is a run in its own folder under --work. A cell that is done is skipped, one that was cut off is resumed, so
the same command can be typed again after anything. ``--shard 0/2`` and ``--shard 1/2`` split the cells over two
processes; the last one to finish writes the JSON file and, beside it, the curves of the first seed.
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

from elle_fast.recipes import checkpoint, data, demo
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.files import write_json
from elle_fast.recipes.plot import plot_curves
from elle_fast.recipes.train import CHECKPOINT, RESULT, train


@dataclass(frozen=True)
class Setting:
    """One data set, model and schedule, and the methods compared on it."""

    config: TrainConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    note: str


SETTINGS = {
    "digits": Setting(
        config=demo.SETTING,
        methods=("fgsm", "elle-a"),
        seeds=(0, 1, 2, 3, 4),
        note="scikit-learn's digits, the setting of make demo",
    ),
    "cifar10-jpeg-small": Setting(
        config=TrainConfig(
            data="image-folder",
            limit=10_000,
            test_limit=1_000,
            model="preact",
            width=16,
            eps=16 / 255,
            epochs=12,
            augment=False,
            watch=256,
        ),
        methods=("fgsm", "n-fgsm", "elle", "elle-a", "n-fgsm+elle-a"),
        seeds=(0, 1, 2),
        note="JPEG-compressed CIFAR-10, not comparable with published numbers",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells of this shard, then write what is there of all of them."""
    options = _parser().parse_args(arguments)
    setting = SETTINGS[options.setting]
    shard, shards = (int(part) for part in options.shard.split("/"))
    base = replace(setting.config, root=options.root)
    cells = [replace(base, method=method, seed=seed) for seed in setting.seeds for method in setting.methods]
    work = options.work / options.setting
    dataset = data.load(base.data, base.root, limit=base.limit, test_limit=base.test_limit, image_size=base.image_size)
    for config in cells[shard::shards]:
        folder = _folder(work, config)
        if not _is_done(folder, config):
            print(f"{config.method}, seed {config.seed}", flush=True)
            train(config, folder, resume=(folder / CHECKPOINT).exists(), dataset=dataset)
    done = [config for config in cells if _is_done(_folder(work, config), config)]
    if len(done) < len(cells):
        print(f"{len(cells) - len(done)} of {len(cells)} cells are still to be done by other shards")
        return 0
    command = ["python", "benchmarks/paper.py", "--setting", options.setting]
    if base.root is not None:
        command += ["--root", Path(base.root).name]
    summary = {
        "setting": options.setting,
        "note": setting.note,
        "command": shlex.join([*command, "--out", options.out.name]),
        "runs": [_read(_folder(work, config)) for config in done],
    }
    write_json(options.out, summary)
    first = [config for config in done if config.seed == setting.seeds[0]]
    histories = {config.method: checkpoint.load(_folder(work, config) / CHECKPOINT)["history"] for config in first}
    plot_curves(histories, options.out.with_suffix(".png"), title=f"{setting.note}; seed {setting.seeds[0]}")
    print(table(summary))
    return 0


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table: mean and, in brackets, lowest to highest over the seeds, in per cent."""
    attacks = list(summary["runs"][0]["accuracy"])
    head = ["method", "train, own attack", *(f"test {attack}" for attack in attacks), "collapsed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(run["method"] for run in summary["runs"]):
        runs = [run for run in summary["runs"] if run["method"] == method]
        columns = [[run["train_adv"] for run in runs]]
        columns += [[run["accuracy"][attack]["accuracy"] for run in runs] for attack in attacks]
        collapsed = sum(run["collapsed"] for run in runs)
        cells = " | ".join(_spread(column) for column in columns)
        lines.append(f"| {method} | {cells} | {collapsed} of {len(runs)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", required=True, choices=list(SETTINGS))
    parser.add_argument("--root", help="files of the data set; digits need none")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs") / "paper", help="folder of the runs")
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


def _folder(work: Path, config: TrainConfig) -> Path:
    return work / f"{config.method}-seed{config.seed}"


def _spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
