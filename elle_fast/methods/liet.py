"""LIET: an attack that begins at the class' own perturbation, as far as random noise leaves it there."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.eval_mode import in_eval_mode
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Bounds, Method, Penalized, cross_entropy, logits_and_gradient
from elle_fast.methods.counting import CountsSteps
from elle_fast.methods.kept import KeepsBuffers, check_classes, class_of, count_classes
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.passes import WithKwargs


class LIET(KeepsBuffers, CountsSteps, Penalized):
    r"""Label information elimination training (Pan, Tang, Li and Yao, ICCV 2025, and their code).

    The label information of a class is what a perturbation says of it whatever the image is. Every few steps it is
    taken, in eval mode, from a constant image, at the middle of ``bounds`` (0.5 without):

    .. math::
        LI_c = eps \cdot sign(\nabla L(f(\bar x), c))

    A step draws a sign s and a share q for the batch, and uniform noise. In the part q of the entries, drawn at random,
    noise takes the place of the LI of the sample's class, and the attack starts there:

    .. math::
        x_0 = clamp(x + s \cdot mix(LI_y, U[-a, a]^d)), \qquad x_{adv} = \Pi(x_0 + eps \cdot sign(\nabla L(f(x_0), y)))

    .. math::
        mean_i\, L(f(x_{adv,i}), y_i) + w \cdot mean_i\, JS(softmax f(x_{0,i}), softmax f(x_{adv,i}))

    where JS is the Jensen-Shannon divergence, in nats, with a gradient through both logits. L has label smoothing that
    is not uniform: each class but the sample's own gets a random share of ``label_smoothing``, drawn anew for each
    loss, also for that of the attack and of LI, as in their code. It is part of the method: ``methods.build`` sets it.

    Its authors have two settings, by the eps that it is built with:

    ==================  ==============  ==========  =====  ============  ===============  ============================
    eps                 q               a           lam    LI is new in  label_smoothing  x_adv
    ==================  ==============  ==========  =====  ============  ===============  ============================
    up to 8/255         U[0.1, 0.5]     eps         100    20 steps      0.6              in the eps ball, in the range
    above               U[0, 1]         2 eps       20     10 steps      0.4              in the range
    ==================  ==============  ==========  =====  ============  ===============  ============================

    On CIFAR-100 at 8/255 they take lam 200 and label_smoothing 0.8; above, 20 steps on CIFAR-100 and Tiny-ImageNet.
    They also average weights: that is the trainer's.

    LI's signs, int8 ``[classes, ...]``, and the number of steps so far are part of ``state_dict``; the number is the
    host's, so the step cannot be captured as a CUDA graph. In several processes each makes its own LI. Of model_kwargs
    with a row for each sample, the constant images have the first one's. Targets that are probabilities have the class
    of the highest.

    Args:
        lam: w, ``>= 0``; with ``steps`` the highest.
        steps: training steps of the whole run; w is ``lam (e + 1) / epochs`` in epoch e, or without ``epoch_steps``
            grows so by the step; ``None``: it is constant.
        epoch_steps: training steps of an epoch, with which LI is made anew too; ``None``: steps are counted through.
        classes: ``>= 1``; ``None``: as many as the model has logits, for which the first step makes a forward pass more
            (in eval mode).
    """

    signs: Tensor
    _fixed = ("large",)

    def __init__(
        self,
        eps: float,
        lam: float,
        bounds: Bounds = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.large = eps > 8 / 255
        self.steps = None if steps is None else checks.integer("steps", steps, low=1)
        self.epoch_steps = None if epoch_steps is None else checks.integer("epoch_steps", epoch_steps, low=1)
        self.classes = None if classes is None else checks.integer("classes", classes, low=1)
        self._keep("signs", torch.int8)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        learns = self.updates(model)
        done = self._count(model, x)
        signs = self._signs(inner, x, done, learns)
        start = self._start(x, class_of(target), signs)
        logits, grad = logits_and_gradient(model, start, target, lambda *given: x.shape[0] * self._ce(*given))
        check_classes(len(signs), logits)
        point = start + self.eps * grad.sign()
        logits_adv = inner(self._within(point) if self.large else self._projected(point, x))
        ce, penalty = self._ce(logits_adv, target), divergence(logits, logits_adv)
        return self._record(ce + self._weight(done) * penalty, logits_adv, ce=ce, penalty=penalty)

    def _weight(self, done: int) -> float:
        """Of the divergence, after so many steps."""
        if self.steps is None:
            return self.lam
        length = self.epoch_steps or 1
        return self.lam * min(1.0, (done // length + 1) / math.ceil(self.steps / length))

    def _signs(self, inner: Model, x: Tensor, done: int, learns: bool) -> Tensor:
        """LI in units of eps, int8 ``[classes, ...]``."""
        place = done if self.epoch_steps is None else done % self.epoch_steps
        kept = self.signs.to(x.device)
        known = len(kept) if kept.shape[1:] == x.shape[1:] else 0
        # AWP's call ahead of the step makes them anew, too, where the step does: the two have the same passes.
        if known and (self._repeats or place % (10 if self.large else 20)):
            return kept
        classes = self.classes or known or count_classes(inner, x)
        low, high = self.bounds or (0.0, 1.0)
        point = attacks.leaf(torch.full((classes, *x.shape[1:]), (low + high) / 2, dtype=x.dtype, device=x.device))
        constant = _of_the_first(inner, classes)
        with torch.enable_grad(), in_eval_mode(constant):
            logits = checks.logits(output_at(constant, point), classes, attacks.MODEL_OUTPUT)
            check_classes(classes, logits)
            loss = classes * self._ce(logits, torch.arange(classes, device=x.device))
            (grad,) = torch.autograd.grad(attacks.differentiable(loss), point)
        signs = grad.sign().to(torch.int8)
        if learns:
            self._store(signs=signs)
        return signs

    def _start(self, x: Tensor, labels: Tensor, signs: Tensor) -> Tensor:
        """The attack's start."""
        low, high, reach = (0.0, 1.0, 2.0) if self.large else (0.1, 0.5, 1.0)
        own, noise = signs[labels.clamp(0, len(signs) - 1)].to(x.dtype), reach * (2 * torch.rand_like(x) - 1)
        share, side = torch.rand(2, dtype=torch.float32, device=x.device)
        mask = torch.rand(x.shape, dtype=torch.float32, device=x.device) < low + (high - low) * share
        side = torch.where(side < 0.5, -1.0, 1.0).to(x.dtype)
        return self._within(x + side * self.eps * torch.where(mask, noise, own))

    def _ce(self, output: Any, target: Tensor) -> Tensor:
        """The mean cross-entropy with ``label_smoothing``, spread at random over the other classes."""
        loss = cross_entropy(output, target)
        if self.label_smoothing == 0:
            return loss
        logits = widen(output)
        shares = torch.rand(logits.shape, dtype=torch.float32, device=logits.device)
        shares = shares.scatter(1, class_of(target)[:, None], 0.0).to(logits.dtype)
        spread = cross_entropy(logits, shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-30))
        return (1 - self.label_smoothing) * loss + self.label_smoothing * spread


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """The mean Jensen-Shannon divergence of the rows' softmax, 0-dim, in ``[0, log 2]``."""
    log_p, log_q = F.log_softmax(widen(logits), dim=1), F.log_softmax(widen(other), dim=1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    p_m, q_m = (F.kl_div(middle, each, reduction="batchmean", log_target=True) for each in (log_p, log_q))
    return (p_m + q_m) / 2


def _of_the_first(model: Model, rows: int) -> Model:
    """A model of so many points, each with the first sample's arguments."""
    whole = getattr(model, "__self__", model)
    if not isinstance(whole, WithKwargs):
        return model
    own = {name: whole.kwargs[name][:1].expand(rows, *whole.kwargs[name].shape[1:]) for name in whole.own}
    made = WithKwargs(whole.model, {**whole.kwargs, **own}, tuple(own))
    return made if model is whole else made.forward


ROWS = {
    "liet": Method(
        "FGSM from class signs and noise + lam JS of outputs",
        "ICCV 2025",
        "2F 1G 2B",
        7,
        LIET,
        takes=("lam", "steps", "epoch_steps", "classes"),
    )
}
