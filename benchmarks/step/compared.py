"""The rows of bench_step.py: one training step of each method, all on one model."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.device import graph_of, tf32
from benchmarks.step.authors import AuthorsList, AuthorsLoss
from elle_fast import AdaptiveLambda, ELLELoss, TrainingStep, attacks, capture, methods
from elle_fast.presets import FAST
from elle_fast.recipes import models

EPS = 8 / 255
LAM = 4000.0
# Lengths of the authors' list in a step: half of the 30 epochs of 391 steps that the paper's Short schedule has.
AUTHORS_HISTORY = 5865
SHAPE, CLASSES = (3, 32, 32), 10

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Criterion = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """Model, batch and number format, on one device; the shape of a picture and the number of classes."""

    model: str
    width: int | None
    batch: int
    dtype: str
    device: torch.device
    channels_last: bool
    shape: tuple[int, ...] = SHAPE
    classes: int = CLASSES


class Trainer:
    """A model, its optimiser and a batch, which the steps of all methods share.

    The learning rate is 0, which costs the same and keeps the weights equal for all methods.
    """

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        model = models.build(setting.model, in_shape=setting.shape, classes=setting.classes, width=setting.width)
        self.model = model.to(setting.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
        self.x = torch.rand(setting.batch, *setting.shape).to(setting.device, memory_format=layout)
        self.y = torch.randint(setting.classes, (setting.batch,)).to(setting.device)
        self.device, self._dtype, self.layout = setting.device, DTYPES[setting.dtype], layout
        self.marks: list[Any] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.marks.append(self._mark()))

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """``None`` in float32."""
        return None if self._dtype == torch.float32 else self._dtype

    def fused(self) -> torch.optim.Optimizer:
        """Another optimiser of the same weights, whose step a CUDA graph can hold."""
        options = {"lr": 0.0, "momentum": 0.9, "weight_decay": 5e-4, "fused": True}
        return torch.optim.SGD(self.model.parameters(), **options)  # type: ignore[arg-type]

    def autocast(self) -> torch.autocast:
        """Around a forward pass."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def step(self, criterion: Criterion, *, float32: bool = False) -> Callable[[], Tensor]:
        """A step of that criterion on the batch, which leaves ``marks``: before the loss, after it, after backward.

        ``float32``: without autocast.
        """
        autocast = None if float32 else self.autocast_dtype

        def marked(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            self.marks = [self._mark()]
            loss = criterion(model, x, y)
            self.marks.append(self._mark())
            return loss

        return partial(TrainingStep(marked, self.model, self.optimizer, autocast=autocast), self.x, self.y)

    def _mark(self) -> Any:
        """A point in time, on the device's clock if it has one; the host does not wait for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Step:
    """A step to be timed; ``check`` raises AssertionError if the steps so far were not what its name says."""

    call: Callable[[], Tensor]
    check: Callable[[], None]


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    about: str
    make: Callable[[Trainer], Step]
    # Only on CUDA devices, and without counts, which a replay does not have.
    on_cuda: bool = False


# ---- The authors' step


def authors(trainer: Trainer, *, float32: bool = False) -> Step:
    """The authors' step, with one optimiser step.

    ``float32``: without autocast, and without TF32, which torch allows in convolutions.
    """
    criterion = AuthorsLoss(EPS, AuthorsList(LAM, AUTHORS_HISTORY))
    step = trainer.step(criterion, float32=float32)

    def call() -> Tensor:
        with tf32(False) if float32 else nullcontext():
            loss = step()
            criterion.rule.update(criterion.e_lin)
        return loss

    return Step(call, nothing)


# ---- The others


def nothing() -> None:
    """No more to check."""


def ordinary(make: Callable[[], Criterion]) -> Callable[[Trainer], Step]:
    """The step of a criterion ``(model, x, target) -> loss``."""

    def step(trainer: Trainer) -> Step:
        criterion = make()
        return Step(trainer.step(criterion), nothing)

    return step


def halves(marks: list[Any]) -> tuple[float, float]:
    """Seconds of the loss and of its backward pass, from a trainer's ``marks``; a CUDA device must be idle."""
    loss, backward = (
        last - first if isinstance(first, float) else 1e-3 * first.elapsed_time(last) for first, last in pairwise(marks)
    )
    return loss, backward


def recipe(name: str) -> Method:
    """A method of the recipes, with its weight for CIFAR-10."""
    row = methods.find(name)

    def step(trainer: Trainer) -> Step:
        batch = len(trainer.x)
        counts = {"samples": batch, "epoch_steps": 391, "classes": CLASSES}
        layers = models.hidden_layers
        criterion = methods.build(name, eps=EPS, bounds=(0.0, 1.0), clamp=row.clamp, layers=layers, **counts)
        samples = {"samples": torch.arange(batch, device=trainer.device)} if criterion.per_sample else {}
        return Step(trainer.step(partial(criterion, **samples)), nothing)

    return Method(row.about, step)


def elle_a(light: bool = False, captured: bool = False, **options: Any) -> Callable[[Trainer], Step]:
    """ELLE-A whose lam stays at lam_max, or (``light``) at 0, whatever E_lin is; ``captured``: as CUDA graphs."""

    def step(trainer: Trainer) -> Step:
        # With gamma 1 lam only changes at a detection, and no E_lin exceeds this mean.
        criterion = ELLELoss(EPS, AdaptiveLambda(LAM, gamma=1.0), **options).to(trainer.device)
        state = {"lam": 0.0 if light else LAM, "count": 1e6, "mean": 1e6}
        saved = criterion.state_dict()
        forced = {f"controller.{name}": value for name, value in state.items()}
        criterion.load_state_dict(saved | {name: torch.full_like(saved[name], v) for name, v in forced.items()})

        def check() -> None:
            stats = {name: float(value) for name, value in criterion.stats.items()}
            assert stats["lam"] == state["lam"], f"lam: expected {state['lam']:g}, got {stats['lam']:g}"
            assert stats["skipped"] == 0, "E_lin was not finite"
            if "skip_below" in options:
                wanted, other = ("light_steps", "full_steps") if light else ("full_steps", "light_steps")
                assert stats[wanted] > 0 == stats[other], f"expected {wanted} only, got {stats}"

        if not captured:
            return Step(trainer.step(criterion), check)
        replayed = capture(
            criterion, trainer.model, trainer.fused(), trainer.x, trainer.y, autocast=trainer.autocast_dtype
        )
        return Step(lambda: replayed(trainer.x, trainer.y), check)

    return step


def passes(trainer: Trainer) -> Step:
    """The model passes of ELLE-A's packed step and the optimiser as a CUDA graph: a step without our ops."""
    points = trainer.x.repeat(4, 1, 1, 1).contiguous(memory_format=trainer.layout)

    def criterion(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attacks.input_gradient(model, x, y)
        return F.cross_entropy(model(points), y.repeat(4))

    step = TrainingStep(criterion, trainer.model, trainer.fused(), autocast=trainer.autocast_dtype)
    call = partial(step, trainer.x, trainer.y)
    if trainer.device.type != "cuda":  # to try it
        return Step(call, nothing)
    graph, losses = graph_of([call])
    loss: Tensor = losses[0]

    def replay() -> Tensor:
        graph.replay()
        return loss

    return Step(replay, nothing)


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of the clean batch."""
    return F.cross_entropy(model(x), y)


METHODS = {
    "plain": Method("training on clean inputs", ordinary(lambda: plain)),
    # But for ELLE-A, whose lam is held.
    **{name: recipe(name) for name in methods.NAMES if name != "elle-a"},
    "authors": Method(
        "the ELLE authors' CIFAR step of ELLE-A, restated, with one optimiser step",
        authors,
    ),
    "elle-a": Method("ELLE-A as Algorithm 1, one packed forward pass", elle_a()),
    "elle-a-split": Method("forward='split'", elle_a(forward="split")),
    "elle-a-checkpoint": Method("forward='checkpoint'", elle_a(forward="checkpoint")),
    "elle-a-lagged": Method("lagged=True", elle_a(lagged=True)),
    "elle-a-skip-light": Method("skip_below=1e-2, a step with lam = 0", elle_a(light=True, skip_below=1e-2)),
    "elle-a-skip-full": Method("skip_below=1e-2, a step with lam = lam_max", elle_a(skip_below=1e-2)),
    "elle-a-quarter": Method("triplet_fraction=0.25", elle_a(triplet_fraction=0.25)),
    "elle-a-eighth": Method("triplet_fraction=0.125", elle_a(triplet_fraction=0.125)),
    "elle-a-fast-light": Method(
        "skip_below=1e-2, triplet_fraction=0.125, a step with lam = 0", elle_a(light=True, **FAST)
    ),
    "elle-a-fast-full": Method("the same, a step with lam = lam_max", elle_a(**FAST)),
    "authors-fp32": Method("the authors' step without autocast and TF32", partial(authors, float32=True), on_cuda=True),
    "elle-a-captured": Method("Algorithm 1 as a CUDA graph", elle_a(captured=True), on_cuda=True),
    "elle-a-fast-light-captured": Method(
        "elle-a-fast-light as a CUDA graph", elle_a(light=True, captured=True, **FAST), on_cuda=True
    ),
    "elle-a-fast-full-captured": Method(
        "elle-a-fast-full as a CUDA graph", elle_a(captured=True, **FAST), on_cuda=True
    ),
    "passes-captured": Method("Algorithm 1's model passes and the optimiser, as a CUDA graph", passes, on_cuda=True),
}
