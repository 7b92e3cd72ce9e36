"""Forms of ELLE-A's weight without a tuned number, for auto_lam.py, which says what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elle_fast import AutoLambda
from elle_fast.ops.elle_loss import reference
from elle_fast.ops.elle_loss.validation import Linearity

_DECAY = 0.99


class Seen(NamedTuple):
    """What a step shows before lam is known: 0-dim each."""

    ce: Tensor
    e_lin: Tensor
    g_ce: Tensor
    g_e: Tensor


class Form(AutoLambda):
    """A weight that depends on more than the history."""

    def __init__(self, rho: float) -> None:
        super().__init__(rho, lam_max=1e8)
        self.ratio = torch.zeros(())

    def see(self, seen: Seen, threshold: Tensor) -> None:
        """Set the ratio, of which the weight is rho times."""
        raise NotImplementedError

    def _at(self, threshold: Tensor) -> Tensor:
        return (self.rho * self.ratio).clamp(max=self.lam_max).double()


class _Smoothed(Form):
    def __init__(self, rho: float) -> None:
        super().__init__(rho)
        self.healthy, self.mean_log = torch.zeros(()), torch.zeros(())

    def see(self, seen: Seen, threshold: Tensor) -> None:
        keep = ((seen.e_lin <= threshold) | (self.count < self.min_history)) & seen.e_lin.isfinite()
        self.healthy = self.healthy + keep
        part = torch.clamp(1 / self.healthy, min=1 - _DECAY)
        log = self.now(seen).log()
        self.mean_log = torch.where(keep, self.mean_log + part * (log - self.mean_log), self.mean_log)
        self.ratio = self.mean_log.exp()

    def now(self, seen: Seen) -> Tensor:
        """The ratio of this step alone."""
        raise NotImplementedError


class Gradient(_Smoothed):
    """``rho ~(|g_ce| / |g_E|)``."""

    def now(self, seen: Seen) -> Tensor:
        """The ratio of this step alone."""
        return seen.g_ce / seen.g_e


class Penalty(_Smoothed):
    """``rho ~(ce / E_lin)``."""

    def now(self, seen: Seen) -> Tensor:
        """The ratio of this step alone."""
        return seen.ce / seen.e_lin


class Threshold(Form):
    """``rho ce / t``."""

    def see(self, seen: Seen, threshold: Tensor) -> None:
        """Set the ratio."""
        self.ratio = seen.ce / threshold


class GradientThreshold(Form):
    """``rho |g_ce| / |g_E| sqrt(E_lin / t)``."""

    def see(self, seen: Seen, threshold: Tensor) -> None:
        """Set the ratio."""
        self.ratio = seen.g_ce / seen.g_e * (seen.e_lin / threshold).sqrt()


FORMS: dict[str, Callable[[float], AutoLambda]] = {
    "slope": AutoLambda,
    "gradient": Gradient,
    "penalty": Penalty,
    "threshold": Threshold,
    "gradient-threshold": GradientThreshold,
}


def measuring(
    rows: Tensor, target: Tensor, alpha: Tensor, lam: Any, options: Linearity, backend: str, *, then: Callable[..., Any]
) -> Any:
    """ELLELoss's own sum of the two terms, after a look at each of them by a controller that wants one."""
    if isinstance(lam, Form):
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            ce, e_lin = reference.elle_loss(leaf, target, alpha, options)
            norms = [torch.autograd.grad(term, leaf, retain_graph=True)[0].norm() for term in (ce, e_lin)]
        mean, std = lam.moments()
        with torch.no_grad():
            lam.see(Seen(ce.detach(), e_lin.detach(), *norms), mean + lam.sensitivity * std)
    return then(rows, target, alpha, lam, options, backend)
