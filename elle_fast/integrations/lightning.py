"""ELLE in a Lightning Trainer: :class:`ELLEModule`; :class:`Guard` and :class:`RobustValidation` for any module.

Fabric needs no adapter: ``criterion(fabric.setup(model), x, y)`` and ``fabric.backward(loss)``; the criterion goes into
``fabric.save`` beside the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.criterion import TrainingLoss
from elle_fast.integrations.lightning_guard import Guard
from elle_fast.integrations.robust_validation import RobustValidation, gradients, right_answers
from elle_fast.integrations.shared import check_normalized, checked, part_of_step, pixels, require, x_and_target

require("lightning", "2.4")

import lightning  # noqa: E402

__all__ = ["ELLEModule", "Guard", "RobustValidation", "gradients"]


class ELLEModule(lightning.LightningModule):  # type: ignore[misc]
    """A LightningModule that trains ``model`` with a criterion.

    Batches are ``(x, target)``, or have ``pixel_values`` and ``labels``; override :meth:`parts` for others. lam and its
    history are in Lightning's checkpoints, by the key ``"criterion"``: not in ``state_dict``, whose buffers Lightning's
    weight averaging would average. With ``accumulate_grad_batches`` lam follows the first of the batches of a step,
    and with LBFGS the first of its calls. Each step logs the criterion's ``stats`` as ``train_loss``, ``train_ce``,
    ...; validation logs ``val_acc``, the accuracy without an attack (:class:`RobustValidation` adds that under one).

    In a LightningModule of your own some lines do the same (pass ``use_buffers=False`` to ``EMAWeightAveraging``)::

        self.criterion = ELLELoss(eps=8/255, adaptive=True)     # in __init__: so it is in the checkpoints

        with self.criterion.frozen(batch_idx % self.trainer.accumulate_grad_batches > 0):     # in training_step
            return self.criterion(self.model, x, target)

    Args:
        model: maps ``[B, ...]`` to logits ``[B, C]``, or what the criterion takes.
        criterion: :class:`~elle_fast.ELLELoss`, or one of :mod:`elle_fast.methods` that needs no ``samples``.
        optimizer: ``parameters -> `` what ``configure_optimizers`` may return; ``None``: override that method.
        normalized: whether x comes normalized, with the criterion's ``mean`` and ``std``; it is put back to pixels, in
            which eps is. False: x is in pixels, whether or not the criterion normalizes them for the model.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    criterion: TrainingLoss

    def __init__(
        self,
        model: nn.Module,
        criterion: TrainingLoss,
        optimizer: Callable[[Iterable[nn.Parameter]], Any] | None = None,
        *,
        normalized: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}")
        self.model = model
        object.__setattr__(self, "criterion", checked(criterion))  # no submodule: see above
        if criterion.per_sample:
            raise ValueError(
                f"criterion: expected one without a memory of each sample, got {type(criterion).__name__}; write a "
                "LightningModule whose batches have the samples' places, and pass these as samples="
            )
        if optimizer is not None and not callable(optimizer):
            raise TypeError(
                f"optimizer: expected None or a function of the parameters, got {checks.describe(optimizer)}"
            )
        self.make_optimizer = optimizer
        self.normalized = check_normalized(criterion, normalized)
        self._place: tuple[int, int] | None = None  # epoch and batch of the last call

    def on_fit_start(self) -> None:
        """No batch has been seen."""
        self._place = None

    def parts(self, batch: Any) -> tuple[Tensor, Any]:
        """x in pixels, and the target, of a batch."""
        x, target = x_and_target(batch)
        return (pixels(x, self.criterion) if self.normalized else x), target

    def forward(self, x: Tensor) -> Any:
        """The logits of pixels, ``[B, C]``."""
        linearity = getattr(self.criterion, "linearity", None)
        return (self.model if linearity is None else linearity.on_pixels(self.model))(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The criterion's loss."""
        x, target = self.parts(batch)
        place = self.trainer.current_epoch, batch_idx
        again, self._place = place == self._place, place  # as LBFGS calls
        first = batch_idx % self.trainer.accumulate_grad_batches == 0 and not again
        with part_of_step(self.criterion, first):
            loss: Tensor = self.criterion(self.model, x, target)
        stats = {f"train_{name}": value.float() for name, value in self.criterion.stats.items()}
        self.log_dict(stats, batch_size=x.shape[0])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy without an attack."""
        x, target = self.parts(batch)
        self.log("val_acc", right_answers(self(x), target).mean(), batch_size=x.shape[0], sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the criterion's state."""
        checkpoint["criterion"] = self.criterion.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take in the criterion's state; ValueError if the checkpoint has none, as lam would silently begin anew."""
        if "criterion" not in checkpoint:
            raise ValueError("checkpoint: expected one of an ELLEModule, got one without the key 'criterion'")
        self.criterion.load_state_dict(checkpoint["criterion"])

    def configure_optimizers(self) -> Any:
        """What ``optimizer`` makes of the model's parameters."""
        if self.make_optimizer is None:
            raise TypeError("optimizer: expected a function of the parameters, or configure_optimizers of your own")
        return self.make_optimizer(self.model.parameters())
