"""Fast-BAT: the attack's answer to a change of the weights is part of the gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from elle_fast import attacks, functional
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Bounds, Criterion, Method
from elle_fast.regularizers import losses_and_gradient

# The authors' step sizes, along the gradient itself and not its sign, for pixels in [0, 1]: up to eps 8/255, and above.
_STEP_SIZE, _STEP_SIZE_LARGE_EPS, _LARGE_EPS = 5000 / 255, 2000 / 255, 8 / 255


class FastBAT(Criterion):
    r"""Fast bi-level adversarial training (Zhang et al. 2022, arXiv 2112.12376).

    From a uniform start two projected steps along the gradient make delta, then delta*. With g the gradient at
    delta, the lower level is linear in its argument plus (lam / 2) of its squared distance, so that the solution's
    derivative with respect to the weights is that of g over lam where no constraint is active:

    .. math::
        \nabla L(x + \delta^*) + \frac{1}{lam} \nabla_\theta \, mean_i \langle g_i(\theta), h_i \circ
        \nabla_{\delta} L(x_i + \delta^*_i) \rangle

    h is 1 where delta* is strictly inside the ball and the range, else 0. The value of the loss is the first term's;
    the second one is in its gradient only. Departure from the authors' code: one pass at delta* serves both terms,
    where theirs takes two. As there, the step sizes do not follow from lam.

    Args:
        lam: of the lower level, ``> 0``.
    """

    _changeable = {  # noqa: RUF012
        "lam": partial(checks.real, low=0, low_allowed=False),
        "step_size": partial(checks.real, low=0),
    }

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, bounds)
        self.lam = lam
        self.step_size = _STEP_SIZE if eps <= _LARGE_EPS else _STEP_SIZE_LARGE_EPS

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        lowest, highest = self._within(x - self.eps), self._within(x + self.eps)
        start = functional.random_start(x, self.eps, seed=functional.draw_seed(x.device, None), bounds=self.bounds)
        point = start + self.step_size * attacks.input_gradient(inner, start, target)
        point = point.clamp(lowest, highest)
        _, grad = losses_and_gradient(model, point, target)
        ahead = point + self.step_size * grad.detach()
        free = (ahead > lowest) & (ahead < highest)
        with torch.enable_grad():
            solution = attacks.leaf(ahead.clamp(lowest, highest))
            logits = output_at(inner, solution)
            losses = attacks.sample_losses(logits, target, None, x.shape[0])
            (outer,) = torch.autograd.grad(losses.sum(), solution, retain_graph=True)
        response = (grad * torch.where(free, outer, 0.0)).sum() / (self.lam * x.shape[0])
        return self._record(self._ce(logits, target) + (response - response.detach()), logits)


_ABOUT = "bi-level step, its lower level linearised"
ROWS = {"fast-bat": Method(_ABOUT, "2112.12376", "3F 3G 1B D", 12, FastBAT, takes=("lam",))}
