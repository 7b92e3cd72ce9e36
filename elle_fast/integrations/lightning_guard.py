"""The guard against collapse in a Lightning Trainer, for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from elle_fast._core import checks
from elle_fast.criterion import TrainingLoss
from elle_fast.guard import Alarm
from elle_fast.integrations.hooked_guard import Guarding, defaults_of
from elle_fast.integrations.robust_validation import parts_of
from elle_fast.integrations.shared import require

require("lightning", "2.4")

import lightning  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy  # noqa: E402

__all__ = ["Guard"]

# What an ELLEModule's forward pass does by itself.
_IN_THE_MODULE = ("mean", "std", "logits")


class Guard(lightning.Callback):  # type: ignore[misc]
    """A :class:`~elle_fast.CollapseGuard` in a Trainer, for any LightningModule with one optimiser.

    ::

        guard = Guard(held_out=(x_val, y_val))              # of a module of your own: Guard(eps=8 / 255, ...)
        Trainer(callbacks=[guard]).fit(ELLEModule(...), loader)
        guard.alarms

    It looks at ``pl_module(x)``, which maps x to logits, after each step of the optimiser, also of accumulated
    gradients, outside of the Trainer's autocast; after an alarm it adds E_lin to what ``training_step`` returns. Its
    state, with two snapshots of the weights, is in the Trainer's checkpoints; one without it begins it anew. The
    averages of Lightning's callbacks go back too, and so does the module's ``criterion``.

    Args:
        parts: ``batch -> (x, target)``, x in the units of eps; ``None``: the module's own :meth:`ELLEModule.parts`, or
            the batch itself, a pair or a dictionary with ``pixel_values`` and ``labels``.
        options: of :class:`~elle_fast.CollapseGuard`. ``eps``, ``bounds``, ``norm``, ``loss_fn`` and
            ``triplet_precision`` are those of the module's ``criterion``, where it is one of this package and they are
            not given. ``held_out`` is in the units of eps.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got. In ``fit`` for a module that
            optimises by hand, for several optimisers, and for a strategy that shards the weights.
    """

    def __init__(self, *, parts: Callable[[Any], tuple[Tensor, Any]] | None = None, **options: Any) -> None:
        self.parts = checks.function("parts", parts)
        self._guarding = Guarding(options)
        self._module: Any = None

    @property
    def alarms(self) -> list[Alarm]:
        """Those so far."""
        return self._guarding.alarms

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot be guarded."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "automatic_optimization: expected True with a Guard, got False; use CollapseGuard in training_step"
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "strategy: expected one device or ddp, as the guard keeps whole weights, got "
                f"{type(trainer.strategy).__name__}"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the guard, now that weights and optimiser are there and restored."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"configure_optimizers: expected one optimiser with a Guard, got {len(trainer.optimizers)}"
            )
        criterion = getattr(pl_module, "criterion", None)
        defaults = defaults_of(criterion) if isinstance(criterion, TrainingLoss) else {}
        defaults = {name: value for name, value in defaults.items() if name not in _IN_THE_MODULE}
        averages = (getattr(each, "_average_model", None) for each in trainer.callbacks)
        also = tuple(each for each in averages if each is not None)
        self._guarding.start(pl_module, trainer.optimizers[0], criterion, also=also, **defaults)
        step = pl_module.training_step

        @wraps(step)
        def guarded(batch: Any, *rest: Any, **kwargs: Any) -> Any:
            output = step(batch, *rest, **kwargs)
            if output is None:
                return None
            x, target = parts_of(self.parts, pl_module, batch)
            if isinstance(output, Mapping):
                return {**output, "loss": self._guarding.added(output["loss"], x, target)}
            return self._guarding.added(output, x, target)

        # Of this object, so that wrappers find it: its passes are then inside of DistributedDataParallel's.
        pl_module.training_step, self._module = guarded, pl_module

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was."""
        self._guarding.stop()
        if self._module is not None:
            del self._module.training_step
            self._module = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The guard's state."""
        return self._guarding.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up, when the training starts."""
        self._guarding.load_state_dict(state_dict)
