"""The regularisers that ELLE is compared with, in plain torch.

Each is called as ``regulariser(model, x, target, x_adv=None)`` and returns a 0-dim value, ``>= 0`` and differentiable
with respect to the model's parameters, to be weighted and added to a training loss::

    regulariser = GradAlign(eps=8/255)
    loss = F.cross_entropy(model(x_adv), y) + 0.2 * regulariser(model, x, y)

Arguments of every call:

    model: maps ``[B, ...]`` to logits ``[B, C]``.
    x: floating ``[B, ...]``, not requiring grad.
    target: int64 ``[B]`` in ``[0, C)``, or probabilities ``[B, C]``.
    x_adv: the second point, shaped as x, not requiring grad.

Further arguments pass in what the training step has computed already, with its graph. Wrong arguments raise TypeError
or ValueError, before the model is called where possible; the message names the argument, what was expected and what was
got.

Costs are in forward passes, gradients and units; a unit is a forward pass, a data gradient or a weight gradient over
the batch.

:class:`GradAlign`, :class:`CURE` and :class:`LLR` measure local linearity: they compare the loss and its input gradient
at x with those at a second point, the method's own or ``x_adv`` if it is given, by double backpropagation. A model
whose output does not depend on x is a RuntimeError. In train mode batch norm ties a sample's gradient to its batch, as
in the methods' public code; and dropout draws anew at the second point, which counts as curvature (of CURE's original
form alone the model is in eval mode). With shared values, CURE and FGSM take 2 forward passes in all::

    grad = input_gradient(model, x, y)
    x_adv = x + eps * grad.sign()
    losses_adv, grad_adv = losses_and_gradient(model, x_adv, y)
    curvature = CURE(form="elle")(model, x, y, x_adv, grad=grad, grad_adv=grad_adv)
    loss = losses_adv.mean() + 1000 * curvature

:class:`GAT`, :class:`NuAT` and :class:`AdvLC` want the outputs at x and at an attack's point, ``x_adv``, to be equal,
and need no double backpropagation. ``from_logits`` takes logits that are there already, also to guide the attack::

    logits, logits_adv = model(x), model(x_adv)
    loss = F.cross_entropy(logits, y) + 10 * GAT().from_logits(logits, logits_adv)
"""

from elle_fast.attacks import losses_and_gradient
from elle_fast.regularizers.gradients import CURE, LLR, GradAlign
from elle_fast.regularizers.outputs import GAT, AdvLC, NuAT

__all__ = ["CURE", "GAT", "LLR", "AdvLC", "GradAlign", "NuAT", "losses_and_gradient"]
