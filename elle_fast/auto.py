"""ELLE-A whose weight follows from the history of E_lin: no lam to tune."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.host_copy import HostCopy
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.ops.elle_loss import reference

_positive = partial(checks.real, low=0, low_allowed=False)

RHO = 50.0
_HIGHEST = 1e6


class AutoLambda(AdaptiveLambda):
    r"""ELLE-A (:class:`AdaptiveLambda`) without a lam to choose: ``ELLELoss(eps, lam="auto")``.

    Where E_lin rises above the detector's threshold ``t = mean(h) + sensitivity * std(h)``, lam becomes

    .. math::
        min(lam_{max},\; rho / (2 \sqrt{t}))

    instead of lam_max; all else is as there. The weight is free of the loss' scale. The slope of ``lam r^2`` in a
    residual r is ``2 lam r``, that of the cross-entropy in a loss is 1: so at a residual with ``r^2 = t`` E_lin's slope
    is rho times the cross-entropy's, and at a detection, whose ``E_lin > t``, its root mean square over the batch is
    above that. In the logits the ratio is some 1.3 times as large (``sqrt(1 + 2/3)``, as x_a and x_b have the weights
    ``1 - alpha`` and ``alpha``), since both gradients have the factor ``|softmax - onehot|``.

    lam does not run away: it depends on the threshold, of which the mean falls no faster than 1 / steps and the
    deviation no faster than its root, and not on E_lin itself, which a larger lam makes smaller. Nor does the weight
    fall in the step in which FGSM collapses, since the threshold is that of the steps before.

    E_lin grows like eps^4, so that a history from an eps that was smaller asks for too large a weight: where eps is
    warmed up, call :meth:`restart` when it is full (``elle-fast train`` does).

    One rho is meant for all data; benchmarks/results/auto_lam.json has where it was tried, and what else was.
    It is for ``penalty="squared"``, and the threshold is estimated as without it, so ``window``, ``triplets`` and
    ``triplet_fraction`` matter as they do there. :meth:`update` is a chain of torch operators, not one launch.

    Args:
        rho: ``> 0``.
        lam_max: the highest lam, ``> 0``: where E_lin is little more than rounding, rho would ask for more.
        gamma, sensitivity, min_history, window, process_group: those of :class:`AdaptiveLambda`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    _changeable = dict.fromkeys(("rho", "lam_max"), _positive)
    fused = False

    def __init__(
        self,
        rho: float = RHO,
        lam_max: float = _HIGHEST,
        gamma: float = 0.99,
        sensitivity: float = 2.0,
        min_history: int = 3,
        window: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(_positive("lam_max", lam_max), gamma, sensitivity, min_history, window, process_group)
        self.rho = rho

    @torch.no_grad()
    def weight(self) -> Tensor:
        """What lam becomes at a detection in the next step, 0-dim, in the history's dtype."""
        mean, std = self.moments()
        return self._at(mean + self.sensitivity * std)

    def _at(self, threshold: Tensor) -> Tensor:
        # A threshold of 0, of a history of zeros, gives infinity, and so lam_max.
        return (0.5 * self.rho * threshold.rsqrt()).clamp(max=self.lam_max)

    def _moved(self, e_lin: Tensor, state: list[Tensor], backend: str) -> Tensor:
        return reference.update_lam(e_lin, state, self.numbers, weight=self._at)

    def send_to_host(self) -> None:
        """Start copying lam's part of :meth:`weight` to the host."""
        sent = HostCopy.start(self._part())
        self._sent = None if sent is None else sent._replace(tensor=self.lam, version=self.lam._version)

    def on_host(self) -> float:
        """That part as a number: from the copy, or from the device if lam changed since."""
        sent = self._sent
        return self._part().item() if sent is None or not sent.holds(self.lam) else sent.item()

    def at_most(self, part: float) -> bool:
        """Whether lam is at most this part of what a detection would set now."""
        return self.on_host() <= part

    def _part(self) -> Tensor:
        return (self.lam / self.weight()).clamp(max=1)  # the threshold may have risen since the detection

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's numbers, as they are now."""
        options = super().options
        return {"rho": self.rho, "lam_max": options.pop("lam"), **options}


def controller_of(lam: float | str | AdaptiveLambda, adaptive: bool, penalty: str) -> AdaptiveLambda | None:
    """What moves the weight that ``lam`` stands for: a number, ``"auto"`` or a controller; ``None`` if nothing does.

    Raises:
        TypeError, ValueError: for another ``lam``, or a ``penalty`` that it is not for.
    """
    if isinstance(lam, str):
        if lam != "auto":
            raise ValueError(f"lam: expected a number >= 0, 'auto' or an AdaptiveLambda, got {checks.shown(lam)}")
        lam = AutoLambda()
    if isinstance(lam, AutoLambda) and penalty != "squared":
        raise ValueError(f"lam: 'auto' is the slope of a square; expected penalty='squared' beside it, got {penalty!r}")
    if isinstance(lam, AdaptiveLambda):
        return lam
    return AdaptiveLambda(lam) if adaptive else None
