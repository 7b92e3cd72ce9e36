"""Adversarial training from one configuration: data, model, method, schedule, checkpoints, logs and the final numbers.

On one machine a run is a pure function of its configuration and the number of processes. The order of the samples,
their augmentation and the learning rate follow from (seed, epoch, step); all other draws come from torch's generators,
which the checkpoint holds. So a run that was killed and resumed ends with the same bits as one that was not (on the
CPU).

The processes that torchrun starts train one model: each takes its share of every batch, and draws noise of its own. A
resumed run of two processes ends with the same bits, a run of more with the same numbers up to rounding: after a
resume, DistributedDataParallel groups the gradients anew, and with three or more processes the order of the sums
changes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.default_device import host_by_default
from elle_fast._core.files import write_json
from elle_fast.evaluation import evaluate, measure_e_lin
from elle_fast.recipes import checkpoint, progress
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks, local_device
from elle_fast.recipes.logs import RunLog
from elle_fast.recipes.plot import failing_picture_is_a_warning, plot_curves
from elle_fast.recipes.progress import Numbers
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.run import Run
from elle_fast.recipes.schedules import learning_rate
from elle_fast.recipes.stopping import stop_requests

CHECKPOINT, RESULT, PICTURE = "checkpoint.pt", "result.json", "curves.png"
_WATCHED = "clean,fgsm,pgd-10"
# Further numbers of a model on test images, given eps.
Measure = Callable[[nn.Module, data.Split, float], dict[str, float]]


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; its checkpoint is whole and can be resumed."""


@host_by_default()
def train(
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_other_data: bool = False,
    dataset: data.Dataset | None = None,
    console: Console | None = None,
    timeout: float = 120.0,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Train, leave checkpoint, CSV, TensorBoard, picture and ``result.json`` in ``folder``, and return the result.

    With a default process group (:mod:`torch.distributed`), all its processes make the same call and train one model
    with DistributedDataParallel. They share each batch of ``config.batch_size`` equally. Process 0 alone reads and
    writes ``folder``, evaluates and reports; all return the result.

    Args:
        config: the run.
        folder: where its files go; made if missing.
        resume: continue from the checkpoint in ``folder``.
        overwrite: begin anew even if ``folder`` holds a run.
        allow_other_data: with ``resume``, go on with other images or labels of the same shape, and a warning: another
            version of Pillow may decode a JPEG one level off.
        dataset: instead of reading it from ``config.root``, to read it once for several runs.
        console: where lines and the progress bar go; ``None``: standard error.
        timeout: seconds to wait for another process. In a step, the process group's own timeout holds; while process 0
            evaluates, none.
        measure: called after each epoch with the model, the watched test images and eps; the numbers it returns join
            the epoch's row of the history. It must leave the model and torch's generators as they are.

    Raises:
        FileExistsError: if ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: if there is nothing to resume, or no data.
        TypeError, ValueError: for a setting out of range, or a checkpoint of another run or of other data.
        InterruptedRunError: after Ctrl-C or SIGTERM; one process ends after the current step, several after the next.
        OSError: naming the file that cannot be read or written, and why.
        RuntimeError: if the loss is no longer finite, or another process is gone.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, got {checks.describe(config)}")
    folder = checks.path("folder", folder)
    checks.optional("dataset", dataset, data.Dataset, "a Dataset")
    checks.optional("console", console, Console, "a rich.console.Console")
    checks.optional("measure", measure, Callable, "a function of a model, a split and eps")
    config, console = config.resolved(), console or Console(stderr=True)
    config = replace(config, device=local_device(config.device))
    if checks.flag("resume", resume) & checks.flag("overwrite", overwrite):
        raise ValueError("resume, overwrite: expected at most one of them, got both")
    if checks.flag("allow_other_data", allow_other_data) and not resume:
        raise ValueError("allow_other_data: expected False without resume, got True")
    with closing(Ranks(timeout)) as ranks, ranks.naming_the_lost():
        if ranks.count > 1 and config.sync_batchnorm and torch.device(config.device).type == "cpu":
            raise ValueError("sync_batchnorm: expected False on the CPU, where torch has no SyncBatchNorm, got True")
        saved = ranks.on_main(lambda: _saved(config, folder / CHECKPOINT, resume, overwrite, ranks.count))
        dataset = config.read_data() if dataset is None else dataset
        run = Run(config, dataset, folder / CHECKPOINT, ranks)
        if saved is not None:
            checkpoint.check_same_data(saved, dataset, run.data_digest, folder / CHECKPOINT, allow_other_data)
            run.restore(saved)
        else:
            if ranks.is_main:
                _clear(folder)
            run.save()  # a run that is killed in its first steps can be resumed too
        _Loop(run, folder, console, measure).run_to_end()
        return _finish(run, folder, console)


def _saved(config: TrainConfig, path: Path, resume: bool, overwrite: bool, ranks: int) -> dict[str, Any] | None:
    """The state to begin with, if the run is to be resumed."""
    if path.exists() and not (resume or overwrite):
        ways = "resume it, overwrite it, or choose another folder"
        raise FileExistsError(f"out: {str(path.parent)!r} holds a run; {ways}")
    if not resume:
        return None
    saved = checkpoint.load(path)
    with checkpoint.fitting(path):
        checkpoint.check_same_run(TrainConfig(**saved["config"]).identity(), config.identity(), path)
    if (processes := 1 + len(saved["other_ranks"])) != ranks:
        raise ValueError(f"checkpoint: expected one of {ranks} processes, got {str(path)!r} of {processes}")
    return saved


class _Loop:
    """Takes a run to its end: logs its steps, evaluates it after each epoch, saves it, and stops when asked."""

    def __init__(self, run: Run, folder: Path, console: Console, measure: Measure | None) -> None:
        self.run, self.measure = run, measure
        title = f"{run.config.method} seed {run.config.seed}"
        self.log = RunLog(folder if run.ranks.is_main else None, title, run.steps, run.history, console)
        self.watched = run.test_split.subset(min(run.config.watch, len(run.test_split)))
        self.began = 0.0  # when the epoch would have begun without interruptions

    def run_to_end(self) -> None:
        """Train; raises InterruptedRunError if asked to stop."""
        run = self.run
        with self.log, stop_requests() as stop_asked:
            self._warn_of_one_class()
            self.log.advance(run.step)
            while run.step < run.steps:
                self._epoch(stop_asked)
            self.log.write()  # one killed after its last checkpoint may have lost the last rows
        if run.ranks.any(stop_asked()):  # after the loop last looked
            raise self._stopped()

    def _warn_of_one_class(self) -> None:
        for name, split in (("training", self.run.train_split), ("test", self.run.test_split)):
            if len(split.labels.unique()) == 1:
                always = "a model that always says so is 100 % right, under every attack"
                self.log.say(f"warning: all {name} images are of one class: {always}")

    def _epoch(self, stop_asked: Callable[[], bool]) -> None:
        run, config = self.run, self.run.config
        assert config.learning_rate is not None
        run.model.train()
        self.began = time.perf_counter() - run.seconds
        for x, y in run.upcoming(run.steps_per_epoch - run.step % run.steps_per_epoch):
            rate = learning_rate(config.schedule, config.learning_rate, run.step, run.steps, config.data)
            numbers = self._step(x, y, rate)
            run.step += 1
            self.log.advance(run.step)
            if run.step % config.log_every == 0:
                self._log_step(numbers, rate)
            ended = run.step % run.steps_per_epoch == 0
            if ended:
                self._end_epoch()
            elif run.step % config.checkpoint_every == 0:
                self._save_if_finite()
            # All processes have to stop after the same step.
            if run.ranks.any_earlier(stop_asked()):
                if not ended:
                    self._save_if_finite()
                raise self._stopped()

    def _step(self, x: Tensor, y: Tensor, rate: float) -> Numbers:
        """One optimiser step; the numbers of this process' share of the batch."""
        for group in self.run.optimizer.param_groups:
            group["lr"] = rate
        self.run.take_step(x, y, **self.run.options)
        numbers = progress.step_numbers(self.run.criterion, y, self.run.sums_dtype)
        progress.add(self.run.sums, numbers)
        return numbers

    def _log_step(self, numbers: Numbers, rate: float) -> None:
        run, earlier = self.run, self.run.history["epochs"]
        row = {"step": run.step, "epoch": 1 + (run.step - 1) // run.steps_per_epoch, "learning_rate": rate}
        row |= progress.averages(numbers, run.ranks) | run.step_counts()
        clean = earlier[-1]["test_clean"] if earlier else math.nan
        self.log.step(row, f"{progress.describe(row)}  test clean {clean:.1%}")
        self._check_finite(row["loss"])

    def _end_epoch(self) -> None:
        self._read_clock()
        run, earlier = self.run, self.run.history["epochs"]
        row: dict[str, Any] = {"step": run.step, "epoch": run.step // run.steps_per_epoch}
        row |= progress.averages(run.sums, run.ranks) | run.step_counts()
        self._check_finite(row["loss"])
        row |= run.ranks.on_main(self._watch, patient=True)
        self._check_finite(row["test_e_lin"])
        row["seconds"] = run.seconds
        row["collapsed"] = progress.is_collapse(row["train_adv"], row["test_pgd"], run.shape["classes"])
        row["robust"] = progress.is_robust(row["test_pgd"], run.shape["classes"])
        news = progress.turning_point(row, earlier)
        self.log.epoch(row, progress.describe_epoch(row, run.steps // run.steps_per_epoch))
        if news is not None:
            self.log.say(news)
        run.sums, run.seconds = {}, 0.0
        run.save()
        self.log.write()

    def _watch(self) -> dict[str, float]:
        model, eps = self.run.model, self.run.config.eps
        found = evaluate(model, data.in_order(self.watched), _WATCHED, eps=eps)
        row: dict[str, float] = {f"test_{name.split('-')[0]}": numbers["accuracy"] for name, numbers in found.items()}
        row["test_e_lin"] = measure_e_lin(model, data.in_order(self.watched), eps=eps)
        return row if self.measure is None else {**row, **self.measure(model, self.watched, eps)}

    def _save_if_finite(self) -> None:
        # If one step's loss is not finite, the epoch's sum is not either.
        self._check_finite(float(self.run.ranks.sum(self.run.sums["loss"])))
        self._read_clock()
        self.run.save()
        self.log.write()

    def _check_finite(self, loss: float) -> None:
        run = self.run
        # The loss belongs to the weights before the last update, so check those after it too.
        if math.isfinite(loss) and all(bool(value.isfinite().all()) for value in run.model.state_dict().values()):
            return
        raise RuntimeError(
            f"loss: expected finite numbers and weights, got {loss} at or before step {run.step}; "
            f"{str(run.path)!r} holds the last state before that. A smaller learning rate or lam may help, or "
            "max_ratio 100"
        )

    def _read_clock(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)  # steps that are still running count
        self.run.seconds = time.perf_counter() - self.began

    def _stopped(self) -> InterruptedRunError:
        run = self.run
        return InterruptedRunError(f"stopped after step {run.step} of {run.steps}; resume with the same options")


def _finish(run: Run, folder: Path, console: Console) -> dict[str, Any]:
    """Evaluate, write the result, and draw; every process has to call it."""
    config, chosen = run.config, run.test_split
    if config.eval_samples is not None:
        chosen = chosen.subset(min(config.eval_samples, len(chosen)))
    epochs = run.history["epochs"]
    result = {
        "config": asdict(config),
        "accuracy": run.ranks.on_main(
            lambda: evaluate(run.model, data.in_order(chosen), config.eval_attacks, eps=config.eps), patient=True
        ),
        "e_lin": epochs[-1]["test_e_lin"],
        "train_adv": epochs[-1]["train_adv"],
        "collapsed": epochs[-1]["collapsed"],
        "ever_robust": progress.was_robust(epochs),
        "collapsed_in_epoch": next((row["epoch"] for row in epochs if row["collapsed"]), None),
        "training_seconds": sum(row["seconds"] for row in epochs),
        **run.step_counts(),
        "processes": run.ranks.count,
        **provenance(),
    }
    if run.ranks.is_main:
        setting = f"{config.data}, eps {config.eps:.4g} ({config.eps * 255:.3g}/255), seed {config.seed}"
        try:
            write_json(folder / RESULT, result)
        except OSError:
            console.print(*progress.describe_accuracy(result["accuracy"]), sep="\n", highlight=False, soft_wrap=True)
            raise
        with failing_picture_is_a_warning(console):
            plot_curves({config.method: run.history}, folder / PICTURE, title=f"{config.method} on {setting}")
    return result


def _clear(folder: Path) -> None:
    """Remove an earlier run's files, so that they are not taken for the new one's."""
    for name in (RESULT, PICTURE, "steps.csv", "epochs.csv"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
