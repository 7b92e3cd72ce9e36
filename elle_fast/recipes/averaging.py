"""Averaged weights: torch's AveragedModel with a decay that grows over the first steps, and without a wait on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.swa_utils import AveragedModel

from elle_fast._core.checks import refusal
from elle_fast.recipes.norms import Frozen


def checked_tau(value: Any) -> float:
    """A number in (0, 1); TypeError or ValueError for any other value."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 < value < 1:
        return float(value)
    raise refusal("average: expected a number in (0, 1)", value, number)


class WeightAverage(AveragedModel):
    """An exponential moving average of a model's weights and of its batch norms' statistics.

    The first update copies the model; the one after ``n`` others takes ``w <- d w + (1 - d) w_model`` with
    ``d = min(tau, (1 + n) / (10 + n))``. The second term makes the average usable in short runs: a constant 0.999 would
    still be half of the first step's weights after 700 steps. It is the rule of TensorFlow's ExponentialMovingAverage
    and of the averages of adversarial training since Gowal et al. (arXiv 2010.03593).

    Running means and variances are averaged as the weights are, since they follow from these: statistics copied from
    the last step, as in some of those trainers, belong to weights that the average is behind of. Buffers of integers
    are copied.

    torch's own update copies its counter to the device of the weights, for which CUDA makes the host wait; here the
    counter stays on the CPU. ``model`` is the inner one of DistributedDataParallel.
    """

    n_averaged: torch.Tensor

    def __init__(self, model: nn.Module, tau: float) -> None:
        super().__init__(model, use_buffers=True)
        self.tau = checked_tau(tau)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` after an optimiser step."""
        done = int(self.n_averaged)
        decay = min(self.tau, (1 + done) / (10 + done)) if done else 0.0
        own, new = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        pairs = list(zip(own, new, strict=True))
        moving = [(one, other) for one, other in pairs if one.is_floating_point()]
        torch._foreach_lerp_([one for one, _ in moving], [other for _, other in moving], 1 - decay)
        for one, other in pairs:
            if not one.is_floating_point():
                one.copy_(other)
        self.n_averaged += 1

    def ready(self) -> nn.Module:
        """The averaged model, to evaluate it; RuntimeError if a batch norm in it has not seen data."""
        for name, module in self.module.named_modules():
            if not isinstance(module, _NormBase) or isinstance(module, Frozen):
                continue
            # None without running statistics, when each batch has its own.
            if module.num_batches_tracked is not None and not module.num_batches_tracked:
                raise RuntimeError(
                    f"average: expected batch norms that have seen data, got {name!r} with its initial mean and "
                    "variance; take a step in train mode before, with a model that uses each of its layers"
                )
        averaged: nn.Module = self.module
        return averaged
