"""A user's own attack inside a training step: it leaves no trace on the gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.attacks import check_gradients_can_be_taken

__all__ = ["own_points"]


def own_points(attack: Callable[..., Any], model: Model, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """The points of a user's own attack, called as ``attack(model, x, *args, **options)``, checked and detached.

    It may call ``backward()`` and ``zero_grad()``, and write to the x that it is given, a copy.
    """
    check_gradients_can_be_taken()
    with torch.enable_grad(), _gradients_aside(model):
        made = attack(model, x.detach().clone(), *args, **options)
    return checks.like("attack's x_adv", made.detach() if isinstance(made, Tensor) else made, x)


@contextmanager
def _gradients_aside(model: Model) -> Iterator[None]:
    """Inside, the parameters begin without gradients, and those with hooks get none; afterwards all are as before.

    The tensors are put back, not copies of them: they may be views of a bucket. A hook of a parameter would take the
    attack's gradient for the step's, as an optimiser in the backward pass does.
    """
    kept: dict[int, tuple[nn.Parameter, Tensor | None, bool]] = {}

    def put_aside(module: nn.Module, _: Any = None) -> None:
        for parameter in module.parameters():
            if id(parameter) not in kept:
                kept[id(parameter)] = parameter, parameter.grad, parameter.requires_grad
                parameter.grad = None
                if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                    parameter.requires_grad_(False)

    hook = None
    if isinstance(model, nn.Module):
        put_aside(model)
    else:  # the modules that a function calls are known when it calls them
        hook = register_module_forward_pre_hook(put_aside)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for parameter, grad, flag in kept.values():
            parameter.grad = grad
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
