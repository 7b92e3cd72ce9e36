"""LLR: the loss should be its own first-order Taylor expansion."""

from __future__ import annotations

from torch import Tensor

from elle_fast._core.models import Model
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import Noisy, check_call, given, losses_and_gradient, sample_losses


class LLR(Noisy):
    r"""Local linearity regularisation (Qin et al. 2019, arXiv 1907.02610) in the form of the ELLE paper, section 4.3.

    .. math::
        mean_i [L(x_i + \delta_i) - L(x_i) - \delta_i \cdot \nabla_x L(x_i)]^2, \qquad \delta \sim U[-eps, eps]^d

    Every gradient is that of the sample's own loss. The ELLE authors' code subtracts the directional derivative of the
    batch's mean loss, B times too small, so that its value is not zero for a linear loss; this is the formula. Qin et
    al. take the worst delta in the ball and add a term for the gradient: pass the point as ``x_adv``; the term is
    not here. In train mode batch norm ties a sample's gradient to its batch.

    Costs 2 forward passes, an input gradient (one of each less with ``losses`` and ``grad``) and a double backward:
    9 units (7).

    Args:
        eps: half-width of the noise, ``>= 0``, in units of x.
        generator: source of the noise, on x's device; ``None`` is torch's default generator.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
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
        """The mean squared error of the expansion, 0-dim, ``>= 0``, differentiable by the model's parameters.

        Args:
            model: maps ``[B, ...]`` to logits ``[B, C]``.
            x: floating ``[B, ...]``, not requiring grad.
            target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``.
            x_adv: the point x + delta, shaped as x, in place of the noise.
            losses: the per-sample losses ``[B]`` at x with their graph, if the training step has them already: see
                ``losses_and_gradient``.
            grad: the gradient of their sum at x, shaped as x, with its graph; both or neither.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what was got.
            RuntimeError: if the model's output does not depend on x.
        """
        check_call(x, target, x_adv)
        if losses is None and grad is None:
            losses, grad = losses_and_gradient(model, x, target)
        else:
            losses, grad = given("losses", losses, x.shape[:1]), given("grad", grad, x.shape)
        point = self.second_point(x, x_adv)
        # The difference of the points, as the sum that made the second one was rounded.
        rise = (widen(point - x) * widen(grad)).flatten(1).sum(dim=1)
        return (sample_losses(model, point, target) - losses - rise).square().mean()
