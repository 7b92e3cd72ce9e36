"""The accuracy under attack in Lightning's validation, for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast.integrations.shared import require, x_and_target

require("lightning", "2.4")

import lightning  # noqa: E402

__all__ = ["RobustValidation", "gradients", "right_answers"]


@contextmanager
def gradients() -> Iterator[None]:
    """Inside it an attack can take its gradient, in a loop that Lightning runs in inference mode too.

    Tensors that were made in inference mode have to be cloned inside: ``x = x.clone()``.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


class RobustValidation(lightning.Callback):  # type: ignore[misc]
    """Logs the accuracy under PGD (:func:`elle_fast.attacks.pgd`) in each validation and test.

    An attack takes gradients. ``Trainer(inference_mode=True)``, the default, forbids them in ``trainer.validate`` and
    ``trainer.test``, and validation in ``fit`` records none: they are switched on for the attack alone. It runs in the
    weights' precision, outside of the Trainer's autocast, on ``pl_module(x)`` in the module's own mode (evaluation mode
    there), and leaves gradients, buffers and torch's generators alone: a training with it has the losses of one
    without.

    Args:
        eps, steps, restarts, step_size, bounds, norm: those of the attack, in units of x.
        batches: attack only so many batches of each loader; ``None``: all.
        name: of what is logged; ``None``: ``"val_pgd_acc"``.
        seed: of the random starts, the same in every epoch.
        parts: ``batch -> (x, target)``; ``None``: the module's own :meth:`ELLEModule.parts`, or the batch itself, a
            pair or a dictionary with ``pixel_values`` and ``labels``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        eps: float,
        *,
        batches: int | None = None,
        name: str = "val_pgd_acc",
        seed: int = 0,
        parts: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        **attack: Any,
    ) -> None:
        checks.known("RobustValidation", attack, ("steps", "restarts", "step_size", "bounds", "norm"))
        self.eps, self.attack, self.name = checks.real("eps", eps, low=0), attack, name
        self.batches = None if batches is None else checks.integer("batches", batches, low=1)
        self.seed, self.parts = checks.integer("seed", seed, low=0), checks.function("parts", parts)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack one batch and log the accuracy."""
        if trainer.sanity_checking or (self.batches is not None and batch_idx >= self.batches):
            return
        with gradients():
            x, target = parts_of(self.parts, pl_module, batch)
            x, target = x.clone(), target.clone()  # tensors of inference mode are not saved for a backward pass
            generator = torch.Generator(x.device).manual_seed(self.seed + batch_idx)
            x_adv = attacks.pgd(pl_module, x, target, self.eps, generator=generator, **self.attack)
        with torch.no_grad():
            right = right_answers(pl_module(x_adv), target)
        pl_module.log(self.name, right.mean(), on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)

    on_test_batch_end = on_validation_batch_end


def parts_of(parts: Callable[[Any], tuple[Tensor, Any]] | None, module: Any, batch: Any) -> tuple[Tensor, Any]:
    """x and target of a batch: by a user's function, by the module's own ``parts``, or as they come."""
    of: Callable[[Any], tuple[Tensor, Any]] = parts if parts is not None else getattr(module, "parts", x_and_target)
    return of(batch)


def right_answers(logits: Tensor, target: Tensor) -> Tensor:
    """1 or 0 for each sample, ``[B]``; of probabilities, the likeliest class is the right one."""
    return (logits.argmax(dim=1) == (target if target.dim() == 1 else target.argmax(dim=1))).float()
