"""Record E_lin and its companions in each step of a training, and when the training collapses.

    python -m benchmarks.detector.traces --root cifar10-jpeg.tar.xz --work traces

A cell is a method, an eps and a seed, trained as `elle-fast train` would. Beside each step, three points of every sample
go through the model once more without a graph, so that the step is what it would be without them. A cell that was
stopped goes on from its last epoch; one that is done, whose file is in --work, is not run again.

The numbers of a step are those of :data:`COLUMNS`, of the weights before it. Every few steps the model is attacked by
PGD-10, in eval mode, on 256 images held out of the training: always the same ones, so that two numbers compare.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.program import listed, number, parser
from benchmarks.paper.settings import SETTINGS
from elle_fast import attacks, data
from elle_fast._core.files import write_atomically
from elle_fast._core.seeds import derived_seed
from elle_fast.evaluation import BOUNDS, outcomes
from elle_fast.functional import draw_seed, local_linearity, pack_points
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.provenance import commit
from elle_fast.recipes.run import Run

GROUP, GROUPS = 16, 8  # of the batch's first samples
COLUMNS = (
    *(f"group_{i}" for i in range(GROUPS)),  # mean r^2 of 16 samples each, of one pass over all
    "own_pass",  # mean r^2 of the first 16 samples, in a pass of their own, as `fast` estimates E_lin
    "r1",  # mean r
    "r4",  # mean r^4
    "rise",  # mean (L(x_b) - L(x_a))^2
    "start",  # mean loss where the attack takes its gradient
    "adv",  # mean loss at x_adv
    "falls",  # share of samples whose loss at x_adv is below that at the start
    "predicted",  # mean rise of the loss along the attack's step, by its gradient
    "ce_norm",  # 2-norm of the gradient of the loss in the logits at x_adv
    "e_lin_norm",  # of E_lin in the logits of the triplets
    "lam",  # 0 without ELLE
)
PROBED, ALL_OF_IT = 256, 12  # images; probes in a row below a third of the best before a training has collapsed


@dataclass(frozen=True)
class Cell:
    """One training to record.

    Attributes:
        config: the run.
        every: steps between probes.
        after: steps that are recorded after a collapse is certain; ``None``: to the end.
    """

    config: TrainConfig
    every: int
    after: int | None = 200

    @property
    def name(self) -> str:
        """Of the cell and its files: data, method, eps in 255ths, epochs and seed."""
        config = self.config
        fast = "-fast" if config.skip_below is not None else ""
        kind = "cifar10" if config.data == "image-folder" else config.data
        return f"{kind}-{config.method}{fast}-eps{255 * config.eps:g}-epochs{config.epochs}-seed{config.seed}"


_CIFAR = replace(SETTINGS["cifar10-medium"].config, average=None, checkpoint_every=0)
_DIGITS, _MNIST = SETTINGS["digits"].config, SETTINGS["mnist-small"].config


def cells() -> list[Cell]:
    """All, the most valuable first."""

    def cifar(method: str, eps: int, epochs: int = 15, seed: int = 0, every: int = 25) -> Cell:
        fast = FAST if "elle-a" in method else {}
        config = replace(_CIFAR, method=method, eps=eps / 255, epochs=epochs, seed=seed, **fast)
        return Cell(config, every)

    found = [
        cifar("fgsm", 16),
        cifar("n-fgsm", 16, 30, every=100),
        cifar("fgsm", 16, seed=1),
        cifar("fgsm", 8),
        cifar("elle-a", 16, 30, every=100),
        cifar("rs-fgsm", 16),
        cifar("n-fgsm", 26, every=50),
        cifar("fgsm", 16, seed=2),
        cifar("fgsm", 26),
        cifar("n-fgsm", 8, every=100),
        cifar("zero-grad", 16),
        cifar("elle", 16, every=100),
        *(cifar(method, eps, seed=seed) for method in ("rs-fgsm", "fgsm") for eps in (8, 26) for seed in (0, 1, 2)),
        *(cifar(method, 16, seed=seed) for method in ("rs-fgsm", "zero-grad") for seed in (1, 2)),
        cifar("n-fgsm", 16, 30, seed=1, every=100),
        cifar("n-fgsm", 26, seed=1, every=50),
    ]
    for base in (replace(_DIGITS, checkpoint_every=0), replace(_MNIST, epochs=8, checkpoint_every=0)):
        for method in ("fgsm", "n-fgsm", "elle-a"):
            found += [Cell(replace(base, method=method, seed=seed), 25, None) for seed in (0, 1, 2)]
    return list({cell.name: cell for cell in found}.values())


class Recorder:
    """What one step of a training shows, beside what it computes."""

    def __init__(self, model: nn.Module, eps: float, seed: int) -> None:
        self.model, self.eps, self.seed = model, eps, seed
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._grad: Tensor | None = None
        self._handle = model.register_forward_hook(self._keep)
        self._watching = False

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not self._watching:
            return
        (points,) = inputs
        if not self._passes and points.requires_grad:
            points.register_hook(self._keep_grad)
        self._passes.append((points.detach(), output.detach()))

    def _keep_grad(self, grad: Tensor) -> None:
        self._grad = grad.detach()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the step itself: its first pass is the attack's, its second begins with x_adv."""
        self._passes, self._grad, self._watching = [], None, True
        try:
            yield
        finally:
            self._watching = False

    @torch.no_grad()
    def of_triplets(self, x: Tensor, y: Tensor, step: int) -> dict[str, float]:
        """The columns of E_lin; before the step, which moves the weights."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, step))
        batch, small = len(y), min(GROUP, len(y))
        points, alpha = pack_points(x, None, self.eps, seed=draw_seed(x.device, generator), bounds=BOUNDS)
        with _statistics_left_alone(self.model):
            logits = self.model(points)
            part = torch.cat([block[:small] for block in points.split(batch)])
            alone = _residuals(self.model(part), y[:small], alpha[:small])[0]
        r, rise = _residuals(logits, y, alpha)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            (grad,) = torch.autograd.grad(local_linearity(leaf, y, alpha), leaf)
        groups = [each.square().mean() for each in r.split(GROUP)[:GROUPS]]
        missing = [r.new_tensor(math.nan)] * (GROUPS - len(groups))
        found = [*groups, *missing, alone.square().mean(), r.mean(), r.pow(4).mean(), rise, grad.norm()]
        return dict(
            zip((*COLUMNS[:GROUPS], "own_pass", "r1", "r4", "rise", "e_lin_norm"), torch.stack(found).tolist(), strict=True)
        )

    @torch.no_grad()
    def of_attack(self, y: Tensor) -> dict[str, float]:
        """The columns of the attack, after the step."""
        (start, at_start), (trained, at_trained), *_ = self._passes
        x_adv, logits, batch = trained[: len(y)], at_trained[: len(y)], len(y)
        losses = [attacks.sample_losses(each, y, None, batch) for each in (at_start, logits)]
        grad = torch.zeros_like(start) if self._grad is None else self._grad
        along = (grad * (x_adv - start)).sum()
        of_loss = (logits.softmax(1) - nn.functional.one_hot(y, logits.shape[1])) / batch
        found = [losses[0].mean(), losses[1].mean(), (losses[1] < losses[0]).float().mean(), along / batch, of_loss.norm()]
        names = ("start", "adv", "falls", "predicted", "ce_norm")
        return dict(zip(names, torch.stack(found).tolist(), strict=True))


def _residuals(logits: Tensor, y: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """r of each sample, and the mean of (L(x_b) - L(x_a))^2."""
    batch = len(y)
    at_a, at_b, at_c = (attacks.sample_losses(each, y, None, batch) for each in logits.split(batch))
    return at_c - (1 - alpha) * at_a - alpha * at_b, (at_b - at_a).square().mean()


@contextmanager
def _statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, as in training, but its running statistics stay."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum


class Trace:
    """The rows of a cell so far, and its probes: step, clean and PGD-10 accuracy."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.probes: list[tuple[float, float, float]] = []

    def collapsed(self) -> bool:
        """Whether the last probes have all lost two thirds of the best median of five."""
        robust = [probe[2] for probe in self.probes]
        if len(robust) < ALL_OF_IT + 5:
            return False
        best = max(float(np.median(robust[i : i + 5])) for i in range(len(robust) - 4))
        return all(each < best / 3 for each in robust[-ALL_OF_IT:])

    def save(self, path: Path, **more: Any) -> None:
        """Write it as an ``.npz``."""
        arrays = {"rows": np.array(self.rows, dtype=np.float32).reshape(-1, len(COLUMNS)), "probes": np.array(self.probes)}
        texts = {name: np.array(value) for name, value in more.items()}

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays, columns=np.array(COLUMNS), **texts)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path, step: int) -> Trace:
        """That of the first steps; later ones are run again."""
        trace = cls()
        with np.load(path, allow_pickle=False) as found:
            trace.rows = found["rows"][:step].tolist()
            trace.probes = [tuple(probe) for probe in found["probes"].tolist() if probe[0] <= step]
        return trace


def record(cell: Cell, folder: Path, dataset: data.Dataset) -> None:
    """Train a cell, or go on with it; its trace is then ``folder / name.npz``."""
    config = replace(cell.config, device="cpu").resolved()
    path, running = folder / f"{cell.name}.npz", folder / f"{cell.name}.running.npz"
    saved = folder / f"{cell.name}.pt"
    with closing(Ranks(120.0)) as ranks:
        run = Run(config, dataset, saved, ranks)
        trace = Trace()
        if saved.exists() and running.exists():
            run.restore(checkpoint.load(saved))
            trace = Trace.load(running, run.step)
        recorder = Recorder(run.model, config.eps, config.seed)
        assert run.validation is not None
        probed = run.validation[: min(PROBED, len(run.validation))]
        ended, certain_at = "stands", None
        while run.step < run.steps and ended != "collapsed":
            run.model.train()
            for x, y in run.upcoming(run.steps_per_epoch - run.step % run.steps_per_epoch):
                if run.step % cell.every == 0:
                    found = outcomes(run.model, data.in_order(probed), attacks="clean,pgd-10", eps=config.eps)
                    accuracy = [each.robust[-1].double().mean().item() for each in found.values()]
                    trace.probes.append((run.step, accuracy[0], accuracy[1]))
                    if certain_at is None and trace.collapsed():
                        certain_at = run.step
                row = recorder.of_triplets(x, y, run.step)
                with recorder.step():
                    run.take_step(x, y)
                run.step += 1
                row |= recorder.of_attack(y)
                row["lam"] = float(run.criterion.stats["lam"]) if "lam" in run.criterion.stats else 0.0
                trace.rows.append([row[name] for name in COLUMNS])
                if not math.isfinite(row["adv"]):
                    ended = "nan"
                    break
                if certain_at is not None and cell.after is not None and run.step >= certain_at + cell.after:
                    ended = "collapsed"
                    break
            if ended == "nan":
                break
            print(f"{cell.name}: step {run.step} of {run.steps}, PGD-10 {trace.probes[-1][2]:.1%}", flush=True)
            if run.step % run.steps_per_epoch == 0 and ended == "stands":
                # The meter's sums belong to an epoch that is over, and a checkpoint to one row an epoch.
                run.meter.clear()
                run.history["epochs"].append({"step": run.step, "epoch": run.step // run.steps_per_epoch})
                run.save()
                trace.save(running)
        if certain_at is not None:
            ended = "collapsed"
        trace.save(path, ended=ended, steps=run.steps, commit=str(commit()))
    running.unlink(missing_ok=True)
    saved.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what is missing; 0."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    datasets: dict[str, data.Dataset] = {}
    for cell in cells():
        if options.only and not any(part in cell.name for part in options.only):
            continue
        if (options.work / f"{cell.name}.npz").exists() or not _taken(options.work / f"{cell.name}.lock"):
            continue
        kind = cell.config.data
        if kind not in datasets:
            root = {"image-folder": options.root, "mnist": options.mnist}.get(kind)
            datasets[kind] = replace(cell.config, root=None if root is None else str(root)).read_data()
        record(cell, options.work, datasets[kind])
    return 0


_HELD: list[int] = []


def _taken(path: Path) -> bool:
    """Whether the cell is this process' from now on: another one may be at it."""
    import fcntl

    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return False
    _HELD.append(handle)
    return True


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.detector.traces", __doc__)
    options_of.add_argument("--root", type=Path, help="JPEG-compressed CIFAR-10")
    options_of.add_argument("--mnist", type=Path, help="mnist.npz")
    options_of.add_argument("--work", type=Path, required=True, help="folder of the traces")
    options_of.add_argument("--only", type=listed(str), help="cells with one of these in their name")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
