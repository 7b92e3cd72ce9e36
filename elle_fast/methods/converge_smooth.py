"""ConvergeSmooth: a loss that moves from one epoch to the next by more than a little is held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.functional import draw_seed, random_start
from elle_fast.methods.base import Bounds, Method, Penalized, logits_and_gradient
from elle_fast.methods.counting import CountsSteps
from elle_fast.methods.prior_guided import PriorGuided
from elle_fast.methods.sample_table import averaged


class Convergence(nn.Module):
    r"""ConvergeSmooth's constraint (Zhao et al. 2023, arXiv 2308.12857) on a loss l that is not the attacked one.

    .. math::
        |l - \bar l| \text{ if it is above } gamma, \text{ else } 0

    with ``l-`` the mean of l over the epoch before. Training then also lowers l where it has risen, and raises it where
    it has fallen. The constraint rests in the first two epochs, and in the epochs next to a drop of the learning rate
    or to the end: there the loss is to move (the authors' code, with its stride of 1).

    Departures: their code adds ``+- l``, which has the same gradient. It takes ``min(max(gamma / ratio, l- - l--),
    gamma)`` for gamma, with a ratio of 1, and so gamma. The paper's centralization of weights is not in it.

    Mean, count and the mean before are part of ``state_dict``. With several processes l is averaged over them.

    Args:
        epoch_steps: training steps of an epoch, ``>= 1``.
        steps: those of the whole run; ``None``: its end is not known.
        gamma: ``>= 0``: 0.03 in the authors' code.
        stages: epochs, from 0, that begin with a lower learning rate than the one before.
    """

    def __init__(self, epoch_steps: int, steps: int | None, gamma: float, stages: Sequence[int]) -> None:
        super().__init__()
        self.epoch_steps = checks.integer("epoch_steps", epoch_steps, low=1)
        self.gamma = checks.real("gamma", gamma, low=0)
        last = float("inf") if steps is None else checks.integer("steps", steps, low=1) // self.epoch_steps
        drops = [checks.integer("stages", epoch, low=1) for epoch in stages]
        self.phases = tuple(zip((0, *drops), (*drops, last), strict=True))
        self.seen = torch.zeros(3, device="cpu")  # the epoch's mean so far, its samples, the mean of the epoch before

    def constrains(self, epoch: int) -> bool:
        """Whether the constraint holds in an epoch, from 0."""
        return any(first + 1 < epoch < last - 1 for first, last in self.phases)

    def begin(self, done: int) -> None:
        """After the last step of an epoch its mean becomes that of the epoch before; called again, it stays so."""
        if done % self.epoch_steps == 0:
            mean, count, _ = self.seen
            self.seen = torch.where(count > 0, torch.stack([0 * mean, 0 * mean, mean]), self.seen)

    def penalty(self, loss: Tensor, samples: int, done: int, updates: bool) -> Tensor:
        """The constraint on this step's ``loss``, the mean of ``samples``, after ``done`` steps and :meth:`begin`."""
        mean, count, before = self.seen.to(loss.device, loss.dtype).unbind()
        value = averaged(loss.detach()) if updates else loss.detach()  # one process may evaluate alone
        direction = (value - before).sign() * ((value - before).abs() > self.gamma)
        if not self.constrains(done // self.epoch_steps):
            direction = torch.zeros_like(direction)
        if updates:
            finite = value.isfinite()
            count = count + samples * finite
            mean = mean + torch.where(finite, value - mean, 0.0) * samples / count.clamp_min(1)
            self.seen = torch.stack([mean, count, before])
        return direction * (loss - before)

    def get_extra_state(self) -> Tensor:
        """Mean, count and the mean before, for ``state_dict``."""
        return self.seen

    def set_extra_state(self, state: Tensor) -> None:
        """Mean, count and the mean before, from ``load_state_dict``."""
        if not isinstance(state, Tensor) or state.shape != (3,):
            raise ValueError(f"criterion: expected ConvergeSmooth's 3 numbers, got {checks.describe(state)}")
        self.seen = state.clone()


class RandomStartSmooth(CountsSteps, Penalized):
    r"""FGSM-RS with ConvergeSmooth: ``mean L(f(x_adv), y) + lam * Convergence(mean L(f(x_0), y))``.

    x_0 is uniform in the eps ball around x and ``x_adv = x_0 + eps sign(g)``, with g the gradient at x_0. As in the
    authors' code, and unlike ``rs-fgsm``, x_adv is not projected back and so within 2 eps of x. Their code takes the
    same forward pass at x_0 twice; here it serves attack and constraint. See :class:`Convergence`.

    Args:
        eps, bounds: see :class:`Criterion`.
        lam: weight of the constraint, ``>= 0``: 1 in the authors' code.
        epoch_steps, steps, gamma, stages: those of :class:`Convergence`.
    """

    _fixed: ClassVar[Collection[str]] = ("convergence",)
    _elsewhere = dict.fromkeys(("epoch_steps", "steps", "gamma", "stages"), "build another one")

    def __init__(
        self,
        eps: float,
        lam: float,
        epoch_steps: int,
        bounds: Bounds = None,
        steps: int | None = None,
        *,
        gamma: float = 0.03,
        stages: Sequence[int] = (),
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.convergence = Convergence(epoch_steps, steps, gamma, stages)

    def prepare(self, model: Model, x: Tensor) -> None:
        """Begin an epoch."""
        if self.updates(model):
            ddp.refuse_join(model, "ConvergeSmooth, which averages a loss")
            self.convergence.begin(self._done)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        self.prepare(model, x)
        updates, done = self.updates(model), self._count(model, x)
        start = random_start(x, self.eps, seed=draw_seed(x.device), bounds=self.bounds)
        logits, grad = logits_and_gradient(model, start, target)
        logits_adv = self._logits(inner(self._ascended(start, grad)), target)
        penalty = self.convergence.penalty(self._ce(logits, target), x.shape[0], done, updates)
        return self._sum(model, self._ce(logits_adv, target), penalty, logits_adv)


class PriorGuidedSmooth(PriorGuided):
    r"""FGSM-MEP with ConvergeSmooth: ``mean L(f(x_adv), y) + lam * Convergence(mean L(f(x), y))``.

    The attack and what is kept for each sample are those of :class:`PriorGuided`, whose penalty is not there (an option
    of the authors' code that is off). See :class:`Convergence`.

    Args:
        eps, samples, bounds, options: those of :class:`PriorGuided`.
        lam: weight of the constraint, ``>= 0``: 1 in the authors' code.
        epoch_steps, steps, gamma, stages: those of :class:`Convergence`.
    """

    _fixed: ClassVar[Collection[str]] = ("convergence",)
    _elsewhere = dict.fromkeys(("steps", "gamma", "stages"), "build another one")

    def __init__(
        self,
        eps: float,
        lam: float,
        samples: int,
        epoch_steps: int,
        bounds: Bounds = None,
        steps: int | None = None,
        *,
        gamma: float = 0.03,
        stages: Sequence[int] = (),
        **options: Any,
    ) -> None:
        super().__init__(eps, lam, samples, bounds, epoch_steps, **options)
        self.convergence = Convergence(epoch_steps, steps, gamma, stages)

    def prepare(self, model: Model, x: Tensor) -> None:
        """Begin an epoch, and eta anew where it does."""
        super().prepare(model, x)
        if self.updates(model):
            self.convergence.begin(self._done)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        prior = self._prior(model, x)
        grad = attacks.input_gradient(inner, self._within(x + prior.delta), target)
        x_adv = self._reached(x, prior.delta, grad)
        self._remember(prior, x, x_adv, grad)
        logits_adv = self._logits(model(x_adv), target)
        loss = self._ce(output_at(inner, x), target)
        penalty = self.convergence.penalty(loss, x.shape[0], prior.done, self.updates(model))
        return self._sum(model, self._ce(logits_adv, target), penalty, logits_adv)


_SMOOTH = "+ lam |change from last epoch|"
ROWS = {
    "rs-cs": Method(
        f"eps from a uniform start {_SMOOTH}",
        "2308.12857",
        "2F 1G 2B",
        7,
        RandomStartSmooth,
        ("lam", "epoch_steps", "steps"),
    ),
    "mep-cs": Method(
        f"pgi's points {_SMOOTH}",
        "2308.12857",
        "3F 1G 2B",
        8,
        PriorGuidedSmooth,
        ("lam", "samples", "epoch_steps", "steps"),
    ),
}
