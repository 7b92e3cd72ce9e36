"""GAT and NuAT: the clean loss, a penalty on the change of the outputs, and an attack that the penalty guides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Bounds, Method, Penalized, cross_entropy
from elle_fast.methods.counting import CountsSteps
from elle_fast.regularizers import GAT, NuAT
from elle_fast.regularizers.outputs import OutputRegularizer

# The part of the run in which NuAT's weight grows: its authors' code reaches the highest at epoch 90 of 100.
_RAMP = 0.9


class Guided(CountsSteps, Penalized):
    r"""GAT and NuAT (Sriramanan et al. 2020, arXiv 2011.14969; 2021), for each its own regulariser R.

    .. math::
        mean_i\, L(f(x_i), y_i) + w \cdot R(f(x), f(x_{adv}))

    The attack begins at x plus a noise of ``+- eps / 2``, each sign with probability 1/2, takes one step of eps along
    the sign of the gradient of the mean cross-entropy plus, in the second, fourth, ... step of each epoch, w R with
    f(x) held fixed, and projects to the eps ball. f(x) is one forward pass for the guide and the loss; the authors'
    code has another one for the guide, and the attack in eval mode, where here the model is called as it is. Their GAT
    also multiplies w by 4 for the last of its 100 epochs, which the ELLE paper does not mention and is not here.

    With ``form="elle"`` it is what the ELLE authors' code has under GAT (paper, section 4.5): the cross-entropy is that
    at x_adv, the noise is ``+- eps``, every step is guided, and x_adv is not projected.

    The number of training steps so far, on which w depends, is part of ``state_dict``. It is the host's, so the step
    cannot be captured as a CUDA graph.

    Args:
        regularizer: the class of R, :class:`~elle_fast.regularizers.GAT` or :class:`~elle_fast.regularizers.NuAT`.
        lam: w, ``>= 0``; with ``steps`` the highest.
        steps: training steps of the whole run, in nine tenths of which w grows linearly from 0 to ``lam``; ``None``: it
            is constant.
        epoch_steps: training steps of an epoch; ``None``: steps are counted through.
        form: ``"original"`` or ``"elle"``.
    """

    _fixed = ("ramp", "original")
    _elsewhere = dict.fromkeys(("steps", "form"), "build another one")

    def __init__(
        self,
        regularizer: type[OutputRegularizer],
        eps: float,
        lam: float,
        bounds: Bounds = None,
        steps: int | None = None,
        epoch_steps: int | None = None,
        *,
        form: str = "original",
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.original = checks.choice("form", form, ("original", "elle")) == "original"
        self.epoch_steps = None if epoch_steps is None else checks.integer("epoch_steps", epoch_steps, low=1)
        self.regularizer = regularizer()
        self.ramp = None if steps is None else max(1, round(_RAMP * checks.integer("steps", steps, low=1)))

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        done = self._count(model, x)
        weight = self.lam if self.ramp is None else self.lam * min(1.0, done / self.ramp)
        logits = self._logits(output_at(model, x), target)
        guided = not self.original or (done if self.epoch_steps is None else done % self.epoch_steps) % 2 == 1
        logits_adv = inner(self._attack(inner, x, target, logits.detach(), weight if guided else 0.0))
        ce = self._ce(logits if self.original else logits_adv, target)
        penalty = self.regularizer.from_logits(logits, logits_adv)
        return self._record(ce + weight * penalty, logits_adv, ce=ce, penalty=penalty)

    def _attack(self, model: Model, x: Tensor, target: Tensor, logits: Tensor, weight: float) -> Tensor:
        noise = torch.randint_like(x, 2).mul_(2).sub_(1)
        with torch.enable_grad():
            start = attacks.leaf(self._within(x + (0.5 if self.original else 1.0) * self.eps * noise))
            output = output_at(model, start)
            loss = cross_entropy(output, target)
            if weight > 0:
                loss = loss + weight * self.regularizer.from_logits(logits, output)
            (grad,) = torch.autograd.grad(attacks.differentiable(loss), start)
        point = start.detach() + self.eps * grad.sign()
        return self._projected(point, x) if self.original else self._within(point)


def _row(about: str, source: str, make: Callable[..., Guided], takes: tuple[str, ...]) -> Method:
    return Method(about, source, "3F 1G 2B", 8, make, ("lam", *takes))


_GAT, _NUAT = (
    "clean loss + lam |softmax's change|^2, guided attack",
    "clean loss + lam nuclear norm of the logits' change",
)
_GAT_FGSM = "loss at x_adv + lam |softmax's change|^2, guided attack"
ROWS = {
    "gat": _row(_GAT, "2011.14969", partial(Guided, GAT), ("epoch_steps",)),
    "gat-fgsm": _row(_GAT_FGSM, "2401.11618", partial(Guided, GAT, form="elle"), ()),
    "nuat": _row(_NUAT, "NeurIPS 2021", partial(Guided, NuAT), ("steps", "epoch_steps")),
}
