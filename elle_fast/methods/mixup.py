"""Adversarial vertex mixup with one attack step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.criterion import TrainingLoss
from elle_fast.loss import ELLELoss
from elle_fast.methods.base import TAKES_CLASSES, Bounds, Criterion, Method
from elle_fast.passes import parts_of
from elle_fast.ranges import ANY

_GAMMA, _SMOOTHING_CLEAN, _SMOOTHING_VERTEX = 2.0, 1.0, 0.1


class AdvMixUpSingle(Criterion):
    r"""Single-step adversarial vertex mixup (Lee et al. 2020, arXiv 2003.02484; the ELLE paper, appendix B.13).

    With delta one step of eps from a uniform start in the eps ball, projected back, and beta from U[0, 1] per sample,

    .. math::
        x_v = x + 2 \delta, \quad \hat x = \beta x + (1 - \beta) x_v, \quad
        \hat y = \beta \phi(y, 1) + (1 - \beta) \phi(y, 0.1)

    where phi(y, s) has probability s at y and shares the rest among the other classes. The loss is the mean
    cross-entropy of f(x^) to the probabilities y^. x^ is within 2 eps of x. ``target`` is int64 ``[B]``.

    Args:
        elle: adds E_lin, of which y^ is the target too; takes x^ as x_adv.
    """

    _elsewhere = {name: f"set elle.{name}" for name in ("lam", "controller", "max_ratio")}  # noqa: RUF012

    def __init__(self, eps: float, bounds: Bounds = None, elle: ELLELoss | None = None) -> None:
        super().__init__(eps, bounds)
        self.elle = elle

    @property
    def stats(self) -> dict[str, Tensor]:
        """Those of ELLE, where it is there."""
        return super().stats if self.elle is None else self.elle.stats

    @property
    def output(self) -> Tensor | None:
        """That of ELLE, where it is there."""
        return super().output if self.elle is None else self.elle.output

    @property
    def core(self) -> TrainingLoss:
        """ELLE, where it is there."""
        return self if self.elle is None else self.elle

    @property
    def label_smoothing(self) -> float:
        """That of the criterion that has the loss; it may be set."""
        return self._label_smoothing if self.core is self else self.core.label_smoothing

    @label_smoothing.setter
    def label_smoothing(self, value: float) -> None:
        self._label_smoothing = value
        if getattr(self, "elle", None) is not None:
            self.core.label_smoothing = value

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        if target.dim() != 1:
            raise ValueError(f"target: expected int64 class indices [{x.shape[0]}], got {checks.describe(target)}")
        classes = 0

        def losses(output: Tensor, target: Tensor) -> Tensor:
            nonlocal classes
            found = attacks.sample_losses(output, target, None, x.shape[0])
            classes = output.shape[-1]
            return found

        bounds = self.bounds or ANY  # what x is has been looked at
        x_adv = attacks.rs_fgsm(inner, x, target, self.eps, step_size=self.eps, bounds=bounds, loss_fn=losses)
        vertex = self._within(x + _GAMMA * (x_adv - x))
        beta = torch.rand(x.shape[0], device=x.device, dtype=x.dtype)
        mixed = vertex + beta.view(-1, *[1] * (x.dim() - 1)) * (x - vertex)
        soft = _smoothed(target, beta * _SMOOTHING_CLEAN + (1 - beta) * _SMOOTHING_VERTEX, classes)
        if self.elle is not None:
            model, kwargs = parts_of(model)  # the triplets have other rows
            loss: Tensor = self.elle(model, x, soft, x_adv=mixed, model_kwargs=kwargs)
            return loss
        logits = model(mixed)
        return self._record(self._ce(logits, soft), logits)


def _smoothed(target: Tensor, probability: Tensor, classes: int) -> Tensor:
    """``[B, classes]``: ``probability [B]`` at the target, and what is left in equal parts at the others.

    It is linear in the probability, so that a mixture of smoothed targets is the target of the mixed probability.
    """
    rest = (1 - probability) / max(1, classes - 1)
    return rest[:, None].repeat(1, classes).scatter_(1, target[:, None], probability[:, None])


def _with_elle(*, eps: float, lam: float, bounds: Bounds, clamp: str = "all", **options: Any) -> AdvMixUpSingle:
    own = bounds if bounds is None or clamp in ("all", "attack") else ANY
    return AdvMixUpSingle(eps, own, ELLELoss(eps, lam, bounds=bounds, clamp=clamp, **options))


_ABOUT = "soft-label mixture of x and x + 2 delta"
_WITH_ELLE: dict[str, Any] = {
    "with_elle": _with_elle,
    "refuses": {"norm": "attacks in linf", "soft_targets": TAKES_CLASSES},
}
ROWS = {"advmixup-single": Method(_ABOUT, "2003.02484", "2F 1G 1B", 5, AdvMixUpSingle, **_WITH_ELLE)}
