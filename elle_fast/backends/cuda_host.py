"""What the launches of the compiled CUDA kernels share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """A launch goes to the current device: makes that the first tensor's."""

    def call(tensor: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if tensor.device.index == torch.cuda.current_device():
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launch(tensor, *args, **kwargs)

    return cast(Callable[Concatenate[Tensor, P], R], wraps(launch)(call))


def stream(tensor: Tensor) -> int:
    """The handle of the current stream on the tensor's device."""
    handle: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return handle
