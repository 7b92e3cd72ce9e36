"""SSAT: the shortest part of the perturbation that deceives the model."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast import functional
from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import WITHOUT_WEIGHT, Bounds, Criterion, Method, logits_and_gradient
from elle_fast.methods.kept import class_of

_STEP = 1.25  # in units of eps: the authors' 10/255 at 8/255


class SSAT(Criterion):
    r"""Single-step adversarial training with checkpoints (Kim, Lee and Lee 2021, arXiv 2010.01799, Algorithm 1).

    With delta the perturbation of RS-FGSM (a uniform start, a step of 1.25 eps, projected), the loss is the mean
    cross-entropy at

    .. math::
        x + \frac{k}{c} \delta, \qquad k = \min \{ j \in 1..c-1 : f(x + \tfrac{j}{c} \delta) \text{ is wrong} \}

    or k = c if there is none; and k = 0 if the model is wrong at the attack's start already. As in the authors' code,
    the checkpoints ``j / c`` are looked at in eval mode. Departure: at all of them for every sample, so that nothing
    waits for the device; theirs stops where a sample is decided.

    Args:
        checkpoints: c, ``>= 1``; with 1 it is RS-FGSM that leaves samples alone on which the model is wrong.
    """

    _fixed = ("checkpoints",)
    _elsewhere = WITHOUT_WEIGHT

    def __init__(self, eps: float, bounds: Bounds = None, checkpoints: int = 3) -> None:
        super().__init__(eps, bounds)
        self.checkpoints = checks.integer("checkpoints", checkpoints, low=1)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        start = functional.random_start(x, self.eps, seed=functional.draw_seed(x.device, None), bounds=self.bounds)
        logits, grad = logits_and_gradient(inner, start, target)
        label = class_of(target)
        chosen = self._projected(start + _STEP * self.eps * grad.sign(), x)
        delta = chosen - x
        with torch.no_grad(), in_eval_mode(inner):
            for j in reversed(range(1, self.checkpoints)):
                point = x + j / self.checkpoints * delta
                chosen = _where(_wrong(output_at(inner, point), label), point, chosen)
        logits_adv = model(_where(_wrong(logits, label), x, chosen))
        return self._record(self._ce(logits_adv, target), logits_adv)


def _wrong(logits: Tensor, label: Tensor) -> Tensor:
    return logits.detach().argmax(dim=1) != label


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(condition.view(-1, *[1] * (one.dim() - 1)), one, other)


ROWS = {"ssat": Method("the shortest part of RS-FGSM's step that deceives", "2010.01799", "4F 1G 1B", 7, SSAT)}
