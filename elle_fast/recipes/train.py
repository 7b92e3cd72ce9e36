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
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.default_device import host_by_default
from elle_fast._core.host_copy import HostCopy
from elle_fast._core.kept_memory import keep_freed_memory
from elle_fast.data.streaming import Stream
from elle_fast.evaluation import measure_e_lin
from elle_fast.recipes import checkpoint, progress
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks, local_device
from elle_fast.recipes.folder import CHECKPOINT, PAGE, PICTURE, RESULT, check_best, clear, keep_best, saved_state
from elle_fast.recipes.logs import RunLog
from elle_fast.recipes.meter import averages, ruined
from elle_fast.recipes.result import accuracy_of, finish
from elle_fast.recipes.run import Run
from elle_fast.recipes.stopping import stop_requests

__all__ = ["CHECKPOINT", "PAGE", "PICTURE", "RESULT", "InterruptedRunError", "Measure", "train"]

_WATCHED = {"trained": "clean,fgsm,pgd-10", "averaged": "clean,pgd-10"}
# Further numbers of a model on validation images, given eps.
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
    """Train, leave checkpoints, CSV, TensorBoard, pictures and ``result.json`` in ``folder``, and return the result.

    After each epoch the model is attacked on ``config.validation`` images held out of the training images; no test
    image is looked at before the end. Then the last weights, the best ones under PGD-10 on the validation images, and
    with ``config.average`` the averaged ones, last and best, are evaluated on the test images: ``models`` of the
    result, ``accuracy`` being that of the last. Each is a checkpoint in ``folder``.

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
        measure: called after each epoch with the model, the validation images and eps; the numbers it returns join
            the epoch's row of the history. It must leave the model and torch's generators as they are.

    Raises:
        FileExistsError: if ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: if there is nothing to resume, its best checkpoint is gone, or there are no data.
        TypeError, ValueError: for a setting out of range, a checkpoint of another run or of other data, or a best
            checkpoint that is not the one this run wrote.
        InterruptedRunError: after Ctrl-C or SIGTERM; one process ends after the current step, several after the next.
        OSError: naming the file that cannot be read or written, and why.
        RuntimeError: if the loss is no longer finite, and with ``config.guard`` remains so; or another process is gone.
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, got {checks.describe(config)}")
    folder = checks.path("folder", folder)
    checks.optional("dataset", dataset, data.Dataset, "a Dataset")
    checks.optional("console", console, Console, "a rich.console.Console")
    checks.optional("measure", measure, Callable, "a function of a model, a split and eps")
    config, console = config.resolved(), console or Console(stderr=True)
    config = replace(config, device=local_device(config.device))
    if torch.device(config.device).type == "cpu":
        keep_freed_memory()
    if checks.flag("resume", resume) & checks.flag("overwrite", overwrite):
        raise ValueError("resume, overwrite: expected at most one of them, got both")
    if checks.flag("allow_other_data", allow_other_data) and not resume:
        raise ValueError("allow_other_data: expected False without resume, got True")
    if measure is not None and config.validation == 0:
        raise ValueError("measure: expected None without validation images, got a function")
    with closing(Ranks(timeout)) as ranks, ranks.naming_the_lost():
        if ranks.count > 1 and config.sync_batchnorm and torch.device(config.device).type == "cpu":
            raise ValueError("sync_batchnorm: expected False on the CPU, where torch has no SyncBatchNorm, got True")
        saved = ranks.on_main(lambda: saved_state(config, folder / CHECKPOINT, resume, overwrite, ranks.count))
        if saved is not None and config.stream == "auto":  # this machine's memory may be another
            config = replace(config, stream=saved["config"]["stream"])
        dataset = config.read_data() if dataset is None else dataset
        if data.of_pictures(config.data):
            config = replace(config, stream="always" if dataset.streamed else "never")
        run = Run(config, dataset, folder / CHECKPOINT, ranks, saved)
        if saved is not None:
            checkpoint.check_same_data(saved, dataset, run.data_digest, folder / CHECKPOINT, allow_other_data)
            run.restore(saved)
            ranks.on_main(lambda: check_best(folder, run))
        else:
            if ranks.is_main:
                clear(folder)
            run.save()  # a run that is killed in its first steps can be resumed too
        _Loop(run, folder, console, measure).run_to_end()
        return finish(run, folder, console)


class _Sent(NamedTuple):
    """A row of the log, what follows its averages, the samples that they are over, and their sums on their way."""

    row: dict[str, Any]
    counts: dict[str, Any]
    samples: int
    found: HostCopy | Tensor

    def is_there(self) -> bool:
        """Whether reading it waits for nothing; elsewhere than on CUDA there is nothing to wait for."""
        return isinstance(self.found, Tensor) or self.found.arrived()


class _Loop:
    """Takes a run to its end: logs its steps, evaluates it after each epoch, saves it, and stops when asked."""

    def __init__(self, run: Run, folder: Path, console: Console, measure: Measure | None) -> None:
        self.run, self.folder, self.measure = run, folder, measure
        title = f"{run.config.method} seed {run.config.seed}"
        self.log = RunLog(folder if run.ranks.is_main else None, title, run.steps, run.history, console)
        self.sent: deque[_Sent] = deque()  # rows whose numbers are on their way
        self.ruined = False  # whether the last epoch ended with what is not finite, and left it to the guard
        self.began = 0.0  # when the epoch would have begun without interruptions

    def run_to_end(self) -> None:
        """Train; raises InterruptedRunError if asked to stop."""
        run = self.run
        with self.log, stop_requests() as stop_asked:
            self.log.say(f"run: {self.folder}")
            for note in run.notes:
                self.log.say(note)
            for doubt in run.doubts():
                self.log.say(f"warning: {doubt}")
            if isinstance(run.train_split, Stream):
                self.log.say(f"training data: {run.train_split}")
            self._remark()
            self.log.advance(run.step)
            while run.step < run.steps and not self._gave_up():
                self._epoch(stop_asked)
            self.log.write()  # one killed after its last checkpoint may have lost the last rows
        if run.ranks.any(stop_asked()):  # after the loop last looked
            raise self._stopped()

    def _remark(self) -> None:
        for remark in self.run.remarks():
            self.log.say(f"warning: {remark}")

    def _gave_up(self) -> bool:
        """Whether ``patience`` is at its end; a function of the history, so that a resumed run stops there too."""
        epochs, patience = self.run.history["epochs"], self.run.config.patience
        warmup = self.run.config.eps_warmup or 0.0
        if patience is None or not epochs or progress.epochs_without_gain(epochs, warmup) < patience:
            return False
        self.log.say(
            f"stopped after epoch {epochs[-1]['epoch']}: no better PGD-10 accuracy on the validation images in "
            f"{patience} epochs"
        )
        return True

    def _epoch(self, stop_asked: Callable[[], bool]) -> None:
        run, config = self.run, self.run.config
        run.model.train()
        self.began = time.perf_counter() - run.seconds
        epoch, taken = run.plan.place(run.step)
        for x, y in run.upcoming(run.plan.epoch_steps(run.step) - taken):
            self._step(x, y)
            run.step += 1
            self.log.advance(run.step)
            if run.step % config.log_every == 0:
                self._log_step(len(y))
            self._read_rows()
            ended = run.plan.place(run.step)[0] > epoch
            if ended:
                self._end_epoch()
            elif config.checkpoint_every and run.step % config.checkpoint_every == 0:
                self._save_if_finite()
            # All processes have to stop after the same step.
            if run.ranks.any_earlier(stop_asked()):
                if not ended:
                    self._save_if_finite()
                raise self._stopped()

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.run.take_step(x, y)
        self._remark()
        if self.run.average is not None:
            self.run.average.update_parameters(self.run.model)

    def _log_step(self, samples: int) -> None:
        """Send the numbers of the last step to the host; the row is written when they are there."""
        run = self.run
        row: dict[str, Any] = {"step": run.step, "epoch": 1 + run.plan.place(run.step - 1)[0]}
        row["learning_rate"], _ = run.course.rates(run.step - 1)[-1]
        self.sent.append(_Sent(row | self._eps(), run.step_counts(), samples, self._with_weights(run.meter.last)))

    def _with_weights(self, measured: Tensor, others: Iterable[Tensor] = ()) -> HostCopy | Tensor:
        """Numbers summed over all processes, and in how many of these a weight is not finite; on CUDA on their way.

        Of ``others`` as of weights.
        """
        run = self.run
        kept = [*run.model.state_dict().values(), *others]
        found = run.ranks.sum(torch.cat([measured, ruined(kept, measured.dtype)]))
        return HostCopy.start(found) or found

    def _read_rows(self, *, wait: bool = False) -> None:
        """Write the rows whose numbers are there, or all of them."""
        run, earlier = self.run, self.run.history["epochs"]
        while self.sent and (wait or self.sent[0].is_there()):
            row, counts, samples, found = self.sent.popleft()
            ranks = run.ranks.count
            *sums, bad = found.tolist()
            row |= averages(run.meter.names, sums, ranks, ranks * samples) | counts
            clean = earlier[-1].get("val_clean", math.nan) if earlier else math.nan
            self.log.step(row, f"{progress.describe(row)}  validation clean {clean:.1%}")
            self._check_finite(row["loss"], bad, row["step"])

    def _eps(self) -> dict[str, float]:
        """With a warm-up: the eps of the step just taken."""
        return {"eps": self.run.course.eps(self.run.step - 1)} if self.run.config.eps_warmup else {}

    def _end_epoch(self) -> None:
        self._read_rows(wait=True)
        self._read_clock()
        run, earlier = self.run, self.run.history["epochs"]
        row: dict[str, Any] = {"step": run.step, "epoch": run.plan.place(run.step)[0]}
        averages, bad = self._checked_averages(ended=True)
        self.ruined = bad > 0
        row |= self._eps() | averages | run.step_counts()
        row["seconds"] = run.seconds
        news = None
        if run.validation is not None:
            validation = run.validation
            watched = run.ranks.on_main(lambda: self._watch(validation), patient=True)
            self._check_finite(watched["val_e_lin"])
            row |= dict.fromkeys(watched, math.nan) if self.ruined else watched  # the argmax of NaN is a class, too
            row |= progress.verdict(row, earlier, len(validation), run.shape["classes"])
            news = progress.turning_point(row, earlier)
        self.log.epoch(row, progress.describe_epoch(row, run.plan.epochs))
        if news is not None:
            self.log.say(news)
        run.meter.clear()
        run.seconds = 0.0
        if not self.ruined:  # such weights are not read back, and the last checkpoint is as good as it was
            run.save()
            if run.ranks.is_main:
                keep_best(self.folder, run)
        self.log.write()

    def _watch(self, split: data.Split) -> dict[str, float]:
        run, eps, norm = self.run, self.run.config.eps, self.run.config.norm
        row: dict[str, float] = {}
        for weights, suffix in {"trained": "", "averaged": "_averaged"}.items():
            if weights == "trained" or run.average is not None:
                found = accuracy_of(run.evaluated(weights), split, _WATCHED[weights], run.config)
                row |= {f"val_{name.split('-')[0]}{suffix}": numbers["accuracy"] for name, numbers in found.items()}
        row["val_e_lin"] = measure_e_lin(run.model, data.in_order(split), eps=eps, norm=norm)
        return row if self.measure is None else {**row, **self.measure(run.model, split, eps)}

    def _save_if_finite(self) -> None:
        self._read_rows(wait=True)
        _, bad = self._checked_averages()
        if bad:
            return
        self._read_clock()
        self.run.save()
        self.log.write()

    def _checked_averages(self, *, ended: bool = False) -> tuple[dict[str, float], float]:
        """Over the epoch's steps so far, and whether what is to be saved is not finite; raises as _check_finite.

        A guard has until the end of the next epoch, and of the run, to go back.
        """
        run, ranks = self.run, self.run.ranks.count
        assert run.meter.sums is not None
        *sums, bad = self._with_weights(run.meter.sums, run.kept_beside_weights()).tolist()
        row = averages(run.meter.names, sums, ranks * run.meter.steps, ranks * run.meter.samples)
        self._check_finite(row["loss"], bad, late=ended and bad > 0 and (self.ruined or run.step == run.steps))
        return row, bad

    def _check_finite(self, number: float, bad: float = 0.0, step: int | None = None, *, late: bool = False) -> None:
        """Raise RuntimeError for what is not finite, unless a guard is to go back and it is not too ``late``."""
        # The loss belongs to the weights before the last update, so `bad` tells of those after it.
        run = self.run
        if (math.isfinite(number) and bad == 0) or (not late and run.guard is not None and run.guard.hopeful):
            return
        got = "weights, an optimizer or a criterion that are not" if math.isfinite(number) else number
        raise RuntimeError(
            f"loss: expected finite numbers and weights, got {got} at or before step {step or run.step}; "
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
