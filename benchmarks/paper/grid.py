"""The paper's comparison: every variant x eps x seed in a resumable grid, ending in JSON, tables and pictures.

    python -m benchmarks.paper.grid --scale smoke --out smoke.json
    python -m benchmarks.paper.grid --dataset cifar10 --scale small --root cifar10-jpeg.tar.xz --out cifar10-small.json
    python -m benchmarks.paper.grid --dataset cifar10 --scale paper --root cifar-10-binary.tar.gz --device cuda --out X
    python -m benchmarks.paper.grid --setting digits --out benchmarks/results/digits.json
    python -m benchmarks.paper.grid --redraw cifar10-small.json
    python -m benchmarks.paper.grid --redraw cifar10-small.json --step-times bench_step.json

A variant is a method, or a method with options. benchmarks/paper/settings.py says which variants a setting has, at
which eps and with which seeds, and what they cost. First the cells are trained, each in its own folder under --work,
then some of them are attacked by stronger attacks. What is done is skipped, what was cut off is resumed, so the same
command can be typed again after anything. A run of another configuration, other data, or another version or commit of
elle_fast under --work is an error (``--any-commit`` takes those of other commits; the JSON file names each one's). A
training that fails, as one whose loss stops being finite does, stops no other and is not tried again: it is in the JSON
file under ``failed``, and the exit status is 1 (remove its failed.json to try).
``--variants fgsm,elle-a``, ``--eps 8/255,16/255`` and ``--seeds 0`` choose among the cells; ``--shard 0/2`` and
``--shard 1/2`` split them over two processes with one --work between them (with OMP_NUM_THREADS=1 on two cores), or
over two machines, whose folders are then copied into one. Each writes the JSON file of all cells of the setting that
are done when it ends, with the number of those that are missing, and beside it the pictures, which ``--redraw`` makes
again from the JSON file alone. Times of runs beside others say little: with ``--step-times`` the tables and pictures
have those of a step, which bench_step.py took in turns.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.paper.figures import draw
from benchmarks.paper.settings import SCALES, SETTINGS, Setting, find, shares
from benchmarks.paper.tables import agreement, strong_table, table
from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.files import write_json
from elle_fast.evaluation.accuracy import parse_attacks
from elle_fast.recipes import checkpoint
from elle_fast.recipes.cli import device, fraction
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.provenance import commit, versions
from elle_fast.recipes.train import CHECKPOINT, RESULT, InterruptedRunError, train

__all__ = ["SETTINGS", "Setting", "main", "table"]

CELL, STRONG, FAILED = "cell.json", "strong.json", "failed.json"
_ROWS = 200  # of lam over time that are kept of a run

Cell = tuple[str, TrainConfig]
_Difference = tuple[str, Any, Any]  # what, as it was made, as it is now


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the cells of this shard, then write what is there of all of them; 130 if asked to stop."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.redraw is not None:
        summary = _read_json(options.redraw)
        if not isinstance(summary, dict) or not isinstance(summary.get("runs"), list):
            raise ValueError(f"redraw: expected a JSON file of this program, got {str(options.redraw)!r}")
        if options.step_times is not None:
            summary["step_times"] = _step_times(options.step_times)
            write_json(options.out or options.redraw, summary)
        _show(summary, options.out or options.redraw)
        return 0
    if options.step_times is not None:
        parser.error("expected --step-times beside --redraw")
    if options.out is None or (options.setting is None) == (options.scale is None):
        parser.error("expected --out, and one of --setting and --scale, or else --redraw")
    if options.dataset is not None and options.scale is None:
        parser.error("expected --dataset beside --scale, got it beside --setting, which has one")
    chosen = options.setting or find(options.dataset, options.scale)
    setting, work = SETTINGS[chosen], options.work / chosen
    if setting.strong:
        parse_attacks(setting.strong_attacks)  # a package that is missing is said now, not after the training
    cells = setting.cells(options.root, device(options.device))
    code = None if options.any_commit else commit()
    try:
        _run(setting, _own(setting, cells, options), work, options.root, code)
    except InterruptedRunError as stop:
        print(f"{stop}; type the same command again")
        return 130
    command = ["python", "-m", "benchmarks.paper.grid", "--setting", chosen]
    if options.root is not None:
        command += ["--root", Path(options.root).name]
    command += [] if options.device == "cpu" else ["--device", options.device]
    summary = _summary(setting, cells, work, code) | {
        "setting": chosen,
        "command": shlex.join([*command, "--out", options.out.name]),
    }
    _check_out(options.out, summary)
    write_json(options.out, summary)
    _show(summary, options.out)
    if summary["missing"]:
        print(f"{summary['missing']} of {len(cells)} cells are still to be done")
    for each in summary["failed"]:
        print(f"{each['variant']}, eps {each['eps']:.4g}, seed {each['seed']}: {each['error']}")
    if summary["missing_strong"]:
        print(f"{summary['missing_strong']} cells are still to be attacked by {setting.strong_attacks}")
    return 1 if summary["failed"] else 0


def _own(setting: Setting, cells: list[Cell], options: argparse.Namespace) -> list[Cell]:
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


def _run(setting: Setting, own: list[Cell], work: Path, root: str | None, code: str | None) -> None:
    """Train what is not trained yet, then make the stronger attacks that are not made yet."""
    # All are looked at before the first one is trained.
    own = [(name, config) for name, config in own if _failure(_folder(work, name, config), config, code) is None]
    open_cells = [(name, config) for name, config in own if not _is_done(_folder(work, name, config), config, code)]
    base = setting.config
    dataset = data.load(base.data, root, limit=base.limit, test_limit=base.test_limit, image_size=base.image_size)
    digest = dataset.digest()
    for name, config in own:
        if (name, config) not in open_cells:
            folder = _folder(work, name, config)
            _refuse(folder, [("data", checkpoint.load(folder / CHECKPOINT)["data"], digest)])
    for number, (name, config) in enumerate(open_cells, start=1):
        folder = _folder(work, name, config)
        print(f"{number}/{len(open_cells)}: {name}, eps {config.eps:.4g}, seed {config.seed}", flush=True)
        write_json(folder / CELL, {"versions": versions(), "commit": commit()})
        try:
            train(config, folder, resume=(folder / CHECKPOINT).exists(), dataset=dataset, measure=setting.measure)
        except InterruptedRunError:
            raise
        except RuntimeError as error:
            # Without the folder's path, which is this machine's.
            text = str(error).partition(";")[0]
            asked = asdict(config.resolved())
            write_json(folder / FAILED, {"error": text, "config": asked, "versions": versions(), "commit": commit()})
            own.remove((name, config))
    for name, config in own:
        folder = _folder(work, name, config)
        if setting.is_strong(name, config) and _strong(setting, folder, code) is None:
            print(f"{setting.strong_attacks}: {name}, eps {config.eps:.4g}, seed {config.seed}", flush=True)
            evaluate_checkpoint(
                folder / CHECKPOINT,
                setting.strong_attacks,
                samples=setting.strong_samples,
                device=config.device,
                json=folder / STRONG,
                dataset=dataset,
            )


def _summary(setting: Setting, cells: list[Cell], work: Path, code: str | None) -> dict[str, Any]:
    """What is there of all cells."""
    # Reading takes a while, in which another shard may end a cell and write the file with it.
    done: list[tuple[str, TrainConfig, bool]] = []
    runs: list[dict[str, Any]] = []
    while done != (now := _done(setting, cells, work, code)):
        done = now
        runs = [
            {
                "variant": name,
                **_read(_folder(work, name, config)),
                "strong": _read_strong(setting, work, name, config, code),
            }
            for name, config, _ in now
        ]
    wanted = sum(setting.is_strong(name, config) for name, config in cells)
    return {
        "note": setting.note,
        "eps": list(setting.eps or (setting.config.eps,)),
        "missing": len(cells) - len(done),
        "failed": [
            {"variant": name, "eps": config.eps, "seed": config.seed, "error": error}
            for name, config in cells
            if (error := _failure(_folder(work, name, config), config, code)) is not None
        ],
        "missing_strong": wanted - sum(strong for *_, strong in done),
        "runs": runs,
    }


def _done(setting: Setting, cells: list[Cell], work: Path, code: str | None) -> list[tuple[str, TrainConfig, bool]]:
    """The cells that are trained, and whether the stronger attacks on them are made."""
    found = []
    for name, config in cells:
        folder = _folder(work, name, config)
        if _is_done(folder, config, code):
            strong = setting.is_strong(name, config) and _strong(setting, folder, code) is not None
            found.append((name, config, strong))
    return found


def _check_out(out: Path, summary: dict[str, Any]) -> None:
    """A file is not replaced by one with less in it, such as that of a work folder that was lost."""
    if not summary["runs"]:
        raise ValueError("work: expected at least one run that is done, got none: there is nothing to write")
    there = _read_json(out).get("runs", []) if out.exists() else []
    if len(there) > len(summary["runs"]):
        raise ValueError(
            f"out: expected a file of at most the {len(summary['runs'])} runs that are done here, got {str(out)!r} "
            f"with {len(there)}; choose another --out"
        )


def _show(summary: dict[str, Any], out: Path) -> None:
    """Draw the pictures beside ``out``, print the tables."""
    if not summary["runs"]:
        return
    draw(summary, out)
    print(table(summary))
    for more in (strong_table(summary), agreement(summary)):
        if more is not None:
            print(f"\n{more}")


def _read(folder: Path) -> dict[str, Any]:
    """What the summary keeps of a run: no path of the machine, but machine, versions and commit of this very run."""
    result = _read_json(folder / RESULT)
    history = checkpoint.load(folder / CHECKPOINT)["history"]
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
    steps = [{"step": row["step"], "lam": row["lam"]} for row in history["steps"] if "lam" in row]
    return {
        "method": result["config"]["method"],
        "seed": result["config"]["seed"],
        "config": {name: value for name, value in result["config"].items() if name != "root"},
        **{name: result[name] for name in kept},
        # Of the steps, those that took the whole gradient of E_lin; None where no step may be without.
        "full_share": result["full_steps"] / (result["full_steps"] + result["light_steps"])
        if "full_steps" in result
        else None,
        "epochs": history["epochs"],
        # Every n-th row.
        "steps": steps[:: max(1, math.ceil(len(steps) / _ROWS))],
    }


def _read_strong(
    setting: Setting, work: Path, name: str, config: TrainConfig, code: str | None
) -> dict[str, Any] | None:
    found = _strong(setting, _folder(work, name, config), code) if setting.is_strong(name, config) else None
    kept = ("accuracy", "worst_case", "masking", "packages")
    return None if found is None else {name: found[name] for name in kept if name in found}


def _failure(folder: Path, config: TrainConfig, code: str | None) -> str | None:
    """Why the training of this very configuration failed, if it did."""
    if not (folder / FAILED).exists():
        return None
    found = _read_json(folder / FAILED)
    _refuse(folder, _code(found, code) + _settings(found["config"], config))
    return str(found["error"])


def _is_done(folder: Path, config: TrainConfig, code: str | None) -> bool:
    """Whether the folder holds the result of this very configuration.

    Raises:
        ValueError: if it holds anything of another configuration, version or commit (but for a ``code`` of ``None``),
            with what differs.
    """
    if (folder / RESULT).exists():
        about = _read_json(folder / RESULT)
        made = about["config"]
    elif (folder / CHECKPOINT).exists():
        # Folders from before there were these files do not say which version they are of.
        about = _read_json(folder / CELL) if (folder / CELL).exists() else {"versions": {}}
        made = checkpoint.load(folder / CHECKPOINT)["config"]
    else:
        return False
    _refuse(folder, _code(about, code) + _settings(made, config))
    return (folder / RESULT).exists()


def _settings(made: dict[str, Any], config: TrainConfig) -> list[_Difference]:
    """Each setting as it was and as it is now."""
    # A setting that there was none of had its default.
    made, asked = {**asdict(TrainConfig()), **made}, asdict(config.resolved())
    names = sorted((made.keys() | asked.keys()) - {"root", "device"})
    return [(name, made.get(name), asked.get(name)) for name in names]


def _code(about: dict[str, Any], code: str | None) -> list[_Difference]:
    """Version and, but for a ``code`` of ``None``, commit: those a file is of, and those of now."""
    found: list[_Difference] = [("elle_fast", about["versions"].get("elle_fast"), versions()["elle_fast"])]
    return found if code is None else [*found, ("commit", about.get("commit"), code)]


def _strong(setting: Setting, folder: Path, code: str | None) -> dict[str, Any] | None:
    """What the stronger attacks did to the folder's checkpoint, if that is there; an error if they are others."""
    if not (folder / STRONG).exists():
        return None
    found: dict[str, Any] = _read_json(folder / STRONG)
    names = [attack.name for attack in parse_attacks(setting.strong_attacks)]
    digest = hashlib.blake2b((folder / CHECKPOINT).read_bytes(), digest_size=16).hexdigest()
    differing: list[_Difference] = [
        ("attacks", list(found["accuracy"]), names),
        ("checkpoint_digest", found["checkpoint_digest"], digest),
        *_code(found, code),
    ]
    if setting.strong_samples is not None:
        # No more than there are.
        samples = min(setting.strong_samples, setting.config.test_limit or setting.strong_samples)
        differing.append(("samples", found["worst_case"]["samples"], samples))
    _refuse(folder / STRONG, differing)
    return found


def _refuse(path: Path, compared: list[_Difference]) -> None:
    listed = [f"{name} = {made!r} (now: {now!r})" for name, made, now in compared if made != now]
    if listed:
        raise ValueError(
            f"work: expected runs of this setting and version, got {str(path)!r} of another: {'; '.join(listed)}; "
            "remove it, or choose another --work"
        )


def _folder(work: Path, name: str, config: TrainConfig) -> Path:
    return work / f"{name.replace(' ', '-')}-eps{255 * config.eps:.3g}-seed{config.seed}"


def _step_times(path: Path) -> dict[str, Any]:
    """Those of a file of bench_step.py: where they are from, and ``ms`` by its names."""
    timed = _read_json(path)
    if not isinstance(timed, dict) or "methods" not in timed:
        raise ValueError(f"step_times: expected a JSON file of bench_step.py, got {str(path)!r}")
    about = {name: timed[name] for name in ("setting", "machine", "commit", "command")}
    return {**about, "ms": {name: row["ms"]["median"] for name, row in timed["methods"].items()}}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected a whole JSON file, got {str(path)!r}: {error}") from error


def _shard(text: str) -> tuple[int, int]:
    try:
        shard, count = (int(part) for part in text.split("/"))
    except ValueError:
        shard, count = 0, 0
    if not 0 <= shard < count:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N, got {text!r}")
    return shard, count


def _names(text: str) -> list[str]:
    return text.split(",")


def _eps(text: str) -> list[float]:
    return [fraction(each) for each in text.split(",")]


def _seeds(text: str) -> list[int]:
    if not all(each.isdecimal() for each in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected integers >= 0 with commas between, got {text!r}")
    return [int(each) for each in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS))
    parser.add_argument("--dataset", help="with --scale: digits, cifar10, cifar100, svhn, mnist, where there is one")
    parser.add_argument("--scale", choices=SCALES, help="paper: the published setting, for a GPU; small: two cores")
    parser.add_argument(
        "--root", help="files of the data set; none for digits, an image folder for cifar10 at small scale"
    )
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--work", type=Path, default=Path("runs") / "paper", help="folder of the runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", type=_names, help="names: do the cells of these alone")
    parser.add_argument("--eps", type=_eps, help="8/255,0.1")
    parser.add_argument("--seeds", type=_seeds, help="0,1")
    parser.add_argument(
        "--shard", type=_shard, default=(0, 1), help="I/N: do the I-th of N shares of the cells, from 0"
    )
    parser.add_argument(
        "--step-times", type=Path, help="with --redraw: a JSON file of bench_step.py, whose times it takes for good"
    )
    parser.add_argument("--any-commit", action="store_true", help="take runs under --work that other commits made")
    parser.add_argument(
        "--redraw", type=Path, help="a JSON file of this program: print its tables and draw its pictures anew"
    )
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TypeError, ValueError, ImportError, OSError) as problem:
        sys.exit(f"grid.py: {problem}")
