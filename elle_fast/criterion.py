"""What every criterion shares: when a call updates its state, and a watch over losses that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast._core.options import Options
from elle_fast._core.pickling import Picklable
from elle_fast._core.unwrapping import Model, module_of, unwrapped
from elle_fast.adaptive import AdaptiveLambda


class Record(NamedTuple):
    """What a step leaves to be looked at: a criterion's ``stats`` and ``output``."""

    stats: dict[str, Tensor]
    output: Tensor | None


class TrainingLoss(Options, Picklable):
    """Base class of :class:`~elle_fast.ELLELoss` and of the criteria of :mod:`elle_fast.methods`.

    A call in training is a step of the criterion's state: lam and the history of ELLE-A, Free AT's perturbation, the
    steps that NuAT counts. It is none inside :meth:`frozen`, in the criterion's eval mode, and while the model is in
    eval mode, as in a validation; of a model that is no module, nor a method or partial call of one, that is not known.
    """

    eps: float
    label_smoothing: float
    last = Record({}, None)
    per_sample = False  # whether something is kept for each training sample, so that calls need `samples`
    _uncapturable: ClassVar[str | None] = None  # what it does in a step that a CUDA graph cannot repeat
    _frozen = 0
    _terms: tuple[Callable[[Tensor], Tensor], ...] = ()
    _warned = False
    _in_a_row: Tensor | None = None  # losses that were not finite, up to _counted
    _counted: Tensor | None = None
    _sent: HostCopy | None = None

    @contextmanager
    def frozen(self, on: bool = True) -> Iterator[None]:
        """Inside it calls leave the state alone, where an optimiser step takes more than one; ``on=False``: as outside.

        lam then weighs E_lin as it is. With sharpness-aware minimisation::

            criterion(model, x, y).backward()
            optimizer.first_step()
            with criterion.frozen():
                criterion(model, x, y).backward()
            optimizer.second_step()

        With gradient accumulation lam follows the first of the parts: ``with criterion.frozen(part > 0)``. With LBFGS
        only the closure's first call may count: ``with criterion.frozen(next(calls) > 0)``, where
        ``calls = itertools.count()`` is made for each step. Methods that count steps take the frozen calls for parts of
        the step that was counted last.
        """
        checks.flag("on", on)
        held = [module for module in self.modules() if isinstance(module, TrainingLoss)] if on else []
        for module in held:
            module._frozen += 1
        try:
            yield
        finally:
            for module in held:
                module._frozen -= 1

    @property
    def stats(self) -> dict[str, Tensor]:
        """The last step's numbers worth logging, ``loss`` among them: detached 0-dim tensors; empty before it."""
        return dict(self.last.stats)

    @property
    def output(self) -> Tensor | None:
        """The logits at the points that the last step trained on, ``[B, C]``, detached.

        ``None`` before it, and with a ``loss_fn`` of your own.
        """
        return self.last.output

    @property
    def uncapturable(self) -> str | None:
        """Why :func:`elle_fast.capture` refuses this criterion: what its steps do that a CUDA graph cannot repeat.

        ``None`` if it takes it. A model or an attack of your own may still be a reason, which the capture finds.
        """
        parts = [module for module in self.modules() if isinstance(module, TrainingLoss)]
        found = (f"{type(part).__name__} {part._uncapturable}" for part in parts if part._uncapturable is not None)
        return next(found, None)

    def check(self, x: Tensor, target: Any) -> None:
        """Check a batch before the model sees it, as each call does."""
        raise NotImplementedError

    @property
    def core(self) -> TrainingLoss:
        """The criterion that makes the attack and has the logits there: this one, or what it is built around."""
        return self

    @contextmanager
    def adding(self, term: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, calls add ``term`` of the logits ``[B, C]`` at the points trained on, 0-dim, to the loss."""
        core = self.core
        before, core._terms = core._terms, (*core._terms, term)
        try:
            yield
        finally:
            core._terms = before

    def with_terms(self, loss: Tensor, logits: Tensor) -> Tensor:
        """The loss and what is added to it; ``logits`` have their graph."""
        for term in self._terms:
            loss = loss + term(logits)
        return loss

    def constants(self) -> dict[str, Any]:
        """What a captured step depends on, could change, and cannot follow, by name: modes, and what may be set.

        Those of what is inside have its name in front.
        """
        facts: dict[str, Any] = {"training": self.training, "frozen": bool(self._frozen)}
        facts |= {name: getattr(self, name) for name in self._settable}
        for part, module in self.named_children():
            if isinstance(module, TrainingLoss):
                facts |= {f"{part}.{name}": value for name, value in module.constants().items()}
            elif isinstance(module, AdaptiveLambda):
                facts[part] = (*module.options.values(), module.process_group)
            elif isinstance(module, Options):
                facts |= {f"{part}.{name}": getattr(module, name) for name in module._settable}
        return facts

    def trains(self, model: Model) -> bool:
        """Whether criterion and model are in train mode."""
        return self.training and in_train_mode(model)

    def updates(self, model: Model) -> bool:
        """Whether a call with this model is a step of the state. Warns once of a state that never takes one."""
        if self._frozen or not self.training or in_train_mode(model):
            return self.training and not self._frozen
        if torch.is_grad_enabled() and not self._warned and not is_compiling() and self.state_dict():
            self._warned = True
            warnings.warn(
                f"model: in eval mode, so what {type(self).__name__} keeps from step to step stays as it is (ELLE-A's "
                "lam begins with 0). To train like this put the model in train mode and only layers in eval mode; in a "
                "validation use torch.no_grad() or criterion.eval()",
                stacklevel=2,
            )
        return False

    def raise_if_diverged(self, after: int = 10) -> None:
        """Raise if the last ``after`` losses were not finite; a loop calls it after each step.

        On CUDA nothing waits: the losses are counted on the device, and the count is read when a copy of it has
        arrived, so the error comes as many steps late as the device is behind. Elsewhere the last loss is read.

        Raises:
            RuntimeError: after that many. The count begins anew.
        """
        checks.integer("after", after, low=1)
        loss = self.stats.get("loss")
        if loss is not None and loss is not self._counted:
            before = 0 if self._in_a_row is None else self._in_a_row.to(loss.device)
            self._in_a_row, self._counted = (before + 1) * loss.isfinite().logical_not(), loss
        if self._in_a_row is None or not (self._sent is None or self._sent.arrived()):
            return
        count = 0.0 if self._sent is None else self._sent.item()
        self._sent = HostCopy.start(self._in_a_row)
        if self._sent is None:
            count = self._in_a_row.item()
        if count >= after:
            self._in_a_row = self._sent = None
            raise RuntimeError(
                f"loss: expected finite numbers, got {count:.0f} in a row that are not. Go back to weights from before "
                "that; a smaller learning rate or lam, or a bound on E_lin's gradient (max_ratio=100), may help"
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not inside `frozen`, and an event cannot be pickled.
        return {name: value for name, value in super().__getstate__().items() if name not in _OF_THIS_OBJECT}


class WeightedLoss(TrainingLoss):
    """Base class of criteria with a regulariser, whose weight is a number or that of a controller."""

    controller: AdaptiveLambda | None

    @property
    def lam(self) -> float:
        """The weight, which may be set; with a controller the highest, which is set as ``controller.lam_max``."""
        return self._lam if self.controller is None else self.controller.lam_max

    @lam.setter
    def lam(self, value: float) -> None:
        if self.controller is not None:
            self._refuse("lam", value, "set controller.lam_max")
        self._lam = checks.real("lam", value, low=0)


_OF_THIS_OBJECT = {"_frozen", "_ahead", "_terms", "_in_a_row", "_counted", "_sent"}


def in_train_mode(model: Any) -> bool:
    """Whether a model is in train mode, or is no module, nor a method or partial call of one."""
    module = module_of(model)
    if module is None:
        return True
    model = unwrapped(module)
    # In older torch the compiled module has a mode of its own, which `eval()` of the module inside does not change.
    model = getattr(model, "_orig_mod", model)
    return not isinstance(model, nn.Module) or model.training
