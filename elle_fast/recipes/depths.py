"""How deep each weight of a network lies, for layer-wise learning rates."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from elle_fast.recipes.weights import network_of


def layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter of ``model`` by name, counted from 0 at the input.

    A timm network says itself what its layers are (``group_matcher``). Of any other they are in the order in which its
    modules are defined: the top-level children, but for one that holds a list of two or more blocks of one kind, which
    is opened; so each block is a layer. A layer of one-dimensional weights alone, such as a norm, belongs to the layer
    before it, and weights that lie beside layers, such as a class token, to the layer after them.
    """
    net = network_of(model)
    matcher: Any = getattr(net, "group_matcher", None)
    if callable(matcher):
        grouping = import_module("timm.models").group_parameters
        found: dict[str, int] = grouping(net, matcher(coarse=False), reverse=True)
    else:
        found = _by_order(net)
    names = {id(each): found[name] for name, each in net.named_parameters()}
    return {name: names[id(each)] for name, each in model.named_parameters()}


def factors(model: nn.Module, decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate: 1 in the last layer, and ``decay`` times less in each before it."""
    found = layers(model)
    last = max(found.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in found.items()}


def _by_order(net: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    last = -1

    def visit(module: nn.Module, prefix: str) -> None:
        nonlocal last
        for name, _ in module.named_parameters(prefix, recurse=False):
            found.setdefault(name, last + 1)
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if _opens(child):
                visit(child, path)
                continue
            own = dict(child.named_parameters(path))
            if not own:
                continue
            if last < 0 or any(each.dim() > 1 for each in own.values()):
                last += 1
            for each in own:
                found.setdefault(each, last)

    visit(net, "")
    return found


def _opens(module: nn.Module) -> bool:
    """Whether it holds, at any depth, a list of blocks of one kind."""
    for each in module.modules():
        if not isinstance(each, (nn.Sequential, nn.ModuleList)):
            continue
        kinds = [type(child) for child in each if len(list(child.children()))]
        if any(kinds.count(kind) > 1 for kind in kinds):
            return True
    return False
