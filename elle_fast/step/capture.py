"""A whole training step as one object: on a GPU replayed as a CUDA graph, elsewhere run as it is."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elle_fast._core import checks
from elle_fast._core.models import unwrapped
from elle_fast.loss import ELLELoss

__all__ = ["CapturedStep", "capture"]

# Steps before a capture: lazy initialisation has to be over; DistributedDataParallel rebuilds its buckets in the first.
_WARM_UP, _WARM_UP_DDP = 3, 11

# Entries of a group that may change: what a schedule sets and keeps, and what is compared by itself.
_FREE = {"lr", "params", "initial_lr", "max_lr", "min_lr", "swa_lr"}

# What of the criterion is in the graph.
_OPTIONS = (
    *("training", "eps", "lam", "lagged", "skip_below", "attack", "step_size", "alpha", "forward_mode", "backend"),
    *("logits", "loss_fn", "generator", "process_group", "_packing", "_linearity"),
)

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
    one: a launch for the step, and some for copies of the batch and of ``stats``. Elsewhere a call runs the same step
    eagerly, so that a script runs everywhere. Capturing takes no training step: weights, buffers, optimiser, lam,
    scaler and random numbers are as before::

        step = elle_fast.capture(criterion, model, optimizer, x, y, autocast=torch.bfloat16)
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()

    A replay draws fresh noise. Learning-rate schedules take effect, as the rate of each group becomes a tensor on the
    device, and is put back when a schedule has replaced it. A batch of another shape, such as the last one of an
    epoch, runs eagerly. What else the step depends on is a constant of the graph. A call raises RuntimeError if the
    criterion's options have changed, a module's mode, a parameter's ``requires_grad``, an entry of the optimiser's
    groups (momentum: schedules need ``cycle_momentum=False``), or where a tensor of the model, the optimiser or lam
    lies. What is written inside a module, such as the p of a dropout, is not looked at.

    Gradients do not outlive a call. With DistributedDataParallel torch asks for NCCL, a model wrapped inside a side
    stream, and ``TORCH_NCCL_ASYNC_ERROR_HANDLING=0``. A model that draws random numbers, as dropout does, cannot be
    captured with ``forward="checkpoint"``, as torch does not keep their state then. With ``skip_below`` each call waits
    for the lam of the call before, which is there when that call's replay has ended.

    Args:
        criterion: the loss, in train mode.
        model: in train mode, as :class:`~elle_fast.ELLELoss` takes it.
        optimizer: on CUDA one whose groups have ``fused=True`` or ``capturable=True``.
        x, target: a batch of the usual shape, on the model's device, where the steps run. Its values do not matter.
        autocast: dtype of ``torch.autocast`` around the loss; ``None`` is none.
        scaler: scales the loss and steps the optimiser; on CUDA it needs ``fused=True``.
        clip_grad_norm: the largest 2-norm of all gradients, ``> 0``; ``None`` clips nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if the step cannot be captured; the message has what stopped it.
    """
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
    criterion._check(x, target)
    home = next((parameter.device for parameter in model.parameters()), x.device)
    if home != x.device:
        raise ValueError(f"x: expected a batch on the model's device, {home}, got {checks.describe(x)}")
    step = CapturedStep(criterion, model, optimizer, autocast, scaler, clip_grad_norm, x.device)
    if _can_be_captured(x.device):
        step._capture(x, target)
    return step


class CapturedStep:
    """What :func:`capture` returns. ``captured`` tells whether CUDA graphs are replayed."""

    def __init__(
        self,
        criterion: ELLELoss,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None,
        scaler: torch.amp.GradScaler | None,
        clip_grad_norm: float | None,
        device: torch.device,
    ) -> None:
        self.criterion, self.model, self.optimizer = criterion, model, optimizer
        self.autocast, self.scaler, self.clip_grad_norm = autocast, scaler, clip_grad_norm
        self.device = device
        self._graphs: dict[bool, _Recorded] = {}

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
        self.criterion._check(x, target)
        light = self.criterion._is_light()
        recorded = self._graphs.get(light)
        if recorded is not None:
            self._check_constants()
        if recorded is not None and recorded.fits(x, target):
            loss = recorded.replay(x, target)
            self.criterion._stats = recorded.stats()
            # A schedule would warn that no step had been taken.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            waiting = self.device.type == "cpu"
            x, target = (value.to(self.device, non_blocking=not waiting) for value in (x, target))
            loss = self._eager(x, target, light)
        self.criterion._stepped(light)
        return loss

    def _eager(self, x: Tensor, target: Tensor, light: bool) -> Tensor:
        """The step itself, without a decision of the host: what is captured."""
        self._clear()
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
        self._clear()
        return loss.detach()

    def _clear(self) -> None:
        """No gradients, and no weights that an autocast around the call has cast before the optimiser moved them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # of parameters that are not the optimiser's
        torch.clear_autocast_cache()

    def _capture(self, x: Tensor, target: Tensor) -> None:
        _check_optimizer(self.optimizer, self.scaler)
        self.criterion.to(x.device)
        if any(hasattr(parameter, "__tensor_flatten__") for parameter in self.model.parameters()):
            raise ValueError(
                "model: expected plain parameters for a CUDA graph, got ones that wrap others, as of fully_shard; "
                "run such a model's steps as they are, without capture"
            )
        self._modules = list(self.model.modules())
        static = x.detach().clone(), target.detach().clone()
        light = partial(self._eager, *static, True)
        full = partial(self._eager, *static, False)
        steps = {False: full} if self.criterion.skip_below is None else {True: light, False: full}
        groups, stats = self.optimizer.param_groups, self.criterion._stats
        before = [group["lr"] for group in groups]
        with self._as_before():
            self._check_random_numbers(*static)
        self._rates = [_as_tensor(group, self.device) for group in groups]
        with self._as_before():
            rounds = _WARM_UP_DDP if isinstance(self.model, DistributedDataParallel) else _WARM_UP
            try:
                losses = _warm_up(self.device, [*steps.values()] * rounds)
                for kind, run in steps.items():
                    others = [each.graph for each in self._graphs.values()]
                    graph = _Graph(self.device, self.criterion.generator, others)
                    loss = graph.capture(run)
                    self._graphs[kind] = _Recorded(graph, *static, loss, self.criterion._stats)
                for recorded in self._graphs.values():
                    replayed = recorded.replay(*static)
                    if losses[-1].isfinite() and not replayed.isfinite():
                        raise RuntimeError(f"a replay's loss was {replayed.item()}")
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
        # The tensors themselves are kept, as the id of one that is gone may be another's.
        self._kept = list(self._tensors())
        self._constants = self._facts()

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Afterwards all that a step changes, the scaler and the random numbers hold what they held before."""
        optimizer, scaler, generator = self.optimizer, self.scaler, self.criterion.generator
        kept = {id(tensor): (tensor, tensor.detach().clone()) for tensor in self._tensors()}
        scale = None if scaler is None or not scaler.is_enabled() else scaler.state_dict()
        on_host = torch.get_rng_state()
        on_device = _random_state(self.device)
        own = None if generator is None else generator.get_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in kept.values():
                    tensor.copy_(before)
                for value in _state_tensors(optimizer):
                    if id(value) not in kept:
                        value.zero_()  # as the optimiser makes it
            self._clear()
            if scaler is not None and scale is not None:
                scaler.load_state_dict(scale)
                scaler._per_optimizer_states.clear()  # a step that failed has left its unscaling there
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
            torch.set_rng_state(on_host)
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(on_device, self.device)
            if generator is not None and own is not None:
                generator.set_state(own)

    def _check_random_numbers(self, x: Tensor, target: Tensor) -> None:
        """Recomputation under capture would draw others than the forward pass did."""
        if self.criterion.forward_mode != "checkpoint":
            return
        before = _random_state(self.device)
        with torch.no_grad(), torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            self.criterion._on_pixels(unwrapped(self.model))(x)
        if not torch.equal(before, _random_state(self.device)):
            raise ValueError(
                "model: expected one that draws no random numbers, as its forward passes are repeated with "
                "forward='checkpoint' and a CUDA graph cannot repeat them, got one that does (dropout?); use "
                "forward='packed' or 'split'"
            )

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _tensors(self) -> Iterator[Tensor]:
        """Whatever a step changes."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.criterion.buffers()
        yield from self._parameters()
        yield from _state_tensors(self.optimizer)

    def _facts(self) -> dict[str, Any]:
        """What the graphs hold as constants."""
        criterion = self.criterion
        facts: dict[str, Any] = {f"criterion.{name}": getattr(criterion, name) for name in _OPTIONS}
        if criterion.controller is not None:
            facts["criterion.controller"] = (*criterion.controller.rule, criterion.controller.window)
        facts["train or eval mode of a module"] = [module.training for module in self._modules]
        facts["tensor of the model, the optimizer or the criterion"] = [
            (id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad) for tensor in self._tensors()
        ]
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
        with torch.no_grad():
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
        # They never run at the same time, so they share their memory, for which torch asks for one stream.
        self._pool = others[0]._graph.pool() if others else None
        self._stream: torch.cuda.Stream = others[0]._stream if others else torch.cuda.Stream(device)

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` launches becomes the graph; nothing runs."""
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()  # a kernel or a graph that the collector unloads would break the capture
        try:
            with torch.cuda.device(self._device), warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*CUDA Graph is empty")
                # thread_local: other threads, as a loader's that pins memory, may go on calling CUDA.
                with torch.cuda.graph(
                    self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    return run()
        finally:
            if collecting:
                gc.enable()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


def _can_be_captured(device: torch.device) -> bool:
    return device.type == "cuda"


def _warm_up(device: torch.device, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Run the steps in a stream of their own, as torch.cuda.graph will; returns the losses."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        losses = [run() for run in runs]
    torch.cuda.current_stream(device).wait_stream(stream)
    return losses


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
    if scaler is not None and scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
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
    if not isinstance(rate, Tensor) or (rate.device, rate.dtype, rate.dim()) != (device, torch.float32, 0):
        group["lr"] = torch.as_tensor(rate, dtype=torch.float32).detach().reshape(()).clone().to(device)
    return cast(Tensor, group["lr"])


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
