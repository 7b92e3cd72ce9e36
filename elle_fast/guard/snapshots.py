"""Two earlier states of a training, to go back to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.unwrapping import unwrapped


class Snapshots:
    """The last two states of a model, its optimiser, and other objects, each with the step that it is of.

    Args:
        model, optimizer: whose weights, buffers and moments are kept; learning rates and other options are not.
        also: further objects with ``state_dict`` and ``load_state_dict``.
        on_host: copies in the host's memory, pinned on CUDA; else on the tensors' own devices.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, also: Iterable[Any], *, on_host: bool
    ) -> None:
        expected = "also: expected objects with state_dict and load_state_dict"
        if not isinstance(also, Iterable):
            raise TypeError(f"{expected}, got {checks.describe(also)}")
        self._also = tuple(also)
        for each in self._also:
            if not (hasattr(each, "state_dict") and hasattr(each, "load_state_dict")):
                raise TypeError(f"{expected}, got {each!r}")
        self._model, self._optimizer, self._on_host = model, optimizer, on_host
        self._kept: list[dict[str, Any]] = []  # the older one first

    @property
    def newest(self) -> int:
        """The step of the newest state; -1 if there is none."""
        return int(self._kept[-1]["step"]) if self._kept else -1

    def take(self, step: int) -> None:
        """Keep the state after ``step`` steps, in place of the older of two, which goes first.

        Raises:
            MemoryError: if there is no room for it.
        """
        self._kept = self._kept[-1:]
        try:
            state = self._copied({"step": step, **self._now()})
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            place = "the host's memory" if self._on_host else "the device's memory (on_host=True takes the host's)"
            raise MemoryError(f"snapshot: expected room for weights and optimiser in {place}, got none") from error
        self._kept.append(state)

    def nearest(self, latest: int) -> int | None:
        """The step of the newest state of at most ``latest`` steps whose weights are finite; ``None``: there is none.

        It waits for the device.
        """
        steps = (int(state["step"]) for state in reversed(self._kept) if state["step"] <= latest and self._whole(state))
        return next(steps, None)

    def go_back(self, to: int) -> int:
        """Restore the state of step ``to``, which is kept, forget any newer one, and say the step."""
        self._kept = [state for state in self._kept if state["step"] <= to]
        state = self._kept[-1]
        with torch.no_grad():
            for name, value in self._tensors().items():
                value.copy_(state["model"][name])
        self._restore_moments(state["optimizer"])
        for each, own in zip(self._also, state["also"], strict=True):
            each.load_state_dict(self._copied(own))  # which it may keep, and change
        return to

    def _whole(self, state: dict[str, Any]) -> bool:
        """Whether a state's weights are finite; other than buffers, these are the same on all ranks."""
        model: Any = unwrapped(self._model)
        weights = dict(model.named_parameters())
        return all(bool(value.isfinite().all()) for name, value in state["model"].items() if name in weights)

    def _tensors(self) -> dict[str, Tensor]:
        model: Any = unwrapped(self._model)
        saved = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        return {**dict(model.named_buffers()), **saved}  # also the buffers that no checkpoint has

    def _now(self) -> dict[str, Any]:
        moments = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters()]
        others = [each.state_dict() for each in self._also]
        return {"model": self._tensors(), "optimizer": [dict(each) for each in moments], "also": others}

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _restore_moments(self, moments: list[dict[str, Any]]) -> None:
        """In place where there are tensors already, since a captured step holds their addresses."""
        for parameter, before in zip(self._parameters(), moments, strict=True):
            state = self._optimizer.state[parameter]
            for name in [name for name in state if name not in before]:
                if isinstance(state[name], Tensor):
                    state[name].zero_()  # had not begun: so Adam and SGD begin, but not NAdam and Rprop
                else:
                    del state[name]
            for name, value in before.items():
                if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
                    state[name].copy_(value)
                elif isinstance(value, Tensor):
                    state[name] = value.to(parameter.device if value.dim() else value.device, copy=True)
                else:
                    state[name] = self._copied(value)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach()
            if not (self._on_host and value.device.type == "cuda"):
                return value.clone()
            pinned = torch.empty_like(value, device="cpu", pin_memory=True)
            return pinned.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {name: self._copied(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(each) for each in value)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The kept states, for a checkpoint; it waits for copies that are on their way to the host."""
        if self._on_host and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return {"kept": list(self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the kept states from what :meth:`state_dict` gave."""
        found = state["kept"]
        own = {name: value.shape for name, value in self._tensors().items()}
        for each in found:
            if {name: value.shape for name, value in each["model"].items()} != own:
                raise ValueError("snapshots: expected those of this model, got those of another one")
        self._kept = self._copied(list(found))
