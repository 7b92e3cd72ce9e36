"""CURE: the input gradient should change little along the attack's direction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.models import Model
from elle_fast.attacks import losses_and_gradient
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import check_call, given


class CURE(nn.Module):
    r"""Curvature regularisation (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716; the ELLE paper, section 3.3).

    .. math::
        mean_i \|\nabla_x L(x_i + h z_i) - \nabla_x L(x_i)\|_2, \qquad
        z = \operatorname{sign}(\nabla_x L) / \|\operatorname{sign}(\nabla_x L)\|_2

    The ELLE paper compares with the gradient at the FGSM point: pass ``x_adv``. The norm is not squared, as there. In
    the mean over the batch, gradients are those of the samples' own losses, never of the mean loss.

    Costs 2 forward passes, 2 input gradients (one of each less with ``grad``, and with ``grad_adv``) and a double
    backward: 12 units (10 and 8).

    Args:
        h: distance of the second point from x in the 2-norm, ``> 0``, in units of x.
    """

    def __init__(self, h: float = 3.0) -> None:
        super().__init__()
        self.h = checks.real("h", h, low=0, low_allowed=False)

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        grad: Tensor | None = None,
        grad_adv: Tensor | None = None,
    ) -> Tensor:
        """The mean change of the gradient between x and ``x_adv``, or else x + h z.

        Args:
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`.
            grad: the gradient of the summed losses at x, shaped as x, with its graph, if the training step has it
                already: see ``losses_and_gradient``.
            grad_adv: the same at ``x_adv``, which must be given too.
        """
        check_call(x, target, x_adv)
        if grad_adv is not None and x_adv is None:
            raise ValueError("grad_adv: expected None without x_adv, got a gradient")
        grad = losses_and_gradient(model, x, target)[1] if grad is None else given("grad", grad, x.shape)
        if grad_adv is None:
            _, grad_adv = losses_and_gradient(model, self._ahead(x, grad) if x_adv is None else x_adv, target)
        else:
            grad_adv = given("grad_adv", grad_adv, x.shape)
        # At a difference of 0 torch takes 0 of the norm's subgradients.
        change: Tensor = torch.linalg.vector_norm(widen(grad_adv - grad).flatten(1), dim=1)
        return change.mean()

    def _ahead(self, x: Tensor, grad: Tensor) -> Tensor:
        """``x + h z``; x where the gradient is zero."""
        sign = grad.detach().sign().flatten(1)
        # Its squared length is the number of entries that are not 0.
        length = sign.count_nonzero(dim=1).clamp(min=1).to(sign.dtype).sqrt()
        return x + self.h * (sign / length[:, None]).view_as(x)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"h={self.h:g}"
