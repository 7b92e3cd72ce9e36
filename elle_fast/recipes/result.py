"""The end of a run: its models on the test images, ``result.json``, the picture and the page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from elle_fast import data
from elle_fast._core.files import write_json
from elle_fast.evaluation import evaluate, in_precision
from elle_fast.evaluation.document import write_document
from elle_fast.recipes import progress
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.folder import BEST, LAST, PAGE, PICTURE, RESULT, read_best
from elle_fast.recipes.guarding import alarms
from elle_fast.recipes.plot import failing_picture_is_a_warning, plot_curves
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run
from elle_fast.recipes.run_page import run_page
from elle_fast.recipes.run_record import of_result


def accuracy_of(model: nn.Module, split: data.Split, attacks: str, config: TrainConfig) -> dict[str, dict[str, Any]]:
    """By attack, what a run finds on validation images after an epoch, and on test images at its end."""
    model = in_precision(model, config.eval_precision)
    return evaluate(model, data.in_order(split), attacks, eps=config.eps, norm=config.norm, check=False)


def finish(run: Run, folder: Path, console: Console) -> dict[str, Any]:
    """Evaluate, write the result, and draw; every process has to call it."""
    config, epochs = run.config, run.history["epochs"]
    models = run.ranks.on_main(lambda: _evaluated(run, folder), patient=True)
    result = {
        "config": asdict(config),
        "accuracy": models["last"]["accuracy"],
        "models": models,
        "test_images": len(run.test_split),
        "epochs": epochs[-1]["epoch"],
        "e_lin": epochs[-1].get("val_e_lin"),  # None without validation images, as what else follows from them
        "train_adv": epochs[-1]["train_adv"],
        "collapsed": epochs[-1].get("collapsed"),
        "never_robust": epochs[-1].get("never_robust"),
        "collapsed_in_epoch": next((row["epoch"] for row in epochs if row.get("collapsed")), None),
        "training_seconds": sum(row["seconds"] for row in epochs),
        **run.step_counts(),
        **alarms(run.guard),
        "processes": run.ranks.count,
        **run.unreadable(),
        **provenance(),
    }
    for remark in run.remarks():
        console.print(f"warning: {remark}", highlight=False, soft_wrap=True)
    if run.ranks.is_main:
        ball = f"eps {config.eps:.4g} ({config.eps * 255:.3g}/255)" + " in l2" * (config.norm == "l2")
        setting = f"{config.data}, {ball}, seed {config.seed}"
        try:
            write_json(folder / RESULT, result)
        except OSError:
            console.print(*progress.describe_result(result), sep="\n", highlight=False, soft_wrap=True)
            raise
        with failing_picture_is_a_warning(console):
            plot_curves({config.method: run.history}, folder / PICTURE, title=f"{config.method} on {setting}")
        with failing_picture_is_a_warning(console, "report"):
            record = of_result(folder.resolve().name, result, epochs)
            write_document(folder / PAGE, run_page([record]))
    return result


def _evaluated(run: Run, folder: Path) -> dict[str, dict[str, Any]]:
    """By name of a model of the run, its file, its epoch, and its accuracy on the test images."""
    config, split = run.config, run.test_split
    if config.eval_samples is not None:
        split = split.subset(min(config.eval_samples, len(split)))

    def accuracy(model: nn.Module) -> dict[str, Any]:
        return accuracy_of(model, split, config.eval_attacks, config)

    epochs = run.history["epochs"]
    last = epochs[-1]["epoch"]
    found: dict[str, dict[str, Any]] = {}
    for weights, name, best_name in (("trained", "last", "best"), ("averaged", "averaged", "best averaged")):
        if weights == "averaged":
            if run.average is None:
                continue
            run.save_weights(weights, folder / LAST[weights])
        found[name] = {"file": LAST[weights], "epoch": last, "accuracy": accuracy(run.evaluated(weights))}
        if (best := progress.best_epoch(epochs, weights)) is None:
            continue
        model = read_best(folder, run, weights)
        if best != last:
            model.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        numbers = found[name]["accuracy"] if best == last else accuracy(model)
        found[best_name] = {"file": BEST[weights], "epoch": best, "accuracy": numbers}
    return found
