"""A model in another precision, for evaluations that may be less exact than the training's numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from elle_fast._core import precision


def in_precision(model: nn.Module, name: str) -> nn.Module:
    """The model, whose forward and backward passes go through ``torch.autocast``; its logits are float32.

    Attacks take their gradients through it too. They are of the cross-entropy, unscaled: in fp16 those of samples that
    the model is very sure of may be zero.

    Args:
        model: with weights in float32, which it keeps.
        name: ``"fp32"``, which is the model itself, ``"bf16"`` or ``"fp16"``.

    Raises:
        TypeError, ValueError: for another name.
    """
    return model if precision.check("precision", name) == "fp32" else _InPrecision(model, name)


class _InPrecision(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        with precision.around(self.name, x.device):
            output = self.model(x)
        return output.float() if isinstance(output, Tensor) else output
