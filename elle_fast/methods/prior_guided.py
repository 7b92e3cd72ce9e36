"""FGSM-PGI: the attack on a sample begins where that of the epoch before ended."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from elle_fast._core import checks, ddp
from elle_fast._core.unwrapping import Model
from elle_fast.data.placement import Samples
from elle_fast.methods.base import Bounds, Method, Penalized, logits_and_gradient
from elle_fast.methods.counting import CountsSteps
from elle_fast.methods.sample_table import SampleTable, averaged
from elle_fast.ops.elle_loss.reference import widen

# Perturbations are kept in int8, in units of eps / 127: -eps, 0 and eps are exact, others within eps / 254.
_UNITS = 127
_HALF = torch.finfo(torch.float16).max


class Prior(NamedTuple):
    """What an attack begins with.

    Attributes:
        delta: shaped as x.
        samples: those to be remembered; ``None`` if none are.
        done: the number of training steps before this one.
    """

    delta: Tensor
    samples: Samples | None
    done: int


class PriorGuided(CountsSteps, Penalized):
    r"""FGSM-PGI (Jia et al. 2022, arXiv 2207.08859), whose form with momentum is FGSM-MEP.

    With eta the perturbation that is kept for each training sample, of the epoch before, g the gradient of the loss at
    x + eta, and P the projection to the eps ball around x and to ``bounds``,

    .. math::
        x_{adv} &= P(x + \eta + eps \cdot sign(g)) \\
        m &\leftarrow decay \cdot m + g / \|g\|_1, \qquad \eta \leftarrow P(x + \eta + eps \cdot sign(m)) - x \\
        loss &= mean_i\, L(f(x_{adv,i}), y_i) + lam \cdot mean_{ik} (f_k(x_{adv,i}) - f_k(x_i + \eta_i))^2

    eta begins with ``+- eps``, each sign with probability 1/2, and so it does anew every ``reset_epochs`` epochs, when
    m is 0. Without ``decay`` (FGSM-EP) eta is ``x_adv - x`` of the epoch before.

    Departures: the norm of g over the batch is the mean of ``|g|``, which does not depend on the batch's size. x + eta
    is within ``bounds`` too, as in arXiv 2604.22853 and not in the authors' code. The attack's loss has no label
    smoothing, which theirs has (``label_smoothing=0.444`` is their 0.6). Their code gives the last, smaller part of an
    epoch a step too, and its file for Tiny-ImageNet keeps ``x_adv - x``, which is FGSM-EP. As there, eta is not moved
    along when an image is cropped and flipped anew, unless ``aligned``.

    Calls in training need ``samples``, the samples' places in the training set, ``int64 [B]``, or
    :class:`~elle_fast.data.Samples`; others may leave them out, and begin with random signs. What is kept is part of
    ``state_dict``, on the device of the batches: int8 eta and float16 m, 3 bytes a number, 9,216 a CIFAR image, 461 MB
    for 50,000 (FGSM-EP: 154 MB), 193 GB for eta of ImageNet at 224 pixels. All processes have all of it; see
    :class:`~elle_fast.methods.sample_table.SampleTable`. A step cannot be captured as a CUDA graph.

    Frozen calls begin with what is kept, and keep nothing. So freeze nothing with gradient accumulation, as each part
    has other samples: a part then counts as a step, also in ``epoch_steps``, and moves the lam of ELLE-A. With
    sharpness-aware minimisation the second call has the samples of the first, which has kept their new eta: it begins
    near the x_adv of the first call, not where that began.

    Args:
        eps, bounds: see :class:`Criterion`.
        lam: weight of the penalty, ``>= 0``.
        samples: their number in the training set, ``>= 1``.
        epoch_steps: training steps of an epoch; ``None``: eta never begins anew.
        reset_epochs: 40 for CIFAR-10 in the authors' code, 10 for CIFAR-100 and Tiny-ImageNet.
        decay: of the momentum, in ``[0, 1]``; ``None``: FGSM-EP.
        aligned: keep eta and m in the frame of the training images, and crop and flip them as the images of
            ``samples``.
    """

    per_sample = True
    _fixed: ClassVar[Collection[str]] = ("perturbations", "momenta")

    def __init__(
        self,
        eps: float,
        lam: float,
        samples: int,
        bounds: Bounds = None,
        epoch_steps: int | None = None,
        *,
        reset_epochs: int = 40,
        decay: float | None = 0.3,
        aligned: bool = False,
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.samples = checks.integer("samples", samples, low=1)
        self.epoch_steps = None if epoch_steps is None else checks.integer("epoch_steps", epoch_steps, low=1)
        self.reset_epochs = checks.integer("reset_epochs", reset_epochs, low=1)
        self.decay = None if decay is None else checks.real("decay", decay, low=0, high=1)
        self.aligned = checks.flag("aligned", aligned)
        self.perturbations = SampleTable(samples, torch.int8)
        self.momenta = None if decay is None else SampleTable(samples, torch.float16)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        prior = self._prior(model, x)
        logits, grad = logits_and_gradient(model, self._within(x + prior.delta), target)
        x_adv = self._reached(x, prior.delta, grad)
        logits_adv = self._logits(inner(x_adv), target)
        self._remember(prior, x, x_adv, grad)
        penalty = (widen(logits_adv) - widen(logits)).square().mean()
        return self._sum(model, self._ce(logits_adv, target), penalty, logits_adv)

    def prepare(self, model: Model, x: Tensor) -> None:
        """Begin anew, in the first step and every ``reset_epochs`` epochs."""
        if not self.updates(model):
            return
        ddp.refuse_join(model, f"{type(self).__name__}, which exchanges perturbations")
        done, period = self._done, (self.epoch_steps or 0) * self.reset_epochs
        if not self.perturbations.filled or done == 0 or (period and done % period == 0):
            self.perturbations.fill(x, _draw_signs)
            if self.momenta is not None:
                self.momenta.fill(x, Tensor.zero_)

    def _prior(self, model: Model, x: Tensor) -> Prior:
        """What is kept of a batch's samples; counts the step."""
        updates, table, given = self.updates(model), self.perturbations, None
        if self._samples is not None or self.trains(model):
            given = Samples.of(self._samples, x.shape[0], x.device)
        self.prepare(model, x)
        delta = torch.empty_like(x)
        if given is None or not table.filled:
            _draw_signs(delta)
        else:
            rows = table.read(given.index, x)
            delta.copy_(given.placed(rows) if self.aligned else rows)
        return Prior(delta.mul_(self.eps / _UNITS), given if updates else None, self._count(model, x))

    def _reached(self, x: Tensor, delta: Tensor, direction: Tensor) -> Tensor:
        """The point of one step of eps from ``x + delta`` along the signs, projected."""
        return self._within(x + (delta + self.eps * direction.sign()).clamp(-self.eps, self.eps))

    def _remember(self, prior: Prior, x: Tensor, x_adv: Tensor, grad: Tensor) -> None:
        """Keep where the next attack on these samples begins."""
        if prior.samples is None:
            return
        reached = x_adv
        if self.momenta is not None:
            assert self.decay is not None
            earlier = self.momenta.read(prior.samples.index, x)
            if self.aligned:
                earlier = prior.samples.placed(earlier)
            grad = widen(grad)
            # Its size is then 1 on average, within float16's range. A NaN would stay for ever.
            grad = grad / averaged(grad.abs().mean()).clamp_min(torch.finfo(grad.dtype).tiny)
            momentum = (grad + self.decay * earlier).nan_to_num(0.0).clamp(-_HALF, _HALF)
            reached = self._reached(x, prior.delta, momentum.to(x.dtype))
            self._write(self.momenta, prior.samples, x, momentum.half())
        kept = (reached - x) * (_UNITS / self.eps if self.eps else 0.0)
        kept = kept.nan_to_num(0.0).round().clamp(-_UNITS, _UNITS).to(torch.int8)
        self._write(self.perturbations, prior.samples, x, kept)

    def _write(self, table: SampleTable, samples: Samples, x: Tensor, rows: Tensor) -> None:
        if self.aligned and samples.offsets is not None:
            rows = samples.put_back(table.read(samples.index, x), rows)
        table.write(samples.index, rows)


def _draw_signs(values: Tensor) -> None:
    """Fill with -eps and eps in the units of what is kept, each with probability 1/2."""
    values.random_(0, 2).mul_(2).sub_(1).mul_(_UNITS)


def _row(about: str, make: Callable[..., PriorGuided]) -> Method:
    return Method(about, "2207.08859", "2F 1G 2B", 7, make, ("lam", "samples", "epoch_steps"))


ROWS = {
    "pgi": _row("FGSM-MEP: pgi-ep, with momentum over the epochs", PriorGuided),
    "pgi-ep": _row("from the last epoch's point + lam |logits' change|^2", partial(PriorGuided, decay=None)),
}
