"""A user's own attack inside a training step: it leaves no trace on the gradients of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    It may call ``backward()`` and ``zero_grad()``, and write to the x that it is given, a copy. (Of a model that is a
    function, what it trains is known from its first forward pass on: a ``zero_grad()`` before that is not undone.)
    """
    check_gradients_can_be_taken()
    with torch.enable_grad(), _gradients_aside(model) as watched:
        made = attack(watched, x.detach().clone(), *args, **options)
    return checks.like("attack's x_adv", made.detach() if isinstance(made, Tensor) else made, x)


@contextmanager
def _gradients_aside(model: Model) -> Iterator[Model]:
    """Inside, the parameters begin without gradients, and those with hooks get none; afterwards all are as before.

    It yields the model; a function so that the tensors which it trains are found too.

    The tensors are put back, not copies of them: they may be views of a bucket. A hook of a parameter would take the
    attack's gradient for the step's, as an optimiser in the backward pass does.
    """
    kept: dict[int, tuple[Tensor, Tensor | None, bool]] = {}

    def put_aside(leaf: Tensor) -> bool:
        new = id(leaf) not in kept
        if new:
            kept[id(leaf)] = leaf, leaf.grad, leaf.requires_grad
            leaf.grad = None
        return new

    def put_parameters_aside(module: nn.Module, _: Any = None) -> None:
        for parameter in module.parameters():
            hooks = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            if put_aside(parameter) and hooks:
                parameter.requires_grad_(False)

    def watched(points: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = model(points, *args, **kwargs)
        for leaf in _leaves(output):
            if leaf is not points:
                put_aside(leaf)
        return output

    hook = None
    if isinstance(model, nn.Module):
        put_parameters_aside(model)
    else:  # the modules that a function calls are known when it calls them, other tensors when it has
        hook = register_module_forward_pre_hook(put_parameters_aside)
    try:
        yield model if hook is None else watched
    finally:
        if hook is not None:
            hook.remove()
        for parameter, grad, flag in kept.values():
            parameter.grad = grad
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _leaves(output: Any) -> Iterator[Tensor]:
    """The tensors in which a backward pass from a model's output would add to ``grad``."""
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, tuple | list) else [output]
    left = [value.grad_fn for value in values if isinstance(value, Tensor)]
    seen = set(left)
    while left:
        node = left.pop()
        if node is None:
            continue
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        new = {each for each, _ in node.next_functions} - seen
        seen |= new
        left += new
