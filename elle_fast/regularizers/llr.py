"""LLR: the loss should be its own first-order Taylor expansion."""

from __future__ import annotations

from torch import Tensor

from elle_fast import attacks
from elle_fast._core.models import Model
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import Noisy, check_call, given


class LLR(Noisy):
    r"""Local linearity regularisation (Qin et al. 2019, arXiv 1907.02610) in the form of the ELLE paper, section 4.3.

    .. math::
        mean_i [L(x_i + \delta_i) - L(x_i) - \delta_i \cdot \nabla_x L(x_i)]^2, \qquad \delta \sim U[-eps, eps]^d

    Every gradient is that of the sample's own loss. The ELLE authors' code subtracts the directional derivative of the
    batch's mean loss, B times too small, so that its value is not zero for a linear loss; this is the formula. Qin et
    al. take the worst delta in the ball and add a term for the gradient: pass the point as ``x_adv``; the term is
    not here.

    Costs 2 forward passes, an input gradient (one of each less with ``losses`` and ``grad``) and a double backward:
    9 units (7).

    Args: those of :class:`~elle_fast.regularizers.common.Noisy`.
    """

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        losses: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error of the expansion at x, for ``x_adv``, or else x plus noise.

        Args:
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`.
            losses: the per-sample losses ``[B]`` at x with their graph, if the training step has them already: see
                ``losses_and_gradient``.
            grad: the gradient of their sum at x, shaped as x, with its graph; both or neither.
        """
        check_call(x, target, x_adv)
        if losses is None and grad is None:
            losses, grad = attacks.losses_and_gradient(model, x, target)
        else:
            losses, grad = given("losses", losses, x.shape[:1]), given("grad", grad, x.shape)
        point = self.second_point(x, x_adv)
        # The difference of the points, as the sum that made the second one was rounded.
        rise = (widen(point - x) * widen(grad)).flatten(1).sum(dim=1)
        after = attacks.sample_losses(model(point), target, None, x.shape[0])
        return (after - losses - rise).square().mean()
