"""What a step of several forward passes has to tell DistributedDataParallel, which knows of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def wrapper_of(model: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel that the model is, or that other wrappers hold."""
    while isinstance(model, nn.Module) and not isinstance(model, DistributedDataParallel):
        inner = (model._modules.get(name) for name in ("_orig_mod", "_forward_module", "module"))
        model = next((module for module in inner if module is not None), None)
    return model if isinstance(model, DistributedDataParallel) else None


def with_all_passes(model: Any, loss: Tensor) -> Tensor:
    """The loss, after the wrapper has looked for unused parameters in the graph of all forward passes.

    With ``find_unused_parameters`` it does so in that of its own pass: a layer that this one drops and another one uses
    would be ready for the reduction twice.
    """
    wrapper = wrapper_of(model)
    if (
        wrapper is not None
        and wrapper.find_unused_parameters
        and not wrapper.static_graph
        and wrapper.require_backward_grad_sync
        and torch.is_grad_enabled()
        and loss.requires_grad
    ):
        wrapper.reducer.prepare_for_backward([loss])
    return loss


def refuse_join(model: Any, step: str) -> None:
    """For a step in which the ranks talk to each other: a rank without a batch would not take part.

    Torch's Joinable is not for it: a joined rank makes up for all of the wrapper's communication in one go, while this
    one's lies between the forward pass and the backward pass.
    """
    wrapper = wrapper_of(model)
    if wrapper is not None and wrapper._join_config.enable and not wrapper._join_config.throw_on_early_termination:
        raise RuntimeError(
            f"model: expected no join() around {step} over the ranks in each step, got one (which torch leaves on when "
            "it has ended; wrap the module anew then); give each rank as many batches (DistributedSampler with "
            "drop_last=True), or stop with join(throw_on_early_termination=True)"
        )
