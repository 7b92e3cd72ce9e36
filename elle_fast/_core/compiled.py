"""Compiled models: which they are, an attack's gradient in them, and two backward passes through one forward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling


def is_compiled(model: Any) -> bool:
    """Whether a part of the model is compiled."""
    if not isinstance(model, nn.Module):
        return hasattr(model, "_torchdynamo_orig_callable")
    return any("_orig_mod" in each._modules or each._compiled_call_impl is not None for each in model.modules())


@contextmanager
def without_weights(module: nn.Module | None) -> Iterator[None]:
    """Inside, a forward pass of a compiled module keeps nothing for the gradients of its weights.

    Its backward pass computes them whether they are asked for or not, which eager autograd does not. That is a third of
    an attack's backward and forward pass.
    """
    weights: list[nn.Parameter] = []
    if module is not None and not is_compiling() and is_compiled(module):
        weights = [each for each in module.parameters() if each.requires_grad]
    if any(hasattr(each, "__tensor_flatten__") for each in weights):
        weights = []  # FSDP2 keeps an account of its own
    try:
        for each in weights:
            each.requires_grad_(False)
        yield
    finally:
        for each in weights:
            each.requires_grad_(True)


def keeping() -> AbstractContextManager[Any]:
    """Inside, what torch.compile compiles keeps what its backward pass reads, which it may reuse as memory otherwise.

    That is torch's option ``donated_buffer``, with which a second backward pass is refused. Once compiled it stays.
    """
    # Its import takes a second, and without it nothing is compiled. Torch 2.4 has no such option.
    if is_compiling() or "torch._dynamo" not in sys.modules:
        return nullcontext()
    import torch._functorch.config as config

    patched: AbstractContextManager[Any] = (
        config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext()
    )
    return patched


def kept_gradient(loss: Tensor, point: Tensor) -> Tensor:
    """The gradient in a point, whose graph is kept for a later backward pass.

    The forward pass was inside :func:`keeping`.

    Raises:
        RuntimeError: if the model was compiled elsewhere for a backward pass that cannot be taken twice.
    """
    try:
        return torch.autograd.grad(loss, point, retain_graph=True)[0]
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        # Torch refuses what is kept too. Where it is not kept, a second backward pass would read what is overwritten.
        if not _kept(loss):
            raise RuntimeError(
                "model: expected a compiled model whose backward pass can be taken twice, got one that was called "
                "before, with gradients in its inputs; set torch._functorch.config.donated_buffer = False before "
                "that call"
            ) from error
    with keeping():
        return torch.autograd.grad(loss, point, retain_graph=True)[0]


def _kept(loss: Tensor) -> bool:
    """Whether no compiled part of the graph may overwrite what its backward pass reads."""
    left: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [other for other, _ in node.next_functions]
        if node.name().startswith("CompiledFunction"):
            metadata = getattr(getattr(node, "_forward_cls", None), "metadata", None)
            donated: Sequence[int] | None = getattr(metadata, "bw_donated_idxs", (0,))
            if donated:
                return False
    return True
