"""FGSM that begins at universal adversarial perturbations, which are learned beside the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Bounds, Method, Penalized, logits_and_gradient
from elle_fast.methods.kept import KeepsBuffers, check_classes, class_of, count_classes
from elle_fast.methods.slat import hooked
from elle_fast.ops.elle_loss.reference import widen

# Its authors' values. The radius is theirs at 8/255, 10/255, in units of eps.
_RADIUS, _DECAY = 1.25, 0.3
# Adam's, for FUAP's own layers.
_RATE, _BETAS, _TINY = 1e-3, (0.9, 0.999), 1e-8


class UAP(KeepsBuffers, Penalized):
    r"""FGSM-UAP with one universal perturbation for all samples (Pan, Li and Yao, AAAI 2024, and their code).

    .. math::
        x_0 = \Pi(x + r u), \quad x_{adv} = \Pi(x_0 + eps \cdot sign(\nabla L(f(x_0), y))), \qquad
        mean_i\, L(f(x_{adv,i}), y_i) + lam \cdot mean_{i, c}\, (f(x_{adv,i})_c - f(x_{0,i})_c)^2

    with ``r = 1.25 eps``, the projection to the eps ball and to ``bounds``, and a gradient through both logits: the
    pass at x_0 serves the attack and the penalty. u begins as random signs. Each training step then adds the sign of
    the momentum m of the gradients g of the attack, each batch scaled to a 1-norm of 1:

    .. math::
        m \leftarrow mean_i\, g_i / \|g\|_1 + 0.3 m, \qquad u \leftarrow clamp(u + sign(m), -1, 1)

    In their code the backward pass also adds the penalty's gradient to g, as both share a tensor; here g is what the
    attack followed, with which that code takes the same steps.

    u is a pattern over the pixels as the model sees them: crops and flips do not move it. u and m are buffers, int8 and
    floating ``[n, ...]``, with ``...`` the shape of a sample and n = 1: 5 bytes an entry. They are empty before the
    first step; samples of another shape begin anew. A gradient that is not finite counts as 0. Where a call is no step
    of the state both stay, and a frozen one begins at the u that the step's counted call has moved. In several
    processes each has its own, learned from its share of the batch. The attack's loss has no label smoothing; the
    authors' has that of the training loss (0.4). They also average weights: that is the trainer's.
    """

    universal: Tensor
    momentum: Tensor

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self._keep("universal", torch.int8)
        self._keep("momentum", torch.float32)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        learns = self.updates(model)
        before, chosen, number = self._choice(inner, x, target, learns)
        universal, momentum = self._patterns(number, x)
        noise = _RADIUS * self.eps * universal[chosen].to(x.dtype)
        start = self._projected(before + noise, x)
        logits, grad = logits_and_gradient(model, start, target)
        self._check(number, logits)
        logits_adv = inner(self._projected(start + self.eps * grad.sign(), x))
        if learns:
            self._store(**learned(universal, momentum, chosen, grad))
        penalty = F.mse_loss(widen(logits_adv), widen(logits))
        return self._sum(model, self._ce(logits_adv, target), penalty, logits_adv)

    def _choice(self, inner: Model, x: Tensor, target: Tensor, learns: bool) -> tuple[Tensor, Tensor, int]:
        """Where a perturbation is added, which one for each sample, and how many there are."""
        return x, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1

    def _check(self, number: int, logits: Tensor) -> None:
        """Whether there are as many perturbations as the logits ask for."""

    def _patterns(self, number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """u and m on x's device, or new ones if none are kept for such samples."""
        shape, dtype = (number, *x.shape[1:]), widen(x).dtype
        if self.universal.shape == shape == self.momentum.shape:
            return self.universal.to(x.device), self.momentum.to(x.device, dtype)
        signs = torch.randint(2, shape, dtype=torch.int8, device=x.device).mul_(2).sub_(1)
        return signs, torch.zeros(shape, dtype=dtype, device=x.device)


@torch.no_grad()
def learned(universal: Tensor, momentum: Tensor, chosen: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """u and m by name, after a batch with these gradients ``[B, ...]``: only those change that were chosen, ``[B]``."""
    grad = widen(grad)
    size = grad.abs().sum()
    grad = torch.where(size.isfinite() & (size > 0), grad / size, 0.0)
    counts = (chosen[:, None] == torch.arange(len(universal), device=chosen.device)).sum(dim=0)
    # Sums in a fixed order, which index_add has not on CUDA. `unsafe`: the lengths are not looked at.
    by_pattern = grad[chosen.argsort(stable=True)]
    sums = torch.segment_reduce(by_pattern, "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)
    counts = counts.view(-1, *[1] * (grad.dim() - 1))
    momentum = torch.where(counts > 0, sums / counts.clamp(min=1) + _DECAY * momentum, momentum)
    steps = torch.where(counts > 0, momentum.sign(), 0.0).to(torch.int8)
    return {"universal": (universal + steps).clamp(-1, 1), "momentum": momentum}


class CUAP(UAP):
    """FGSM-CUAP: :class:`UAP` with a perturbation for each class, ``[classes, ...]``, by the gradients of its samples.

    Perturbations of classes that are not in a batch stay as they are. Targets that are probabilities have the class of
    the highest.

    Args:
        classes: ``>= 1``; ``None``: as many as the model has logits, for which the first step makes a forward pass more
            (in eval mode).
    """

    def __init__(self, eps: float, lam: float, bounds: Bounds = None, classes: int | None = None) -> None:
        super().__init__(eps, lam, bounds)
        self.classes = None if classes is None else checks.integer("classes", classes, low=1)

    def _choice(self, inner: Model, x: Tensor, target: Tensor, learns: bool) -> tuple[Tensor, Tensor, int]:
        known = len(self.universal) if self.universal.shape[1:] == x.shape[1:] else 0
        number = self.classes or known or count_classes(inner, x)
        # A label out of range is an error of the loss, which names it.
        return x, class_of(target).clamp(0, number - 1), number

    def _check(self, number: int, logits: Tensor) -> None:
        check_classes(number, logits)


class FUAP(UAP):
    r"""FGSM-UAP in full, FastAT's FUAP: one of n perturbations for each sample, by the features of the model.

    Two layers of the criterion's own, ``h = W_1 z + b_1`` with n entries and ``W_2 relu(h) + b_2`` with one for each
    class, are trained as a classifier by Adam (rate 0.001) on the features z of a noised point,
    ``clamp(x + U(-eps, eps))``: the inputs of the model's last linear layer in a forward pass of its own, without a
    graph. The sample's perturbation is the one of the largest entry of h before that step, and is added to the noised
    point; all else is as in :class:`UAP`. ``head``, float32 ``[3, P]``, has the layers' P parameters and Adam's two
    moments, ``head_steps`` its number of steps: buffers too.

    The model is an ``nn.Module`` with a linear layer that takes ``[B, D]``; its hooks are used, so it is not compiled.

    Args:
        patterns: n ``>= 1``; ``None``: the authors' 50, from 100 classes on 200, and from 200 classes on 300.
    """

    head: Tensor
    head_steps: Tensor

    def __init__(self, eps: float, lam: float, bounds: Bounds = None, patterns: int | None = None) -> None:
        super().__init__(eps, lam, bounds)
        self.patterns = None if patterns is None else checks.integer("patterns", patterns, low=1)
        self._keep("head", torch.float32)
        self.register_buffer("head_steps", torch.zeros((), dtype=torch.int64, device="cpu"))

    def _choice(self, inner: Model, x: Tensor, target: Tensor, learns: bool) -> tuple[Tensor, Tensor, int]:
        noised = self._within(x + self.eps * (2 * torch.rand_like(x) - 1))
        features, logits = self._features(inner, noised, target)
        classes = logits.shape[1]
        number = self.patterns or (50 if classes < 100 else 200 if classes < 200 else 300)
        sizes = [(number, features.shape[1]), (number,), (classes, number), (classes,)]
        head = self._head(sizes, x.device)
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            weights = head[0].clone().requires_grad_()
            parts = weights.split([math.prod(size) for size in sizes])
            w_1, b_1, w_2, b_2 = (part.view(size) for part, size in zip(parts, sizes, strict=True))
            entries = F.linear(features, w_1, b_1)
            loss = self._ce(F.linear(entries.relu(), w_2, b_2), target)
            if learns:
                (grad,) = torch.autograd.grad(loss, weights)
                steps = self.head_steps.to(x.device) + 1
                self._store(head=adam(head, grad.nan_to_num(0.0, 0.0, 0.0), steps), head_steps=steps)
        return noised, entries.detach().argmax(dim=1), number

    def _features(self, inner: Model, points: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the model's last linear layer takes at the points, float32 ``[B, D]``, and the logits."""
        whole = hooked(inner, "FUAP")
        layers = [module for module in whole.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise ValueError(f"model: expected a linear layer for FUAP, got none in a {type(whole).__name__}")
        found: list[Tensor] = []
        hook = layers[-1].register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
        try:
            with torch.no_grad():
                logits = self._logits(output_at(inner, points), target)
        finally:
            hook.remove()
        if len(found) != 1 or found[0].dim() != 2 or len(found[0]) != len(points):
            got = ", ".join(checks.describe(each) for each in found) or "no call"
            raise ValueError(f"model: expected its last linear layer to take features [{len(points)}, D], got {got}")
        return found[0].float(), logits

    def _head(self, sizes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
        """Parameters and moments ``[3, P]``; new ones are drawn as torch's linear layers draw them."""
        count = sum(map(math.prod, sizes))
        if self.head.shape == (3, count):
            return self.head.to(device)
        layers = [nn.Linear(size[1], size[0], dtype=torch.float32, device=device) for size in (sizes[0], sizes[2])]
        weights = torch.cat([part.detach().flatten() for layer in layers for part in (layer.weight, layer.bias)])
        return torch.stack([weights, torch.zeros_like(weights), torch.zeros_like(weights)])


def adam(state: Tensor, grad: Tensor, steps: Tensor) -> Tensor:
    """Parameters and moments ``[3, P]`` after step number ``steps`` of Adam."""
    weights, first, second = state
    steps = steps.float()
    first = _BETAS[0] * first + (1 - _BETAS[0]) * grad
    second = _BETAS[1] * second + (1 - _BETAS[1]) * grad.square()
    size = (second / (1 - _BETAS[1] ** steps)).sqrt() + _TINY
    return torch.stack([weights - _RATE * (first / (1 - _BETAS[0] ** steps)) / size, first, second])


_COST = ("2F 1G 2B", 7)
_SOURCE = "AAAI 2024"  # doi 10.1609/aaai.v38i19.30147
ROWS = {
    "uap": Method("FGSM from a universal pattern + lam |logits change|^2", _SOURCE, *_COST, UAP, ("lam",)),
    "cuap": Method("UAP, a pattern for each class", _SOURCE, *_COST, CUAP, ("lam", "classes")),
    "fuap": Method(
        "UAP, a pattern by the features of each sample",
        _SOURCE,
        "3F 1G 2B",
        8,
        FUAP,
        ("lam",),
        refuses={
            "awp": "its attack reads the model's features, which AWP cannot hold fixed",
            "compile": "has a hook on the model's features, which a compiled graph leaves out",
        },
    ),
}
