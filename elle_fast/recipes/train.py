"""Adversarial training from one configuration: data, model, method, schedule, checkpoints, logs and the final numbers.

A run is a pure function of its configuration on one machine: the order of the samples, their augmentation and the
learning rate follow from (seed, epoch, step), the rest of the randomness from torch's generators, which are part of the
checkpoint. So a run that was killed and resumed ends with the same bits as one that was not (on the CPU).

Several processes that torchrun started train one model: each takes its share of every batch, and its own noise. Their
number is part of what the run is a function of. A resumed run of two processes ends with the same bits, one of more
with the same numbers up to rounding: DistributedDataParallel chooses anew, in the first step after a resume, which
gradients it adds up together, and so the order in which those of three or more processes are added.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from elle_fast import data, methods
from elle_fast._core.files import write_json
from elle_fast._core.seeds import derived_seed
from elle_fast.evaluation.accuracy import BOUNDS, evaluate, measure_e_lin, parse_attacks
from elle_fast.recipes import checkpoint, models
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.logs import History, RunLog
from elle_fast.recipes.plot import plot_curves
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.schedules import learning_rate

CHECKPOINT, RESULT, PICTURE = "checkpoint.pt", "result.json", "curves.png"
_WATCHED = "clean,fgsm,pgd-10"
# Further numbers of a model at test images, with eps.
Measure = Callable[[nn.Module, data.Split, float], dict[str, float]]
# ``first`` and ``second`` are the numbers that the method logs beside the loss, if any.
_SUMS = ("loss", "first", "second", "start_correct", "adv_correct", "samples", "steps")


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; its checkpoint is whole and can be resumed."""


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dataset: data.Dataset | None = None,
    console: Console | None = None,
    timeout: float = 120.0,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Train, leave checkpoint, CSV, TensorBoard, picture and ``result.json`` in ``folder``, and return the result.

    With a default process group (:mod:`torch.distributed`), all its processes call it alike and train one model with
    DistributedDataParallel. ``config.batch_size`` is the whole batch, which they share equally. The first process alone
    reads and writes ``folder``, evaluates and reports; each gets the result.

    Args:
        config: the run.
        folder: where its files go; made if missing.
        resume: continue from the checkpoint in ``folder``.
        overwrite: begin anew even if ``folder`` holds a run.
        dataset: instead of reading it from ``config.root``, to read it once for several runs.
        console: where lines and the progress bar go; ``None``: standard error.
        timeout: seconds to wait for another process, beside those that the first one evaluates. In a step the default
            process group's own holds.
        measure: called after each epoch with the model, the watched test images and eps; the numbers it returns join
            the epoch's row of the history. It must leave the model and torch's generators as they are.

    Raises:
        FileExistsError: if ``folder`` holds a run, and neither ``resume`` nor ``overwrite`` is set.
        FileNotFoundError: if there is nothing to resume, or no data.
        TypeError, ValueError: for a setting out of range, or a checkpoint of another run.
        RuntimeError: if the loss stops being finite, or another process is gone. :class:`InterruptedRunError` after
            Ctrl-C or SIGTERM: a process alone ends after the step it came in, several all after the next one.
    """
    config = config.resolved()
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of them, got both")
    with closing(Ranks(timeout)) as ranks:
        return _train(config, folder, ranks, resume, overwrite, dataset, console or Console(stderr=True), measure)


def _train(
    config: TrainConfig,
    folder: Path,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    dataset: data.Dataset | None,
    console: Console,
    measure: Measure | None,
) -> dict[str, Any]:
    if ranks.count > 1 and config.sync_batchnorm and torch.device(config.device).type == "cpu":
        raise ValueError("sync_batchnorm: expected False on the CPU, where torch has no SyncBatchNorm, got True")
    saved = ranks.on_first(lambda: _saved(config, folder / CHECKPOINT, resume, overwrite, ranks.count))
    if dataset is None:
        dataset = data.load(
            config.data, config.root, limit=config.limit, test_limit=config.test_limit, image_size=config.image_size
        )
    run = _Run(config, dataset, folder, ranks, measure)
    if saved is not None:
        run.restore(saved)
    else:
        if ranks.first:
            _clear(folder)
        run.save()  # so that a run killed in its first steps can be resumed too
    run.loop(console)
    return run.finish()


def _saved(config: TrainConfig, path: Path, resume: bool, overwrite: bool, ranks: int) -> dict[str, Any] | None:
    """The state to begin with, if the run is to be resumed."""
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"out: {str(path.parent)!r} holds a run; resume it, overwrite it, or choose another folder"
        )
    if not resume:
        return None
    saved = checkpoint.load(path)
    checkpoint.check_same_run(TrainConfig(**saved["config"]).identity(), config.identity(), path)
    if (processes := 1 + len(saved["other_ranks"])) != ranks:
        raise ValueError(f"checkpoint: expected one of {ranks} processes, got {str(path)!r} of {processes}")
    return saved


def is_collapse(train_adv: float, test_pgd: float, classes: int) -> bool:
    """Catastrophic overfitting: the training attack is withstood clearly better than by chance, PGD hardly at all."""
    return train_adv > 1.5 / classes and test_pgd < 0.25 * train_adv


class _Run:
    """The state of one run, and its loop."""

    def __init__(
        self, config: TrainConfig, dataset: data.Dataset, folder: Path, ranks: Ranks, measure: Measure | None
    ) -> None:
        assert config.epochs is not None
        assert config.batch_size is not None
        assert config.learning_rate is not None
        self.config, self.folder, self.ranks, self.measure = config, folder, ranks, measure
        self.batch_size, self.peak = config.batch_size, config.learning_rate
        device = torch.device(config.device)
        self.train_split, self.test_split = dataset.train.to(device), dataset.test.to(device)
        self.watched = self.test_split.subset(min(config.watch, len(self.test_split)))
        self.augment = dataset.augment if config.augment is None else config.augment
        self.steps_per_epoch = data.batches_per_epoch(self.train_split, self.batch_size)
        self._batches(0, 0)  # so that a batch that cannot be shared is refused before anything is written
        self.steps = config.epochs * self.steps_per_epoch
        self.shape: dict[str, Any] = {
            "in_shape": list(dataset.train.images.shape[1:]),
            "classes": len(dataset.classes),
            "mean": list(dataset.mean) if config.normalize else None,
            "std": list(dataset.std) if config.normalize else None,
        }
        self.data_digest = dataset.digest()
        torch.manual_seed(config.seed)
        # channels_last: 1.4 times the speed of contiguous here (narrow PreActResNet, oneDNN, two cores).
        model = models.build(config.model, width=config.width, **self.shape)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Evaluated, saved and resumed is the model itself; trained is the one that averages gradients over processes.
        self.trained: nn.Module = self.model
        if ranks.count > 1:
            if config.sync_batchnorm:
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.trained = nn.parallel.DistributedDataParallel(
                self.model, device_ids=None if device.type == "cpu" else [device]
            )
            # Each process draws noise of its own for its share of the batch.
            torch.manual_seed(derived_seed(config.seed, ranks.count, ranks.rank))
        self.method = methods.find(config.method)
        self.criterion = methods.build(
            config.method,
            eps=config.eps,
            lam=config.lam,
            bounds=BOUNDS if config.clamp else None,
            steps=self.steps,
            **config.levers(),
        )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.peak, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.device = device
        self.step = 0
        self.counted: dict[str, int] = {}  # the step counts of the runs before a resume
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self.seconds = 0.0  # of training in this epoch, up to when the clock was last read
        self.began = 0.0  # the clock at the beginning of the epoch, had it not been interrupted
        self.history: History = {"steps": [], "epochs": []}

    def save(self) -> None:
        """Write the checkpoint; to be called by every process."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        # What Free AT keeps is of this process' samples; what other criteria keep is the same in each.
        criterion = {name: value.cpu() for name, value in self.criterion.state_dict().items()}
        own = {"rng": {"cpu": torch.get_rng_state(), "cuda": cuda}, "sums": self.sums.cpu(), "criterion": criterion}
        owns = self.ranks.gather(own)
        if not self.ranks.first:
            return
        state = {
            "config": asdict(self.config),
            "shape": self.shape,
            "data": self.data_digest,
            "step": self.step,
            "step_counts": self._step_counts(),
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            **own,
            "other_ranks": owns[1:],
        }
        checkpoint.save(self.folder / CHECKPOINT, state)

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        if saved["data"] != self.data_digest:
            raise ValueError(
                "checkpoint: expected one of a run on the same images and labels, "
                f"got {str(self.folder / CHECKPOINT)!r} of a run on others"
            )
        checkpoint.load_weights(self.model, saved, self.folder / CHECKPOINT)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.history = saved["step"], saved["history"]
        self.counted, self.seconds = saved["step_counts"], saved["seconds"]
        own = [saved, *saved["other_ranks"]][self.ranks.rank]
        # Files from before there was one of each process have the first one's.
        self.criterion.load_state_dict(own.get("criterion", saved["criterion"]))
        self.sums.copy_(own["sums"])
        torch.set_rng_state(own["rng"]["cpu"])
        if self.device.type == "cuda" and own["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(own["rng"]["cuda"], self.device)

    def loop(self, console: Console) -> None:
        """Train to the end of the last epoch."""
        title = f"{self.config.method} seed {self.config.seed}"
        folder = self.folder if self.ranks.first else None
        log = RunLog(folder, title, self.steps, self.history, console)
        with log, _stop_requests() as stop_asked:
            log.advance(self.step)
            while self.step < self.steps:
                self._epoch(log, stop_asked)
            log.write()  # a run that was killed after its last checkpoint may lack the last rows
        if self.ranks.any(stop_asked()):  # since the loop last looked
            raise self._stopped()

    def finish(self) -> dict[str, Any]:
        """Evaluate, draw, and write the result; to be called by every process."""
        config = self.config
        chosen = self.test_split
        if config.eval_samples is not None:
            chosen = chosen.subset(min(config.eval_samples, len(chosen)))
        last = self.history["epochs"][-1]
        result = {
            "config": asdict(config),
            "accuracy": self.ranks.on_first(
                lambda: evaluate(self.model, chosen, parse_attacks(config.eval_attacks), eps=config.eps), patient=True
            ),
            "e_lin": last["test_e_lin"],
            "train_adv": last["train_adv"],
            "collapsed": last["collapsed"],
            "collapsed_in_epoch": next((row["epoch"] for row in self.history["epochs"] if row["collapsed"]), None),
            "training_seconds": sum(row["seconds"] for row in self.history["epochs"]),
            **self._step_counts(),
            "processes": self.ranks.count,
            **provenance(),
        }
        if self.ranks.first:
            plot_curves({config.method: self.history}, self.folder / PICTURE, title=_title(config))
            write_json(self.folder / RESULT, result)
        return result

    def _epoch(self, log: RunLog, stop_asked: Callable[[], bool]) -> None:
        epoch = self.step // self.steps_per_epoch
        self.model.train()
        self.began = time.perf_counter() - self.seconds
        for x, y in self._upcoming(self.steps_per_epoch - self.step % self.steps_per_epoch):
            rate = learning_rate(self.config.schedule, self.peak, self.step, self.steps)
            numbers = self._step(x, y, rate)
            self.step += 1
            log.advance(self.step)
            if self.step % self.config.log_every == 0:
                self._log_step(log, numbers, epoch, rate)
            ended = self.step % self.steps_per_epoch == 0
            if ended:
                self._end_epoch(log, epoch)
            elif self.step % self.config.checkpoint_every == 0:
                self._save_if_finite(log)
            # All processes have to stop after the same step.
            if self.ranks.any_earlier(stop_asked()):
                if not ended:
                    self._save_if_finite(log)
                raise self._stopped()

    def _stopped(self) -> InterruptedRunError:
        return InterruptedRunError(f"stopped after step {self.step} of {self.steps}; resume with the same options")

    def _read_clock(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are under way belong to the time
        self.seconds = time.perf_counter() - self.began

    def _upcoming(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batch of each of the next steps: every one as many times in a row as the method replays it."""
        replays = self.method.replays
        while steps > 0:
            epoch, start = divmod(self.step // replays, self.steps_per_epoch)
            for x, y in self._batches(epoch, start):
                for _ in range(min(steps, replays - self.step % replays)):
                    steps -= 1
                    yield x, y
                if steps == 0:
                    return

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return data.batches(
            self.train_split,
            self.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            augment=self.augment,
            rank=self.ranks.rank,
            ranks=self.ranks.count,
        )

    def _step(self, x: Tensor, y: Tensor, rate: float) -> Tensor:
        """One optimiser step; the numbers of :data:`_SUMS` for this process' share of the batch, on the device."""
        x = x.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outputs: list[Tensor] = []
        hook = self.model.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        try:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.criterion(self.trained, x, y)
        finally:
            hook.remove()
        loss.backward()
        self.optimizer.step()
        # The first forward pass, and the rows of x_adv, which come first in theirs.
        passes = (outputs[0], outputs[self.method.adv_pass])
        correct = [(logits[: len(y)].argmax(dim=1) == y).sum() for logits in passes]
        stats = self.criterion.stats
        zero = torch.zeros_like(stats["loss"])
        logged = [stats[name] for name in self.method.logged] or [zero, zero]
        values = [stats["loss"], *logged, *correct]
        numbers = torch.stack([*(value.double() for value in values), zero.double() + len(y), zero.double() + 1])
        self.sums += numbers
        return numbers

    def _log_step(self, log: RunLog, numbers: Tensor, epoch: int, rate: float) -> None:
        row = {"step": self.step, "epoch": epoch + 1, "learning_rate": rate, **self._averages(numbers)}
        row |= self._step_counts()
        clean = log.history["epochs"][-1]["test_clean"] if log.history["epochs"] else math.nan
        log.step(row, _describe(row) + f"  test clean {clean:.1%}")
        self._check_finite(row["loss"])

    def _end_epoch(self, log: RunLog, epoch: int) -> None:
        self._read_clock()
        config = self.config
        row: dict[str, Any] = {"step": self.step, "epoch": epoch + 1, **self._averages(self.sums)}
        self._check_finite(row["loss"])
        row |= self._step_counts()
        row |= self.ranks.on_first(self._watch, patient=True)
        self._check_finite(row["test_e_lin"])
        row["seconds"] = self.seconds
        earlier = self.history["epochs"]
        row["collapsed"] = is_collapse(row["train_adv"], row["test_pgd"], self.shape["classes"])
        was_collapsed = bool(earlier) and earlier[-1]["collapsed"]
        line = (
            f"epoch {epoch + 1}/{config.epochs}  {_describe(row)}  test clean {row['test_clean']:.1%}  "
            f"FGSM {row['test_fgsm']:.1%}  PGD-10 {row['test_pgd']:.1%}  E_lin {row['test_e_lin']:.1e}  "
            f"{self.seconds:.1f} s"
        )
        log.epoch(row, line)
        if row["collapsed"] and not was_collapsed:
            log.say(
                f"COLLAPSE in epoch {epoch + 1}: {row['train_adv']:.1%} of the training attack's points are classified "
                f"right, but only {row['test_pgd']:.1%} of the test images under PGD-10 (catastrophic overfitting)."
            )
        elif was_collapsed and not row["collapsed"]:
            log.say(f"recovered in epoch {epoch + 1}: {row['test_pgd']:.1%} of the test images under PGD-10")
        self.sums.zero_()
        self.seconds = 0.0
        self.save()
        log.write()

    def _watch(self) -> dict[str, float]:
        found = evaluate(self.model, self.watched, parse_attacks(_WATCHED), eps=self.config.eps)
        row: dict[str, float] = {f"test_{name.split('-')[0]}": numbers["accuracy"] for name, numbers in found.items()}
        row["test_e_lin"] = measure_e_lin(self.model, self.watched, eps=self.config.eps)
        return row if self.measure is None else {**row, **self.measure(self.model, self.watched, self.config.eps)}

    def _step_counts(self) -> dict[str, int]:
        """How many steps so far had all points in the graph, and how many that of x_adv alone; with ``skip_below``."""
        stats = self.criterion.stats
        names = [name for name in ("full_steps", "light_steps") if name in stats]
        return {**self.counted, **{name: self.counted.get(name, 0) + int(stats[name]) for name in names}}

    def _averages(self, sums: Tensor) -> dict[str, float]:
        """Means over the steps and samples of all processes."""
        total = dict(zip(_SUMS, self.ranks.sum(sums).tolist(), strict=True))
        averages = {"loss": total["loss"] / total["steps"]}
        for name, place in zip(self.method.logged, ("first", "second"), strict=False):
            averages[name] = total[place] / total["steps"]
        start = "train_clean" if self.method.clean_start else "train_noisy"
        averages[start] = total["start_correct"] / total["samples"]
        averages["train_adv"] = total["adv_correct"] / total["samples"]
        return averages

    def _save_if_finite(self, log: RunLog) -> None:
        # One number that is not finite makes the epoch's sum so, whichever step it came from.
        self._check_finite(float(self.ranks.sum(self.sums)[0]))
        self._read_clock()
        self.save()
        log.write()

    def _check_finite(self, loss: float) -> None:
        # The loss was that of the weights before the last update, so those after it are looked at too.
        if math.isfinite(loss) and all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            return
        raise RuntimeError(
            f"loss: expected finite numbers and weights, got {loss} at or before step {self.step}; the checkpoint in "
            f"{str(self.folder)!r} is of the last state before that. A smaller learning rate or lam may help"
        )


def _describe(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if "e_lin" in row:
        parts.append(f"e_lin {row['e_lin']:.1e}  lam {row['lam']:.4g}")
    if "penalty" in row:
        parts.append(f"ce {row['ce']:.3f}  penalty {row['penalty']:.2e}")
    for name, label in (("train_clean", "train clean"), ("train_noisy", "train noisy"), ("train_adv", "adv")):
        if name in row:
            parts.append(f"{label} {row[name]:.1%}")
    return "  ".join(parts)


def _title(config: TrainConfig) -> str:
    return f"{config.method} on {config.data}, eps {config.eps:.4g} ({config.eps * 255:.3g}/255), seed {config.seed}"


def _clear(folder: Path) -> None:
    """Remove what an earlier run left, so that its result is not taken for the new one's."""
    for name in (RESULT, PICTURE, "steps.csv", "epochs.csv"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop sees between two steps; a second acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may set signal handlers
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
