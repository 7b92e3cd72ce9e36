"""GAT and NuAT: the clean loss, a penalty on the change of the outputs, and an attack that the penalty guides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Counting, Kept, projected, within
from elle_fast.regularizers import GAT, NuAT


class Guided(Counting):
    r"""GAT and NuAT (Sriramanan et al. 2020, arXiv 2011.14969; 2021), for each its own regulariser R.

    .. math::
        mean_i\, L(f(x_i), y_i) + w \cdot R(f(x), f(x_{adv}))

    The attack begins at x plus a noise of ``+- eps / 2``, each sign with probability 1/2, takes one step of eps along
    the sign of the gradient of the mean cross-entropy plus, in every other step, w R with f(x) held fixed, and projects
    to the eps ball. f(x) is one forward pass for the guide and the loss; the authors' code has another one for the
    guide, and the attack in eval mode, where here the model is called as it is. Their GAT also multiplies w by 4 for
    the last of its 100 epochs, which the ELLE paper does not mention and is not here.

    Args:
        regularizer: R.
        eps: radius of the linf ball, in units of x.
        weight: w, ``>= 0``; the highest, with ``ramp``.
        ramp: training steps in which w grows linearly from 0 to ``weight``; ``None``: it is constant.
        bounds: range to which every point is clamped; ``None`` clamps nothing.
    """

    def __init__(
        self, regularizer: GAT | NuAT, eps: float, weight: float, *, ramp: int | None = None, bounds: Bounds = None
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.eps = checks.real("eps", eps, low=0)
        self.weight = checks.real("lam", weight, low=0)
        self.ramp = None if ramp is None else checks.integer("ramp", ramp, low=1)
        self.bounds = checks.bounds(bounds)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        inner, step = unwrapped(model), self._next(x)
        weight = self.weight if self.ramp is None else self.weight * min(1.0, step / self.ramp)
        logits = model(x)
        x_adv = self._attack(inner, x, target, logits.detach(), weight if step % 2 == 0 else 0.0)
        ce = F.cross_entropy(logits, target)
        seen = Kept(inner)
        penalty = self.regularizer(seen, x, target, x_adv=x_adv, logits=logits)
        return self._record(ce + weight * penalty, output=seen.output, ce=ce, penalty=penalty)

    def _attack(self, model: Model, x: Tensor, target: Tensor, logits: Tensor, weight: float) -> Tensor:
        noise = torch.randint_like(x, 2).mul_(2).sub_(1)
        start = within(x + 0.5 * self.eps * noise, self.bounds).requires_grad_()
        with torch.enable_grad():
            output = model(start)
            loss = F.cross_entropy(output, target)
            if weight > 0:
                loss = loss + weight * self.regularizer.from_logits(logits, output)
            (grad,) = torch.autograd.grad(loss, start)
        return projected(start.detach() + self.eps * grad.sign(), x, self.eps, self.bounds)
