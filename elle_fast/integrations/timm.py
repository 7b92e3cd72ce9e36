"""ELLE as a training task of timm: :class:`ELLETask`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.criterion import TrainingLoss
from elle_fast.guard import CollapseGuard
from elle_fast.integrations.hooked_guard import Guarding, defaults_of
from elle_fast.integrations.shared import check_normalized, checked, part_of_step, pixels, require

require("timm", "1.0.31")

from timm.task import ClassificationTask  # noqa: E402

__all__ = ["ELLETask"]


class ELLETask(ClassificationTask):  # type: ignore[misc]
    """A timm task whose loss is a criterion's: ``task(x, target) -> {"loss", "output", ...}``.

    ``"output"`` are the logits at the points trained on, detached, and the rest is the criterion's ``stats``. Targets
    are class indices, or probabilities as timm's mixup and cutmix make them. DistributedDataParallel, ``compile``, the
    EMA of the weights and checkpoints are timm's; lam and its history are in the task's state, which timm's checkpoints
    hold. Evaluation is the model's own, on the batches as they come.

    **Normalization.** timm's ``PrefetchLoader`` normalizes, in training and validation. Either leave it so, give the
    same numbers to the criterion, and pass ``normalized=True``::

        config = timm.data.resolve_model_data_config(model)
        criterion = ELLELoss(eps=4/255, adaptive=True, mean=config["mean"], std=config["std"])
        task = ELLETask(model, criterion, normalized=True)

    x is then put back to pixels before the attack, and eps is in pixels. Or make the loader with ``mean=(0, 0, 0)`` and
    ``std=(1, 1, 1)``, and have a model that normalizes. Random erasing has to fill with a constant
    (``re_mode="const"``): its noise is no picture.

    Args:
        model: maps ``[B, ...]`` to logits ``[B, C]``.
        criterion: :class:`~elle_fast.ELLELoss`, or one of :mod:`elle_fast.methods` that needs no ``samples``.
        normalized: whether x comes normalized with the criterion's ``mean`` and ``std``.
        accumulation: batches of an optimiser step: lam follows the first of each so many calls, and the first after the
            weights have changed, as timm's loop cuts the last step of an epoch short. The loss is not divided by it,
            which timm's loop does.
        options: ``device``, ``dtype``, ``verbose`` of timm's task.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    criterion: TrainingLoss

    def __init__(
        self,
        model: nn.Module,
        criterion: TrainingLoss,
        *,
        normalized: bool = False,
        accumulation: int = 1,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}")
        if checked(criterion).per_sample:
            raise ValueError(f"criterion: expected one without a memory of each sample, got {type(criterion).__name__}")
        super().__init__(model, criterion, **options)
        self.normalized = check_normalized(criterion, normalized)
        self.accumulation = checks.integer("accumulation", accumulation, low=1)
        self._calls, self._weights = 0, -1
        self._guarding: Guarding | None = None
        self._guard_state: dict[str, Any] = {}  # of a checkpoint that was read before `watch`

    def watch(self, optimizer: Any, **options: Any) -> CollapseGuard:
        """Guard the training from now on: ``guard = task.watch(optimizer, held_out=(x_val, y_val))``.

        The guard looks at the model after each step that the optimiser takes; after an alarm it adds E_lin to the loss.
        It is in the task's state; a checkpoint without it begins it anew. The criterion and timm's EMA go back with the
        weights. Call it once, after ``prepare_distributed``, ``compile`` and ``setup_ema``.

        Args:
            optimizer: of this task's model.
            options: of :class:`~elle_fast.CollapseGuard`; those that the criterion has too are its own where they are
                not given. ``held_out`` is in pixels, also if x comes normalized.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: if it was called before.
        """
        if self._guarding is not None:
            raise RuntimeError("watch: expected one call, got another")
        guarding, average = Guarding(options), self.get_trainable_module(ema=True)
        guarding.load_state_dict(self._guard_state)
        also = () if average is None else (average,)
        defaults = defaults_of(self.criterion)
        guard = guarding.start(self.trainable_module, optimizer, self.criterion, also=also, **defaults)
        self._guarding = guarding
        return guard

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Any]:
        """The loss of a batch, the logits at the points trained on, and the criterion's ``stats``."""
        x = pixels(input, self.criterion) if self.normalized else input
        training = self.criterion.trains(self.trainable_module)
        if self._weights != self._version():
            self._calls = 0
        with part_of_step(self.criterion, first=not training or self._calls % self.accumulation == 0):
            loss: Tensor = self.criterion(self.trainable_module, x, target)
        if training:
            self._calls, self._weights = self._calls + 1, self._version()
            if self._guarding is not None:
                loss = self._guarding.added(loss, x, target)
        return {**self.criterion.stats, "loss": loss, "output": self.criterion.output}

    def _version(self) -> int:
        """Torch's count of changes of the weights, which takes no look at them."""
        return sum(weight._version for weight in self.trainable_module.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The criterion's state, and a guard's, beside the weights; the averaged weights have none."""
        if ema:
            return {}
        guard = {} if self._guarding is None else {"guard": self._guarding.state_dict()}
        return {"criterion": self.criterion.state_dict(), **guard}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take in the criterion's state.

        Raises:
            ValueError: for a checkpoint without one, if ``strict``: lam would begin anew, and nothing would say so.
        """
        if ema:
            return
        if not state or "criterion" not in state:
            if strict:
                raise ValueError("state: expected one with the key 'criterion', of an ELLETask, got none")
            return
        self.criterion.load_state_dict(state["criterion"])
        if self._guarding is None:
            self._guard_state = state.get("guard", {})
        else:
            self._guarding.load_state_dict(state.get("guard", {}))
