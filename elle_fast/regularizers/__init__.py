"""The local-linearity regularisers that ELLE is compared with: plain torch, with double backpropagation.

Each is called as ``regulariser(model, x, target, x_adv=None)`` and returns a 0-dim value, differentiable with respect
to the model's parameters, to be weighted and added to a training loss::

    regulariser = GradAlign(eps=8/255)
    loss = F.cross_entropy(model(x_adv), y) + 0.2 * regulariser(model, x, y)

All of them compare the loss at x with that at a second point: the method's own, or ``x_adv`` if it is given. What the
training step has computed already need not be computed again; with CURE it then has 2 forward passes in all::

    losses, grad = losses_and_gradient(model, x, y)
    x_adv = x + eps * grad.detach().sign()
    losses_adv, grad_adv = losses_and_gradient(model, x_adv, y)
    loss = losses_adv.mean() + 4 * CURE()(model, x, y, x_adv, grad=grad, grad_adv=grad_adv)
"""

from elle_fast.regularizers.common import losses_and_gradient
from elle_fast.regularizers.cure import CURE
from elle_fast.regularizers.gradalign import GradAlign
from elle_fast.regularizers.llr import LLR

__all__ = ["CURE", "LLR", "GradAlign", "losses_and_gradient"]
