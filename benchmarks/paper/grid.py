"""The paper's comparison: every variant x eps x seed in a resumable grid, ending in JSON, tables and pictures.

    make paper ARGS="--scale smoke --out smoke.json"
    make paper ARGS="--dataset cifar10 --scale small --root cifar10-jpeg.tar.xz --out cifar10-small.json"
    make paper ARGS="--dataset cifar10 --scale medium --root cifar10-jpeg.tar.xz --out cifar10-medium.json --shard 0/2"
    make paper ARGS="--dataset cifar10 --scale paper --root cifar-10-binary.tar.gz --device cuda --out paper.json"
    make paper ARGS="--setting digits --out benchmarks/results/digits.json"
    make paper ARGS="--redraw cifar10-small.json"
    make paper ARGS="--redraw cifar10-small.json --step-times bench_step.json"

A variant is a method, or a method with options; settings.py lists the variants, eps and seeds of each setting, and
their cost. Each cell is trained in its own folder under --work; some are attacked by stronger attacks right afterwards.
The same command can be repeated at any time: it skips what is done and resumes what was interrupted.

A run under --work of another configuration, other data, or another version or commit of elle_fast is an error
(``--any-commit`` accepts other commits; the JSON file names each run's). A training whose loss or weights are no longer
finite does not stop the others and is not tried again: the JSON file lists it under ``failed``, and the exit status is
1. Remove its failed.json to retry. Any other error stops the grid.

``--variants fgsm,elle-a``, ``--eps 8/255,16/255`` and ``--seeds 0`` choose among the cells. ``--shard 0/2`` and
``--shard 1/2`` split them over two processes that share --work (with OMP_NUM_THREADS=1 on two cores), or over two
machines, whose folders are then copied into one. After each cell the JSON file of all cells done by then is written,
with the number of missing ones, and at the end the pictures beside it; ``--redraw`` makes those again from the JSON
file alone. Where --work is lost, ``--keep`` goes on from the runs in the JSON file; a run there without the stronger
attacks that it should have is trained again, as its weights are lost, and stays in the file until then. Times of runs
side by side say little: ``--step-times`` shows those of single steps instead, which bench_step.py measured in turns.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.program import command, listed, number, parser
from benchmarks.paper.cells import Cell, read_json
from benchmarks.paper.figures import draw
from benchmarks.paper.settings import SCALES, SETTINGS, NamedConfig, Setting, find, shares
from benchmarks.paper.summary import kept_runs, renamed, summarize
from benchmarks.paper.tables import Run, agreement, models_table, strong_table, table
from elle_fast._core import checks
from elle_fast._core.files import write_json
from elle_fast.evaluation import parse_attacks
from elle_fast.recipes.checked import parse_number
from elle_fast.recipes.distributed import local_device
from elle_fast.recipes.provenance import commit
from elle_fast.recipes.train import InterruptedRunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the cells of this shard, then write all that are done; 130 if asked to stop."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.redraw is not None:
        return _redraw(options)
    if options.step_times is not None:
        options_of.error("expected --step-times beside --redraw")
    if options.out is None or (options.setting is None) == (options.scale is None):
        options_of.error("expected --out, and one of --setting and --scale, or else --redraw")
    if options.dataset is not None and options.scale is None:
        options_of.error("expected --dataset beside --scale, got it beside --setting, which has one")
    chosen = options.setting or find(options.dataset, options.scale)
    setting = SETTINGS[chosen]
    if setting.strong:
        parse_attacks(setting.strong_attacks)  # reports a missing package before the training
    code = None if options.any_commit else commit()
    root = None if options.root is None else str(options.root)
    every = setting.cells(root, local_device(options.device))
    own = [setting.cell(options.work / chosen, code, *cell) for cell in _own(setting, every, options)]
    cells = [setting.cell(options.work / chosen, code, *cell) for cell in every]
    if options.keep and not options.out.exists():
        raise FileNotFoundError(
            f"keep: expected --out to be the file of earlier runs, got {str(options.out)!r}: there is none"
        )
    kept = kept_runs(options.out, cells) if options.keep else {}
    # The command that gives the same file needs neither this call's share nor its folder.
    same = argparse.Namespace(setting=chosen, root=options.root, device=options.device, out=options.out)
    about = {"setting": chosen, "command": shlex.join(command(options_of, same))}
    try:
        for _ in _run(setting, [cell for cell in own if not cell.is_whole(kept.get(cell.folder))], root):
            _write(setting, cells, kept, options.out, about)
    except InterruptedRunError as stop:
        print(f"{stop}; type the same command again")
        return 130
    summary = _write(setting, cells, kept, options.out, about)
    if not summary["runs"]:
        raise ValueError("work: expected at least one run that is done, got none: there is nothing to write")
    _show(summary, options.out)
    if summary["missing"]:
        print(f"{summary['missing']} of {len(cells)} cells are still to be done")
    for each in summary["failed"]:
        print(f"{each['variant']}, eps {each['eps']:.4g}, seed {each['seed']}: {each['error']}")
    if summary["missing_strong"]:
        print(f"{summary['missing_strong']} cells are still to be attacked by {setting.strong_attacks}")
    return 1 if summary["failed"] else 0


def _redraw(options: argparse.Namespace) -> int:
    """Tables and pictures from a JSON file alone."""
    summary = read_json(options.redraw)
    if not isinstance(summary, dict) or not isinstance(summary.get("runs"), list):
        raise ValueError(f"redraw: expected a JSON file of this program, got {str(options.redraw)!r}")
    if options.step_times is not None:
        summary["step_times"] = _step_times(options.step_times)
        write_json(options.out or options.redraw, summary)
    _show(summary, options.out or options.redraw)
    return 0


def _own(setting: Setting, cells: list[NamedConfig], options: argparse.Namespace) -> list[NamedConfig]:
    """The cells of this call."""
    for name in options.variants or ():
        checks.choice("variants", name, setting.names)
    for name, chosen, known in (
        ("eps", options.eps, {config.eps for _, config in cells}),
        ("seeds", options.seeds, {config.seed for _, config in cells}),
    ):
        for value in chosen or ():
            if not any(math.isclose(value, each) for each in known):
                raise ValueError(f"{name}: expected some of {sorted(known)}, got {value}")
    own = [
        (name, config)
        for name, config in cells
        if (options.variants is None or name in options.variants)
        and (options.eps is None or any(math.isclose(config.eps, eps) for eps in options.eps))
        and (options.seeds is None or config.seed in options.seeds)
    ]
    if not own:
        raise ValueError("variants, eps, seeds: expected a choice that the setting has cells of, got one without any")
    shard, count = options.shard
    return shares(own, count)[shard]


def _run(setting: Setting, own: list[Cell], root: str | None) -> Iterator[None]:
    """Train each cell that is not trained yet, and make the attacks on it that are missing; yields after each."""
    # Check all folders before the first training.
    own = [cell for cell in own if cell.failure() is None]
    still_open = [cell for cell in own if not cell.is_done()]
    if not own:
        return
    dataset = setting.config.read_data(root)
    digest = dataset.digest()
    for cell in own:
        if cell not in still_open:
            cell.check_data(digest)
    for cell in own:
        if cell in still_open:
            print(f"{1 + still_open.index(cell)}/{len(still_open)}: {cell.text}", flush=True)
            trained = cell.train(dataset)
            yield
            if not trained:
                continue
        if cell.asked is not None and cell.strong() is None:
            print(f"{cell.asked.attacks}: {cell.text}", flush=True)
            cell.attack(dataset)
            yield


def _write(
    setting: Setting, cells: list[Cell], kept: dict[Path, Run], out: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """Write all that is done by now, if that is anything; what was written.

    Reading takes a while, in which another shard may finish a cell, and write the file with it. So the cells are looked
    at again afterwards: of two shards, the one that writes last has seen them all.
    """
    summary: dict[str, Any] = {}
    before: list[tuple[bool, bool]] | None = None
    while before != (now := [(cell.is_done(), cell.strong() is not None) for cell in cells]):
        before = now
        summary = summarize(cells, kept, setting.note) | about
        there = len(read_json(out).get("runs", [])) if out.exists() else 0
        if summary["runs"] and there <= len(summary["runs"]):
            write_json(out, summary)
    # Refuse to replace a file by one with fewer runs, as after the loss of a work folder.
    if summary["runs"] and there > len(summary["runs"]):
        raise ValueError(
            f"out: expected a file of at most the {len(summary['runs'])} runs that are done here, got {str(out)!r} "
            f"with {there}; choose another --out, or --keep its runs"
        )
    return summary


def _show(summary: dict[str, Any], out: Path) -> None:
    """Draw the pictures beside ``out``, print the tables."""
    if not summary["runs"]:
        return
    summary = renamed(summary)
    draw(summary, out)
    print(table(summary))
    for more in (models_table(summary), strong_table(summary), agreement(summary)):
        if more is not None:
            print(f"\n{more}")


def _step_times(path: Path) -> dict[str, Any]:
    """From a file of bench_step.py: where the times are from, and ``ms`` by its row names."""
    timed = read_json(path)
    if not isinstance(timed, dict) or "methods" not in timed:
        raise ValueError(f"step_times: expected a JSON file of bench_step.py, got {str(path)!r}")
    about = {name: timed[name] for name in ("setting", "machine", "commit", "command")}
    return {**about, "ms": {name: row["ms"]["median"] for name, row in timed["methods"].items()}}


def _shard(text: str) -> tuple[int, int]:
    try:
        shard, count = (int(part) for part in text.split("/"))
    except ValueError:
        shard, count = 0, 0
    if not 0 <= shard < count:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return shard, count


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.paper.grid", __doc__)
    options_of.add_argument("--setting", choices=list(SETTINGS))
    options_of.add_argument("--dataset", help="with --scale: cifar10, cifar100, svhn, mnist or digits")
    options_of.add_argument(
        "--scale",
        choices=SCALES,
        help="paper: the published setting, for a GPU; small: two cores, hours; medium: a day",
    )
    options_of.add_argument(
        "--root",
        type=Path,
        help="files of the data set; none for digits, an image folder for cifar10 but at paper scale",
    )
    options_of.add_argument("--out", type=Path, help="the JSON file")
    options_of.add_argument("--work", type=Path, default=Path("runs") / "paper", help="folder of the runs")
    options_of.add_argument("--device", default="cpu")
    options_of.add_argument("--variants", type=listed(str), help="names: do the cells of these alone")
    options_of.add_argument("--eps", type=listed(parse_number), help="8/255,0.1")
    options_of.add_argument("--seeds", type=listed(partial(number, low=0)), help="0,1")
    options_of.add_argument(
        "--shard", type=_shard, default=(0, 1), help="I/N: do the I-th of N shares of the cells, from 0"
    )
    options_of.add_argument(
        "--step-times", type=Path, help="with --redraw: a JSON file of bench_step.py, whose times it takes for good"
    )
    options_of.add_argument(
        "--keep", action="store_true", help="count runs in --out as done, of cells that are not under --work"
    )
    options_of.add_argument("--any-commit", action="store_true", help="take runs under --work that other commits made")
    options_of.add_argument(
        "--redraw", type=Path, help="a JSON file of this program: print its tables and draw its pictures anew"
    )
    return options_of


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TypeError, ValueError, ImportError, OSError) as problem:
        sys.exit(f"grid.py: {problem}")
