"""A whole training step as one object: on a GPU replayed as a CUDA graph, elsewhere run as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.options import Options
from elle_fast._core.unwrapping import unwrapped
from elle_fast.criterion import TrainingLoss
from elle_fast.step.capturable import check_captured, rate_on_device
from elle_fast.step.graph import Graph, random_state, restored, warm_up
from elle_fast.step.parts import Parts, Results
from elle_fast.step.step import TrainingStep

__all__ = ["CapturedStep", "capture"]

# Steps before a capture: lazy initialisation has to be over; DistributedDataParallel rebuilds its buckets in the first.
_WARM_UP, _WARM_UP_DDP = 3, 11

# Every so many replays all constants are checked, before the others only the cheap ones.
_PERIOD = 100

# Entries of a group that may change: what a schedule sets and keeps, and what is compared by itself.
_FREE = {"lr", "params", "initial_lr", "max_lr", "min_lr", "swa_lr"}


def capture(
    criterion: TrainingLoss,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad_norm: float | None = None,
    measure: Callable[[TrainingLoss, Any], Tensor] | None = None,
) -> CapturedStep:
    """The entire training step as a CUDA graph: attack, packing, forward, loss, lam, backward and optimiser.

    On a CUDA device the step is captured, twice where ``skip_below`` makes light steps, and each call replays a graph:
    one launch, and some for copies of the batch, ``stats``, ``output`` and ``measured``. Elsewhere a call runs the same
    step eagerly. Capturing takes no training step: weights, buffers, optimiser, lam, scaler and random numbers are as
    before::

        step = elle_fast.capture(criterion, model, optimizer, x, y, autocast=torch.bfloat16)
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()

    A replay draws fresh noise. Learning-rate schedules take effect: each group's rate becomes a tensor on the device,
    and is put back when a schedule has replaced it. A batch of another shape, such as an epoch's last, runs eagerly.

    All else is a constant of the graph, and a call raises RuntimeError if it has changed: the criterion's options,
    whether it is frozen, a module's mode, a parameter's ``requires_grad``, an entry of the optimiser's groups
    (momentum: schedules need ``cycle_momentum=False``), or where a tensor of the model, the optimiser or lam lies. Each
    call looks at what is cheap to look at: options, groups, the model's own mode. The first and every hundredth also
    look at each module and tensor, as :meth:`CapturedStep.check` does. What is written inside a module, such as a
    dropout's p, is not seen.

    Gradients do not outlive a call. With DistributedDataParallel torch asks for NCCL, a model wrapped inside a side
    stream, and ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``. A model that draws random numbers, as dropout does, cannot be
    captured where a later forward pass would have to draw the same again (``forward="checkpoint"``, ``alpha="argmax"``,
    ``points="elle-2p"`` in two passes), as torch does not keep their state then. With ``skip_below`` each call waits
    for the lam of the call before, which is there when that call's replay has ended.

    Args:
        criterion: ELLELoss or that of a method, in train mode, whose ``uncapturable`` is ``None``: no method that
            counts its steps on the host, and no AWP. One whose first step makes its state (``uap``) has taken one.
        model: in train mode, as :class:`~elle_fast.ELLELoss` takes it.
        optimizer: on CUDA one whose groups have ``capturable=True``, as Adam's and AdamW's can, or of the others
            ``fused=True``. A scaler needs ``fused=True``.
        x, target: a batch of the usual shape, on the model's device, where the steps run. Its values do not matter.
        autocast, scaler, clip_grad_norm, measure: as in :class:`~elle_fast.TrainingStep`. What ``measure`` computes is
            part of the graph, so it must wait for nothing either.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the step cannot be captured; the message says what stopped it.
    """
    if not isinstance(criterion, TrainingLoss):
        expected = "ELLELoss or the criterion of a method"
        raise TypeError(f"criterion: expected {expected}, got {checks.describe(criterion)}")
    if (why := criterion.uncapturable) is not None:
        raise ValueError(
            f"criterion: expected one whose steps a CUDA graph can repeat, got one where {why}; run its steps as they "
            "are, with TrainingStep"
        )
    options: dict[str, Any] = {"autocast": autocast, "scaler": scaler, "clip_grad_norm": clip_grad_norm}
    if measure is not None:
        checks.function("measure", measure)
        options["measure"] = lambda _, target: measure(criterion, target)  # and not its loss of one kind
    parts = Parts(criterion)
    steps = {kind: TrainingStep(loss, model, optimizer, **options) for kind, loss in parts.losses.items()}
    for name, module in (("criterion", criterion), ("model", model)):
        if not module.training:
            raise ValueError(f"{name}: expected one in train mode, got one in eval mode; call {name}.train() first")
    criterion.check(x, target)
    home = next((parameter.device for parameter in model.parameters()), x.device)
    if home != x.device:
        raise ValueError(f"x: expected a batch on the model's device, {home}, got {checks.describe(x)}")
    return CapturedStep(criterion, parts, steps, x, target)


class _AnewError(ValueError):
    """The criterion has made its state anew in the warm-up: zeros would be left of it."""


class CapturedStep(Options):
    """What :func:`capture` returns: the criterion's kinds of steps, and a graph of each.

    Attributes:
        measured: what ``measure`` gave in the last step; ``None`` before it, and without that option.
    """

    _fixed = ("device", "model", "optimizer", "scaler")

    def __init__(
        self, criterion: TrainingLoss, parts: Parts, steps: dict[str, TrainingStep], x: Tensor, target: Tensor
    ) -> None:
        self.criterion, self.device = criterion, x.device
        self._parts, self._steps, self._step = parts, steps, steps["full"]
        self.model, self.optimizer, self.scaler = self._step.model, self._step.optimizer, self._step.scaler
        self._graphs: dict[str, tuple[Graph, Results]] = {}
        self.measured: Tensor | None = None
        self._replays = 0
        if _can_be_captured(self.device):
            check_captured(self.model, self.optimizer, self.scaler)
            # What is made inside a capture becomes zeros, and UAP's first step draws its state.
            if empty := [name for name, buffer in criterion.named_buffers() if buffer.numel() == 0]:
                got = ", ".join(empty)
                raise ValueError(f"criterion: expected one that has taken a step on such a batch, got no {got}")
            self._capture(x, target)

    @property
    def captured(self) -> bool:
        """Whether calls replay CUDA graphs."""
        return bool(self._graphs)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Take one training step on a batch, and return its loss, 0-dim, detached.

        The batch is on the step's device, or on the host, from where it is copied without waiting if it is pinned.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: if something that is a constant of the graph has changed.
        """
        self.criterion.check(x, target)
        kind = self._parts.next_kind(self.model)
        if self.captured:
            self._check_now()
        if self.captured and all(
            given.shape == static.shape and given.dtype == static.dtype
            for given, static in zip((x, target), self._static, strict=True)
        ):
            loss = self._replay(kind, x, target)
            # Torch has no public way to say this; a schedule would warn that the optimiser had taken no step.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            x, target = (value.to(self.device, non_blocking=self.device.type != "cpu") for value in (x, target))
            loss, _, self.measured = self._eager(kind, x, target)
        self._parts.finished(kind, self.model)
        return loss

    def check(self) -> None:
        """Raise RuntimeError if anything that the graphs hold as a constant has changed; some us for each parameter."""
        if self.captured:
            self._compare(self._all_facts(), self._constants)

    def _capture(self, x: Tensor, target: Tensor) -> None:
        """Capture every kind of step on a batch like this one; the state of the training is left as it is."""
        criterion, groups = self.criterion, self.optimizer.param_groups
        criterion.to(self.device)
        self._static = x.detach().clone(), target.detach().clone()
        runs = {kind: partial(self._eager, kind, *self._static) for kind in self._steps}
        rates, records = [group["lr"] for group in groups], self._parts.records
        buffers = list(self._criterion_state())
        with self._as_before():
            self._check_random_numbers()
        for group in groups:
            group["lr"] = rate_on_device(group["lr"], self.device)
        rounds = _WARM_UP if unwrapped(self.model) is self.model else _WARM_UP_DDP
        with self._as_before():
            try:
                with warnings.catch_warnings():
                    # torch would have optimisers with it called in a capture alone.
                    warnings.filterwarnings("ignore", message="(?s).*capturable=True")
                    warm_loss, *_ = warm_up(self.device, [*runs.values()], rounds)
                now = {id(buffer) for *_, buffer in self._criterion_state()}
                if other := [name for _, name, buffer in buffers if id(buffer) not in now]:
                    expected = "criterion: expected one that has taken a step on such a batch"
                    raise _AnewError(f"{expected}, got one that began {', '.join(other)} anew")
                graph = None
                for kind, run in runs.items():
                    graph = Graph(self.device, self._parts.generators, graph)
                    self._graphs[kind] = graph, graph.capture(run)
                for kind in runs:
                    replayed = self._replay(kind, *self._static)
                    if warm_loss.isfinite() and not replayed.isfinite():
                        raise RuntimeError(f"a replay's loss was {replayed.item()}")
            except Exception as error:
                self._graphs.clear()
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate
                for module, name, buffer in buffers:
                    setattr(module, name, buffer)
                if isinstance(error, _AnewError):
                    raise
                reason = checks.first_line(error)
                raise RuntimeError(
                    "capture: expected a step without a wait for the device (.item(), .cpu(), if on a tensor), shapes "
                    "that depend on values, or work on the host; got one that was stopped by "
                    f"{type(error).__name__}: {reason}"
                ) from error
            finally:
                self._parts.records, self.measured = records, None
        self._rates: list[Tensor] = [group["lr"] for group in groups]
        self._modules = list(self.model.modules())
        # The objects themselves are kept, as the id of one that is gone may be another's.
        self._kept, self._state = list(self._tensors()), self.optimizer.state
        self._cheap_constants, self._constants = self._facts(), self._all_facts()

    def _eager(self, kind: str, x: Tensor, target: Tensor) -> Results:
        """The step itself, without a decision of the host: what is captured."""
        step = self._steps[kind]
        loss = step(x, target)
        step.clear()
        return Results(loss, self._parts.records, step.measured)

    def _replay(self, kind: str, x: Tensor, target: Tensor) -> Tensor:
        """The loss. All results are copies, as the next replay overwrites the graph's own tensors."""
        graph, results = self._graphs[kind]
        with torch.no_grad():
            for static, given in zip(self._static, (x, target), strict=True):
                static.copy_(given, non_blocking=True)
        graph.replay()
        loss, self._parts.records, self.measured = results.copied()
        return loss

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Afterwards put back all that a step changes, the scaler and the random numbers."""
        scaler = self.scaler if self.scaler is not None and self.scaler.is_enabled() else None
        scale = None if scaler is None else scaler.state_dict()
        try:
            # What is made inside is the optimiser's state, which begins with zeros.
            with restored(self.device, self._tensors, self._parts.generators):
                yield
        finally:
            self._step.clear()
            if scaler is not None and scale is not None:
                # update() forgets that a step which failed has unscaled its gradients; it needs a scale on the device.
                scaler.scale(torch.zeros((), device=self.device))
                scaler.update(scale["scale"])
                scaler.load_state_dict(scale)
            for name in ("grad_scale", "found_inf"):
                vars(self.optimizer).pop(name, None)

    def _check_random_numbers(self) -> None:
        """Refuse a model that draws random numbers: under capture its recomputation would draw others."""
        elle = self._parts.elle
        if elle is None or getattr(elle, "forward_mode", None) != "checkpoint":
            return
        x, before = self._static[0], random_state(self.device)
        with torch.no_grad(), self._step.autocast_for(x):
            elle.linearity.on_pixels(unwrapped(self.model))(x)
        if not torch.equal(before, random_state(self.device)):
            raise ValueError(
                "model: expected one that draws no random numbers, which a CUDA graph cannot repeat for "
                "forward='checkpoint', got one that does (dropout?); use forward='packed' or 'split'"
            )

    def _tensors(self) -> Iterator[Tensor]:
        """Whatever a step changes."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.criterion.buffers()
        for group in self.optimizer.param_groups:
            yield from group["params"]
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def _criterion_state(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """The criterion's own state: module, name, and what it is now."""
        for module in self.criterion.modules():
            yield from ((module, name, buffer) for name, buffer in module.named_buffers(recurse=False))

    def _facts(self) -> dict[str, Any]:
        """The constants that are cheap to look at, by name."""
        optimizer, weight = self.optimizer, self._kept[0]
        facts = {f"criterion.{name}": value for name, value in self.criterion.constants().items()}
        facts["train or eval mode of the model"] = self.model.training
        facts["state of the optimizer"] = optimizer.state is self._state  # load_state_dict makes another one
        facts["a tensor of the model"] = weight.data_ptr()  # model.to(device) moves them all
        for i, group in enumerate(optimizer.param_groups):
            facts[f"params of the optimizer's group {i}"] = len(group["params"])
            for name, value in group.items():
                if name not in _FREE:
                    # A tensor is read anew in each replay, as long as it is the same one.
                    kept = id(value) if isinstance(value, Tensor) else value
                    facts[f"{name} of the optimizer's group {i}"] = kept
        return facts

    def _all_facts(self) -> dict[str, Any]:
        """All constants: the cheap ones, and those of each module and tensor."""
        modes = [module.training for module in self._modules]
        tensors = [(id(each), each.data_ptr(), each.stride(), each.requires_grad) for each in self._tensors()]
        name = "tensor of the model, the optimizer or the criterion"
        return {**self._facts(), "train or eval mode of a module": modes, name: tensors}

    def _check_now(self) -> None:
        """Put learning rates back into their tensors; RuntimeError if something else has changed since the capture."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is not rate:
                # A schedule has put another object in its place.
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate
        if self._replays % _PERIOD == 0:
            self.check()
        else:
            self._compare(self._facts(), self._cheap_constants)
        self._replays += 1

    @staticmethod
    def _compare(facts: dict[str, Any], constants: dict[str, Any]) -> None:
        if facts != constants:
            changed = [name for name in {**facts, **constants} if facts.get(name) != constants.get(name)]
            raise RuntimeError(
                f"capture: {', '.join(changed)} changed after capture, but the graph holds the old value; "
                "call capture() again"
            )


def _can_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"
