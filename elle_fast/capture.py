"""A whole training step as one object: on a GPU replayed as a CUDA graph, elsewhere run as it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elle_fast.loss import ELLELoss
from elle_fast.ops import checks

__all__ = ["CapturedStep", "capture"]

# Steps before a capture: lazy initialisation has to be over; DistributedDataParallel rebuilds its buckets in the first.
_WARM_UP, _WARM_UP_DDP = 3, 11

# Entries of a group that may change: what a schedule sets and keeps, and what is compared by itself.
_FREE = {"lr", "params", "initial_lr", "max_lr", "min_lr"}

# Optimisers whose state is zeros before the first step.
_FROM_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def capture(
    criterion: ELLELoss,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    target: Tensor,
    *,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad_norm: float | None = None,
) -> CapturedStep:
    """The entire training step: attack, packing, forward, loss, lam, backward and optimiser.

    On a CUDA device it is captured as a CUDA graph, two where ``skip_below`` makes light steps, and each call replays
    one: a launch for the whole step. Elsewhere a call runs the same step eagerly, so that a script runs everywhere.
    Capturing takes no training step: weights, buffers, optimiser, lam, scaler and random numbers are as before::

        step = elle_fast.capture(criterion, model, optimizer, x, y, autocast=torch.bfloat16)
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()

    A replay draws fresh noise. Learning-rate schedules take effect, as the rate of each group becomes a tensor on the
    device, and is put back when a schedule has replaced it. A batch of another shape, such as the last one of an
    epoch, runs eagerly. What else the step depends on is a constant of the graph; if it has changed (momentum, weight
    decay, train or eval mode, lam of the criterion, a state loaded into the optimiser) a call raises RuntimeError.

    Gradients do not outlive a call. With DistributedDataParallel torch asks for NCCL, a model wrapped inside a side
    stream, and ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``. Dropout under ``forward="checkpoint"`` cannot be captured: torch
    does not keep its random state then, and gradients are NaN.

    Args:
        criterion: the loss, in train mode.
        model: in train mode, as :class:`~elle_fast.ELLELoss` takes it.
        optimizer: on CUDA one whose groups have ``fused=True`` or ``capturable=True``.
        x, target: a batch of the usual shape, on the device where the steps run. Its values do not matter.
        autocast: dtype of ``torch.autocast`` around the loss; ``None`` is none.
        scaler: scales the loss and steps the optimiser; on CUDA it needs ``fused=True``.
        clip_grad_norm: the largest 2-norm of all gradients, ``> 0``; ``None`` clips nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the step cannot be captured; the message has what stopped it.
    """
    return CapturedStep(
        criterion, model, optimizer, x, target, autocast=autocast, scaler=scaler, clip_grad_norm=clip_grad_norm
    )


class CapturedStep:
    """What :func:`capture` returns. ``captured`` tells whether CUDA graphs are replayed."""

    def __init__(
        self,
        criterion: ELLELoss,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        target: Tensor,
        *,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
    ) -> None:
        for name, value, kind in (
            ("criterion", criterion, ELLELoss),
            ("model", model, nn.Module),
            ("optimizer", optimizer, torch.optim.Optimizer),
            ("x", x, Tensor),
            ("target", target, Tensor),
            ("autocast", autocast, (torch.dtype, type(None))),
            ("scaler", scaler, (torch.amp.GradScaler, type(None))),
        ):
            if not isinstance(value, kind):
                names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise TypeError(f"{name}: expected {names}, got {checks.describe(value)}")
        for name, module in (("criterion", criterion), ("model", model)):
            if not module.training:
                raise ValueError(f"{name}: expected one in train mode, got one in eval mode; call {name}.train() first")
        if clip_grad_norm is not None:
            checks.real("clip_grad_norm", clip_grad_norm, low=0, low_allowed=False)
        self.criterion, self.model, self.optimizer = criterion, model, optimizer
        self.autocast, self.scaler, self.clip_grad_norm = autocast, scaler, clip_grad_norm
        self.device = x.device
        criterion._check(x, target)
        self._graphs: dict[bool, _Recorded] = {}
        if _can_be_captured(x.device):
            self._capture(x, target)

    @property
    def captured(self) -> bool:
        """Whether calls replay CUDA graphs."""
        return bool(self._graphs)

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Take one training step.

        Args:
            x, target: the batch, on the step's device or on the host, from where it is copied without waiting if its
                memory is pinned. Of the shape that was captured, or of another, which runs eagerly.

        Returns:
            The loss of this step, 0-dim, detached.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: if something that is a constant of the graph has changed.
        """
        light = self.criterion._is_light()
        recorded = self._graphs.get(light)
        if recorded is not None:
            self._check_constants()
        if recorded is not None and recorded.fits(x, target):
            loss = recorded.replay(x, target)
            self.criterion._stats = recorded.stats()
        else:
            x, target = (value.to(self.device, non_blocking=True) for value in (x, target))
            self.criterion._check(x, target)
            loss = self._eager(x, target, light)
        self.criterion._stepped(light)
        return loss

    def _eager(self, x: Tensor, target: Tensor, light: bool) -> Tensor:
        """The step itself, without a decision of the host: what is captured."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.criterion._step(self.model, x, target, None, light)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters(), self.clip_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _capture(self, x: Tensor, target: Tensor) -> None:
        _check_optimizer(self.optimizer, self.scaler)
        self.criterion.to(x.device)
        if any(hasattr(parameter, "__tensor_flatten__") for parameter in self.model.parameters()):
            raise ValueError(
                "model: expected plain parameters for a CUDA graph, got ones that wrap others, as of fully_shard; "
                "run such a model's steps as they are, without capture"
            )
        static = x.detach().clone(), target.detach().clone()
        light = partial(self._eager, *static, True)
        full = partial(self._eager, *static, False)
        steps = {False: full} if self.criterion.skip_below is None else {True: light, False: full}
        groups, stats = self.optimizer.param_groups, self.criterion._stats
        before = [group["lr"] for group in groups]
        self._rates = [_as_tensor(group, self.device) for group in groups]
        with _as_before(self._tensors, self.optimizer, self.scaler, self.device, self.criterion.generator):
            rounds = _WARM_UP_DDP if isinstance(self.model, DistributedDataParallel) else _WARM_UP
            try:
                _warm_up(self.device, [*steps.values()] * rounds)
                for kind, run in steps.items():
                    others = [each.graph for each in self._graphs.values()]
                    graph = _Graph(self.device, self.criterion.generator, others)
                    loss = graph.capture(run)
                    self._graphs[kind] = _Recorded(graph, *static, loss, self.criterion._stats)
            except Exception as error:
                self._graphs.clear()
                for group, rate in zip(groups, before, strict=True):
                    group["lr"] = rate
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise RuntimeError(
                    "capture: expected a step that a CUDA graph can hold: no wait for the device (.item(), .cpu(), "
                    "if on a tensor), no shape that depends on values, no work on the host; got one that was stopped "
                    f"by {type(error).__name__}: {reason}"
                ) from error
            finally:
                self.criterion._stats = stats
        self._constants = self._facts()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _tensors(self) -> Iterable[Tensor]:
        """Whatever a step changes, but for the optimiser's state."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.criterion.buffers()
        yield from self._parameters()

    def _facts(self) -> dict[str, Any]:
        """What the graphs hold as constants."""
        criterion, controller = self.criterion, self.criterion.controller
        facts: dict[str, Any] = {
            "model.training": self.model.training,
            "criterion.training": criterion.training,
            "criterion.lam": criterion.lam,
            "the optimizer's state": id(self.optimizer.state),
            "the optimizer's parameters": [id(parameter) for parameter in self._parameters()],
        }
        if controller is not None:
            facts |= {"criterion.controller": (*controller.rule, controller.window, id(controller.lam))}
        for i, group in enumerate(self.optimizer.param_groups):
            for name, value in group.items():
                if name not in _FREE:
                    # A tensor is read anew in each replay, as long as it is the same one.
                    kept = id(value) if isinstance(value, Tensor) else value
                    facts[f"{name} of the optimizer's group {i}"] = kept
        return facts

    def _check_constants(self) -> None:
        """Learning rates back into their tensors; RuntimeError if something else has changed since the capture."""
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=False):
            if group["lr"] is not rate:
                # A schedule has put another object in its place.
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate
        facts = self._facts()
        if facts != self._constants:
            changed = [name for name in {**facts, **self._constants} if facts.get(name) != self._constants.get(name)]
            raise RuntimeError(
                "capture: expected what a CUDA graph holds as a constant to be as it was captured, got another "
                f"{', '.join(changed)}; capture the step again after such a change"
            )


class _Recorded:
    """A captured step with its static inputs and outputs."""

    def __init__(self, graph: _Graph, x: Tensor, target: Tensor, loss: Tensor, stats: dict[str, Tensor]) -> None:
        self.graph, self._x, self._target, self._loss, self._stats = graph, x, target, loss, stats

    def fits(self, x: Tensor, target: Tensor) -> bool:
        """Whether a batch is like the one that was captured."""
        pairs = ((x, self._x), (target, self._target))
        return all(given.shape == static.shape and given.dtype == static.dtype for given, static in pairs)

    def replay(self, x: Tensor, target: Tensor) -> Tensor:
        """The loss, which the next replay leaves alone."""
        self._x.copy_(x, non_blocking=True)
        self._target.copy_(target, non_blocking=True)
        self.graph.replay()
        return self._loss.clone()

    def stats(self) -> dict[str, Tensor]:
        """Copies, as the next replay writes over the numbers."""
        return {name: value.clone() for name, value in self._stats.items()}


class _Graph:
    """One CUDA graph."""

    def __init__(self, device: torch.device, generator: torch.Generator | None, others: list[_Graph]) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        if generator is not None:
            self._graph.register_generator_state(generator)
        # They never run at the same time, so they share their memory.
        self._pool = others[0]._graph.pool() if others else None

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` launches becomes the graph; nothing runs."""
        # Other threads, as a loader's that pins memory, may go on calling CUDA.
        recording = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # a kernel or a graph that the collector unloads would break the capture
        try:
            with torch.cuda.device(self._device), recording:
                return run()
        finally:
            if collecting:
                gc.enable()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def _can_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def _warm_up(device: torch.device, runs: Sequence[Callable[[], Tensor]]) -> None:
    """Run the steps in a stream of their own, as torch.cuda.graph will."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)


def _check_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """An optimiser whose step waits for nothing."""
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not (group.get("fused") or group.get("capturable")):
            raise ValueError(
                "optimizer: expected fused=True or capturable=True in each group, without which its step cannot be in "
                f"a CUDA graph, got {name} with neither; make it with fused=True"
            )
        if group.get("dampening") and group.get("momentum") and not optimizer.state:
            raise ValueError(
                "optimizer: expected dampening=0, as the first step of SGD is another one with it, or an optimizer "
                "that has taken a step already, got neither"
            )
    if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"scaler: expected an optimizer with fused=True, as for others GradScaler waits for the device, got {name}"
        )
    if not optimizer.state and not isinstance(optimizer, _FROM_ZEROS):
        raise ValueError(
            f"optimizer: expected one that has taken a step already, as the first state of {name} is not known to be "
            "zeros, got one without state"
        )


def _as_tensor(group: dict[str, Any], device: torch.device) -> Tensor:
    """Make the group's learning rate a tensor on the device, which the graphs read."""
    rate = group["lr"]
    group["lr"] = torch.as_tensor(rate, dtype=torch.float32).detach().clone().to(device)
    return cast(Tensor, group["lr"])


@contextmanager
def _as_before(
    tensors: Callable[[], Iterable[Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    device: torch.device,
    generator: torch.Generator | None,
) -> Iterator[None]:
    """Afterwards the tensors, the optimiser's state, the scaler and the random numbers hold what they held before."""
    kept = [(tensor, tensor.detach().clone()) for tensor in {id(each): each for each in tensors()}.values()]
    states = {id(value): value.clone() for value in _state_tensors(optimizer)}
    scale = None if scaler is None or not scaler.is_enabled() else scaler.state_dict()
    numbers = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    own = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
            for value in _state_tensors(optimizer):
                # One that was not there is as the optimiser makes it: zeros.
                value.copy_(states[id(value)]) if id(value) in states else value.zero_()
        optimizer.zero_grad(set_to_none=True)
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)
        torch.set_rng_state(numbers)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        if generator is not None and own is not None:
            generator.set_state(own)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
