"""GradAlign: the input gradients at two points of the ball should point the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.models import Model
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import Noisy, check_call


class GradAlign(Noisy):
    r"""Gradient misalignment (Andriushchenko and Flammarion 2020, arXiv 2007.02617; the ELLE paper's Eq. 5).

    .. math::
        1 - mean_i \cos(\nabla_x L(x_i), \nabla_x L(x_i + \eta_i)), \qquad \eta \sim U[-eps, eps]^d

    The value is in ``[0, 2]``. As in its authors' code, the gradient at x is detached, and samples of which either
    gradient is zero are left out of the mean (no sample left: 0). Departure: they are left out by a weight of 0 and not
    by an index, so that nothing waits for the device.

    Costs 2 forward passes, 2 input gradients (one of each less with ``grad``) and a double backward: 8 units (6).

    Args: those of :class:`~elle_fast.regularizers.common.Noisy`.
    """

    def forward(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None, grad: Tensor | None = None
    ) -> Tensor:
        """The misalignment of the gradients at x and at ``x_adv``, or else x plus noise.

        Args:
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`.
            grad: the loss' gradient at x, shaped as x and of any scale, if the attack has it already. No graph.
        """
        check_call(x, target, x_adv)
        grad = attacks.input_gradient(model, x, target) if grad is None else checks.like("grad", grad, x)
        _, grad_adv = attacks.losses_and_gradient(model, self.second_point(x, x_adv), target)
        cosine, kept = _cosine(grad, grad_adv)
        # In a batch of zero gradients there is nothing to align: 0, not 0 / 0.
        return ((1 - cosine) * kept).sum() / kept.sum().clamp(min=1)


def _cosine(grad: Tensor, grad_adv: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines ``[B]``, and 1 for each sample that has one, else 0 (and a cosine of 0)."""
    grad, grad_adv = (widen(each).flatten(1) for each in (grad, grad_adv))
    kept = grad.ne(0).any(dim=1) & grad_adv.ne(0).any(dim=1)
    a, b = _direction(grad, kept), _direction(grad_adv, kept)
    cosine = (a * b).sum(dim=1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1))
    weight = kept.to(cosine.dtype)
    return cosine * weight, weight


def _direction(grad: Tensor, kept: Tensor) -> Tensor:
    """The gradient over its largest entry, and ones where it is not kept: a norm has no derivative at 0.

    The cosine does not depend on the length, and the squares of small gradients vanish in float32.
    """
    largest = grad.detach().abs().amax(dim=1)
    scaled = grad / torch.where(kept, largest, torch.ones_like(largest))[:, None]
    return torch.where(kept[:, None], scaled, torch.ones_like(grad))
