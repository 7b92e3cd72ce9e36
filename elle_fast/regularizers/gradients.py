"""GradAlign, CURE and LLR: the loss should be locally linear, by double backpropagation."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from elle_fast import attacks, functional
from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast._core.options import Options
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.attacks import losses_and_gradient
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import given


class Noisy(Options, nn.Module):
    """Base class of regularisers whose second point is x + U[-eps, eps]^d.

    Args:
        eps: half-width of the noise, ``>= 0``, in units of x.
        generator: source of the noise, on x's device; ``None`` is torch's default generator.
    """

    _changeable = {  # noqa: RUF012
        "eps": partial(checks.real, low=0),
        "generator": lambda _, value: checks.generator(value),
    }

    def __init__(self, eps: float, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.eps, self.generator = eps, generator

    def second_point(self, x: Tensor, x_adv: Tensor | None) -> Tensor:
        """``x_adv``, or else x + U[-eps, eps]^d."""
        if x_adv is not None:
            return x_adv
        return functional.random_start(x, self.eps, seed=functional.draw_seed(x.device, self.generator))

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"eps={self.eps:g}"


class GradAlign(Noisy):
    r"""Gradient misalignment (Andriushchenko and Flammarion 2020, arXiv 2007.02617; the ELLE paper's Eq. 5).

    .. math::
        1 - mean_i \cos(\nabla_x L(x_i), \nabla_x L(x_i + \eta_i)), \qquad \eta \sim U[-eps, eps]^d

    The value is in ``[0, 2]``. As in its authors' code, the gradient at x is detached, and samples of which either
    gradient is zero are left out of the mean (no sample left: 0). Departure: they are left out by a weight of 0 and not
    by an index, so that nothing waits for the device.

    Costs 2 forward passes, 2 input gradients (one of each less with ``grad``) and a double backward: 8 units (6).

    Args: those of :class:`Noisy`.
    """

    def forward(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None, grad: Tensor | None = None
    ) -> Tensor:
        """The misalignment of the gradients at x and at ``x_adv``, or else x plus noise.

        Args:
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`.
            grad: the loss' gradient at x, shaped as x and of any scale, if the attack has it already. No graph.
        """
        attacks.check_batch(x, target, x_adv=x_adv)
        grad = attacks.input_gradient(model, x, target) if grad is None else checks.like("grad", grad, x)
        _, grad_adv = losses_and_gradient(model, self.second_point(x, x_adv), target)
        cosine, kept = _cosine(grad, grad_adv)
        # In a batch of zero gradients there is nothing to align: 0, not 0 / 0.
        return ((1 - cosine) * kept).sum() / kept.sum().clamp(min=1)


class CURE(Options, nn.Module):
    r"""Curvature regularisation (Moosavi-Dezfooli et al. 2019, arXiv 1811.09716; the ELLE paper, section 3.3).

    With g the gradient with respect to x of the batch's mean loss, so that a sample's part of it is 1 / B of that of
    its own loss, ``form="original"`` is that paper's and its code's:

    .. math::
        mean_i \|g(x + h z)_i - g(x)_i\|_2, \qquad z_i = \operatorname{sign}(g_i) / \|\operatorname{sign}(g_i)\|_2

    in eval mode, into which modules are put for it. ``form="elle"`` is that of the ELLE authors' code, with x_fgsm as
    ``x_adv``, the model in its own mode and no gradient through the first term:

    .. math::
        mean_i \|g(x_{adv})_i - g(x)_i\|_2^2

    Each process takes the mean over its own share of the batch, so n processes give ``"original"`` n times and
    ``"elle"`` n^2 times the weight that one process would.

    Costs 2 forward passes, 2 input gradients (one of each less with ``grad``, and with ``grad_adv``) and a double
    backward: 12 units (10 and 8). ``"elle"`` has a graph of one gradient: 8 units (6 and 4).

    Args:
        h: distance of the second point from x in the 2-norm, ``> 0``, in units of x. Of ``"original"``.
        form: ``"original"`` or ``"elle"``.
    """

    _changeable = {"h": partial(checks.real, low=0, low_allowed=False)}  # noqa: RUF012

    def __init__(self, h: float = 3.0, form: str = "original") -> None:
        super().__init__()
        self.h = h
        self.form = checks.choice("form", form, ("original", "elle"))

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
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`. ``"elle"`` needs ``x_adv``.
            grad: the gradient of the **summed** losses at x, shaped as x, with its graph (``"elle"``: or without), if
                the training step has it already: see ``losses_and_gradient``.
            grad_adv: the same at ``x_adv``, with its graph; ``x_adv`` must be given too.
        """
        attacks.check_batch(x, target, x_adv=x_adv)
        original = self.form == "original"
        if x_adv is None and not original:
            raise ValueError("x_adv: expected the points of FGSM with form='elle', got None")
        if grad_adv is not None and x_adv is None:
            raise ValueError("grad_adv: expected None without x_adv, got a gradient")
        with in_eval_mode(model) if original else nullcontext():
            if not original:
                grad = attacks.input_gradient(model, x, target) if grad is None else checks.like("grad", grad, x)
                grad = grad.detach()
            elif grad is None:
                _, grad = losses_and_gradient(model, x, target)
            else:
                grad = given("grad", grad, x.shape)
            if grad_adv is None:
                _, grad_adv = losses_and_gradient(model, self._ahead(x, grad) if x_adv is None else x_adv, target)
            else:
                grad_adv = given("grad_adv", grad_adv, x.shape)
        change = widen(grad_adv - grad).flatten(1) / x.shape[0]
        if not original:
            return change.square().sum(dim=1).mean()
        # At a difference of 0 torch takes 0 of the norm's subgradients.
        norms: Tensor = torch.linalg.vector_norm(change, dim=1)
        return norms.mean()

    def _ahead(self, x: Tensor, grad: Tensor) -> Tensor:
        """``x + h z``; x where the gradient is zero."""
        sign = grad.detach().sign().flatten(1)
        # Its squared length is the number of entries that are not 0.
        length = sign.count_nonzero(dim=1).clamp(min=1).to(sign.dtype).sqrt()
        return x + self.h * (sign / length[:, None]).view_as(x)

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"h={self.h:g}, form={self.form!r}"


class LLR(Noisy):
    r"""Local linearity regularisation (Qin et al. 2019, arXiv 1907.02610) in the form of the ELLE paper, section 4.3.

    .. math::
        mean_i [L(x_0 + \delta_i) - L(x_0) - \delta_i \cdot \nabla_x L(x_0)]^2

    with ``x_0 = x_i`` and ``x_0 + delta`` uniform in the ball, as the paper prints it; or, with ``expand_at="noise"``,
    both uniform in the ball around x_i, as its authors' code does. Every gradient is that of the sample's own loss:
    that code subtracts the directional derivative of the batch's mean loss, B times too small, so that its value is
    not zero for a linear loss; this is the formula. Qin et al. take the worst delta in the ball and add a term for the
    gradient: pass the point as ``x_adv``; the term is not here.

    Costs 2 forward passes, an input gradient (one of each less with ``losses`` and ``grad``) and a double backward:
    9 units (7).

    Args:
        eps, generator: those of :class:`Noisy`.
        expand_at: ``"x"`` or ``"noise"``.
    """

    def __init__(self, eps: float, *, expand_at: str = "x", generator: torch.Generator | None = None) -> None:
        super().__init__(eps, generator=generator)
        self.expand_at = checks.choice("expand_at", expand_at, ("x", "noise"))

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        losses: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> Tensor:
        """The mean squared error of the expansion, at ``x_adv``, or else at x plus noise.

        Args:
            model, x, target, x_adv: see :mod:`elle_fast.regularizers`.
            losses: the per-sample losses ``[B]`` at x with their graph, if the training step has them already: see
                ``losses_and_gradient``. Not with ``expand_at="noise"``, which does not look at x itself.
            grad: the gradient of their sum at x, shaped as x, with its graph; both or neither.
        """
        attacks.check_batch(x, target, x_adv=x_adv)
        first = x if self.expand_at == "x" else self.second_point(x, None)
        if losses is None and grad is None:
            losses, grad = losses_and_gradient(model, first, target)
        elif self.expand_at == "noise":
            raise ValueError("losses, grad: expected None with expand_at='noise', got values at x")
        else:
            losses, grad = given("losses", losses, x.shape[:1]), given("grad", grad, x.shape)
        point = self.second_point(x, x_adv)
        # The difference of the points, as the sums that made them were rounded.
        rise = (widen(point - first) * widen(grad)).flatten(1).sum(dim=1)
        after = attacks.sample_losses(output_at(model, point), target, None, x.shape[0])
        return (after - losses - rise).square().mean()

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"{super().extra_repr()}, expand_at={self.expand_at!r}"


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
