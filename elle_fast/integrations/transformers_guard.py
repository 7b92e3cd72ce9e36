"""The guard against collapse in the Trainer of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core.files import write_atomically
from elle_fast.criterion import TrainingLoss
from elle_fast.guard import Alarm
from elle_fast.integrations.hooked_guard import Guarding, defaults_of
from elle_fast.integrations.shared import require

require("transformers", "5.0")

import transformers  # noqa: E402

__all__ = ["Guard", "GuardedTrainer"]

_STATE = "guard.pt"


class Guard(transformers.TrainerCallback):  # type: ignore[misc]
    """A :class:`~elle_fast.CollapseGuard` in an :class:`ELLETrainer` of pictures.

    ::

        guard = Guard(held_out=(x_val, y_val))                   # pixels, also if the loader normalizes
        ELLETrainer(model, args, criterion=..., train_dataset=..., callbacks=[guard]).train()
        guard.alarms

    It looks at the model after each step of the optimiser, also of accumulated gradients; after an alarm it adds E_lin
    to the loss. Its state, with two snapshots of the weights, is in each checkpoint (``guard.pt``); a resume from one
    without it begins it anew. The criterion goes back with the weights.

    Args:
        options: of :class:`~elle_fast.CollapseGuard`; those that the criterion has too are its own where they are not
            given.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got. In ``train`` for a Trainer that
            is no ELLETrainer, for inputs with more than ``pixel_values``, and with DeepSpeed or FSDP.
    """

    def __init__(self, **options: Any) -> None:
        self.guarding = Guarding(options)
        self.expected = False  # by a Trainer that hands out its batches

    @property
    def alarms(self) -> list[Alarm]:
        """Those so far."""
        return self.guarding.alarms

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a Trainer in which the guard would see nothing."""
        if not self.expected:
            raise TypeError("trainer: expected an ELLETrainer, which shows its batches to a Guard, got another one")


class GuardedTrainer(transformers.Trainer):  # type: ignore[misc]
    """A Trainer that shows its batches to the :class:`Guard` among its callbacks, and saves it."""

    criterion: TrainingLoss

    @property
    def guard(self) -> Guard | None:
        """The one among the callbacks."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, Guard)), None)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does."""
        if (guard := self.guard) is None:
            return super().train(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            kind = "deepspeed" if self.is_deepspeed_enabled else "fsdp"
            raise ValueError(f"{kind}: expected none with a Guard, which keeps whole weights, got it")
        guard.expected = True
        try:
            return super().train(*args, **kwargs)
        finally:
            guard.expected = False
            guard.guarding.stop()

    def guarded(self, loss: Tensor, model: nn.Module, x: Tensor, target: Any, rest: Mapping[str, Any]) -> Tensor:
        """The loss of a batch, and what a guard adds to it."""
        if self.guard is None:
            return loss
        guarding = self.guard.guarding
        if not guarding.running:  # the model as it is wrapped, and an optimiser with what a checkpoint had
            guarding.start(model, self.optimizer, self.criterion, **defaults_of(self.criterion))
        return guarding.added(loss, x, target, rest)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.guard is not None and self.args.should_save:
            state = self.guard.guarding.state_dict()
            write_atomically(Path(output_dir) / _STATE, lambda file: torch.save(state, file))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.guard is not None and checkpoint is not None and (path := Path(checkpoint) / _STATE).is_file():
            self.guard.guarding.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
