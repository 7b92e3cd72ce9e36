"""The regularisers that ELLE is compared with, in plain torch.

Each is called as ``regulariser(model, x, target, x_adv=None)`` and returns a 0-dim value, differentiable with respect
to the model's parameters, to be weighted and added to a training loss::

    regulariser = GradAlign(eps=8/255)
    loss = F.cross_entropy(model(x_adv), y) + 0.2 * regulariser(model, x, y)

Costs are in forward passes, gradients and units; a unit is a forward pass, a data gradient or a weight gradient over
the batch.

:class:`GradAlign`, :class:`CURE` and :class:`LLR` are of local linearity: they compare the loss and its input gradient
at x with those at a second point, the method's own or ``x_adv`` if it is given, by double backpropagation. What the
training step has computed already need not be computed again; with CURE it then has 2 forward passes in all::

    losses, grad = losses_and_gradient(model, x, y)
    x_adv = x + eps * grad.detach().sign()
    losses_adv, grad_adv = losses_and_gradient(model, x_adv, y)
    loss = losses_adv.mean() + 4 * CURE()(model, x, y, x_adv, grad=grad, grad_adv=grad_adv)

:class:`GAT`, :class:`NuAT` and :class:`AdvLC` want the outputs at x and at an attack's point, ``x_adv``, to be equal,
and need no double backpropagation. Of logits that are there already they take the value with ``from_logits``, also to
guide the attack::

    logits, logits_adv = model(x), model(x_adv)
    loss = F.cross_entropy(logits, y) + 10 * GAT().from_logits(logits, logits_adv)
"""

from elle_fast.regularizers.advlc import AdvLC
from elle_fast.regularizers.common import losses_and_gradient
from elle_fast.regularizers.cure import CURE
from elle_fast.regularizers.gat import GAT
from elle_fast.regularizers.gradalign import GradAlign
from elle_fast.regularizers.llr import LLR
from elle_fast.regularizers.nuat import NuAT

__all__ = ["CURE", "GAT", "LLR", "AdvLC", "GradAlign", "NuAT", "losses_and_gradient"]
