"""The options that say which network a run trains."""

from __future__ import annotations

from dataclasses import dataclass

from elle_fast.recipes.checked import Checked


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Checked):
    """A network and what is in front of it."""

    model: str = "cnn"
    """preact, preactresnet18, wideresnet28-10, resnet50, cnn or mlp."""
    width: int | None = None
    """Channels of the model's first stage, >= 1."""
    normalize: bool = True
    """The model's first layer subtracts the training images' mean and divides by their std, per channel."""
