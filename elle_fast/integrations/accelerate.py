"""ELLE in a loop of Hugging Face Accelerate: :class:`AcceleratedLoss`, a criterion that knows the Accelerator."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.criterion import TrainingLoss
from elle_fast.guard import CollapseGuard
from elle_fast.integrations.hooked_guard import Guarding, defaults_of
from elle_fast.integrations.shared import check_normalized, checked, part_of_step, pixels, require

require("accelerate", "1.1")

import accelerate  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

__all__ = ["AcceleratedLoss"]

_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


class AcceleratedLoss(nn.Module):
    """A criterion in a loop whose gradients an Accelerator accumulates.

    ::

        accelerator = Accelerator(gradient_accumulation_steps=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        criterion = AcceleratedLoss(accelerator, ELLELoss(eps=8/255, adaptive=True))
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model, x, y))   # which divides by 4: do not divide the loss yourself
                optimizer.step()
                optimizer.zero_grad()

    The criterion is registered for ``accelerator.save_state`` and ``load_state``, lam and its history with it, so make
    this before you load. (Accelerate reads these files as pickles: load none that you do not trust.) lam follows the
    first of the batches of a step. The model is what ``prepare`` returned. :meth:`watch` guards it against collapse.

    Args:
        accelerator: the Accelerator.
        criterion: :class:`~elle_fast.ELLELoss`, or one of :mod:`elle_fast.methods`.
        normalized: whether x comes normalized, with the criterion's ``mean`` and ``std``; it is put back to pixels, in
            which eps is. False: x is in pixels, whether or not the criterion normalizes them for the model.

    Attributes:
        criterion: it, with ``stats``, ``output`` and ``controller``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    criterion: TrainingLoss

    def __init__(self, accelerator: Any, criterion: TrainingLoss, *, normalized: bool = False) -> None:
        super().__init__()
        if not isinstance(accelerator, accelerate.Accelerator):
            raise TypeError(f"accelerator: expected an accelerate.Accelerator, got {checks.describe(accelerator)}")
        self.accelerator, self.criterion = accelerator, checked(criterion)
        self.normalized = check_normalized(criterion, normalized)
        self._first = True
        self._guarding: Guarding | None = None
        accelerator.register_for_checkpointing(self.criterion)

    def watch(self, model: nn.Module, optimizer: Any, **options: Any) -> CollapseGuard:
        """Guard the training from now on: ``guard = criterion.watch(model, optimizer, held_out=(x_val, y_val))``.

        The guard looks at the model after each step that the optimiser takes, so not where gradients are accumulated,
        nor where the Accelerator skips one, unless the optimiser is fused; after an alarm it adds E_lin to the loss. It
        is registered for ``save_state`` and ``load_state``, and the criterion goes back with the weights. Call it once,
        after ``prepare`` and before you load.

        Args:
            model, optimizer: what ``prepare`` returned.
            options: of :class:`~elle_fast.CollapseGuard`; those that the criterion has too are its own where they are
                not given. ``held_out`` is in pixels, also if x comes normalized.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: if it was called before.
        """
        if self._guarding is not None:
            raise RuntimeError("watch: expected one call, got another")
        if (kind := self.accelerator.distributed_type) in _SHARDED:
            raise ValueError(f"accelerator: expected whole weights in each process with a guard, got {kind}")
        guarding = Guarding(options)
        guard = guarding.start(model, optimizer, self.criterion, **defaults_of(self.criterion))
        self._guarding = guarding
        self.accelerator.register_for_checkpointing(guarding)
        return guard

    def forward(self, model: Model, x: Tensor, target: Any, **options: Any) -> Tensor:
        """The criterion's loss of one batch, not divided by the accumulation steps.

        Raises:
            RuntimeError: outside of ``accelerator.accumulate`` where gradients are to be accumulated, as ``backward``
                would divide a loss that nothing is added to.
        """
        accelerator, training = self.accelerator, self.criterion.trains(model)
        if training and accelerator.gradient_accumulation_steps > 1 and not self._accumulates():
            raise RuntimeError(
                f"accelerator: expected a call inside of accelerator.accumulate(model), as its backward divides by "
                f"gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, got one outside"
            )
        with part_of_step(self.criterion, self._first or not training):
            given = pixels(x, self.criterion) if self.normalized else x
            loss: Tensor = self.criterion(model, given, target, **options)
        if training:
            self._first = accelerator.sync_gradients  # the next batch begins a step
            if self._guarding is not None:
                loss = self._guarding.added(loss, given, target, options.get("model_kwargs"))
        return loss

    def _accumulates(self) -> bool:
        """Whether ``accumulate`` was entered at all: it counts, and begins anew only with a loader's last batch."""
        return bool(self.accelerator.step > 0 or self.accelerator.gradient_state.end_of_dataloader)
