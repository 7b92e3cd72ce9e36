"""ELLE in the Trainer of Hugging Face: :class:`ELLETrainer`, for classifiers of images and of texts; :class:`Guard`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core.files import write_atomically
from elle_fast.criterion import TrainingLoss
from elle_fast.integrations.shared import check_normalized, checked, part_of_step, pixels, require, token_losses
from elle_fast.integrations.transformers_guard import Guard, GuardedTrainer

require("accelerate", "1.1")

__all__ = ["ELLETrainer", "Guard", "token_losses"]

_STATE = "criterion.pt"


class ELLETrainer(GuardedTrainer):
    """A Trainer whose training loss is a criterion's; evaluation is the Trainer's own, without an attack.

    **Images** (inputs with ``pixel_values``): the attack moves these. **Texts** (with ``input_ids``): it moves the
    embeddings, which the model takes as ``inputs_embeds``, where ``attention_mask`` is not 0; eps is then in their
    units. The embeddings are trained too, as all points of a sample are ``embedding + offset``. The other inputs
    go with their sample's points.

    Logits are the model's ``logits``, ``[B, C]``, and ``labels`` class indices or probabilities. For one label a token
    pass ``loss_fn=token_losses`` to the criterion. Gradient accumulation divides the loss as it should, and lam follows
    the first of the batches of a step. Each checkpoint holds lam and its history (``criterion.pt``), which a resume
    takes up. The criterion's ``stats`` are logged with the loss.

    Args:
        args: those of ``transformers.Trainer``, by name or in its order.
        criterion: :class:`~elle_fast.ELLELoss`, or one of :mod:`elle_fast.methods` that needs no ``samples``.
        normalized: whether ``pixel_values`` come normalized, as image processors make them, with the criterion's
            ``mean`` and ``std``; they are put back to pixels, in which eps is. False: they are pixels
            (``do_normalize=False``).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    loss_is_scaled_for_ga = False  # the Trainer is to divide it

    def __init__(self, *args: Any, criterion: TrainingLoss, normalized: bool = False, **kwargs: Any) -> None:
        self.criterion = checked(criterion)
        self.normalized = check_normalized(criterion, normalized)
        linearity = getattr(criterion, "linearity", None)
        if criterion.per_sample:
            raise ValueError(f"criterion: expected one without a memory of each sample, got {type(criterion).__name__}")
        if getattr(linearity, "logits", None) is not None:
            raise ValueError("criterion: expected logits=None, as ELLETrainer takes the model's logits by itself")
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: expected None, as it never sees the model; the criterion is the loss")
        if self.label_smoother is not None:
            raise ValueError(
                "label_smoothing_factor: expected 0, as the criterion is the loss; pass label_smoothing to it, "
                f"got {self.args.label_smoothing_factor}"
            )
        self.model_accepts_loss_kwargs = False  # how older releases are told to divide it

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does. Meanwhile the model, called with a positional argument, takes it for points."""
        self._first, inner = True, self.accelerator.unwrap_model(self.model)
        # On the innermost module, so that they are there in passes through wrappers, past them and in recomputations.
        hooks = [
            inner.register_forward_pre_hook(_points_by_name, with_kwargs=True),
            inner.register_forward_hook(_logits_alone),
        ]
        try:
            return super().train(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The criterion's loss in training, the model's own in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rest = dict(inputs)
        labels = rest.pop("labels", None)
        if labels is None:
            raise ValueError(f"inputs: expected labels, got {', '.join(inputs)}")
        if (x := rest.pop("pixel_values", None)) is not None:
            x = pixels(x, self.criterion) if self.normalized else x
        else:
            x = self._offsets(model, rest)
        with part_of_step(self.criterion, self._first):
            loss = self.criterion(model, x, labels, model_kwargs=rest)
        loss = self.guarded(loss, model, x, labels, rest)
        self._first = self.accelerator.sync_gradients  # the next batch begins a step
        return (loss, {"logits": self.criterion.output}) if return_outputs else loss

    def _offsets(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """No offset yet, for each embedding."""
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError(f"inputs: expected pixel_values or input_ids, got {', '.join(inputs)}")
        packing = getattr(getattr(self.criterion, "linearity", None), "packing", None)
        if getattr(self.criterion, "bounds", None) or (packing and (packing.bounds or packing.mean)):
            raise ValueError("criterion: expected no bounds, mean and std, as embeddings have no range of their own")
        weight = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        return torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=ids.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the criterion's ``stats`` to a row with the training loss."""
        if "loss" in logs:
            logs |= {name: value.item() for name, value in self.criterion.stats.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            write_atomically(Path(output_dir) / _STATE, lambda file: torch.save(self.criterion.state_dict(), file))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / _STATE
            if not path.is_file():
                raise FileNotFoundError(f"{path}: expected the criterion's state, without which lam would begin anew")
            self.criterion.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _points_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Offsets become embeddings; pixels are the first argument of every classifier of images."""
    if not args or (ids := kwargs.get("input_ids")) is None:
        return None
    offsets, mask = args[0], kwargs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        offsets = offsets * mask.unsqueeze(-1).to(offsets.dtype)
    embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
    del kwargs["input_ids"]  # of this call alone
    return (None,), {**kwargs, "inputs_embeds": embeddings(ids) + offsets}


def _logits_alone(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output["logits"] if args else None
