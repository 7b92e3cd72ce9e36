"""Where a launch goes: the device that is current, and the threads or the stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A launch goes to the current device: inside, that is the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    if tensor.is_xpu and tensor.device.index != torch.xpu.current_device():
        return torch.xpu.device(tensor.device)
    return _AS_IT_IS


def stream(tensor: Tensor) -> int:
    """The handle of the current CUDA stream on the tensor's device."""
    handle: int = torch.cuda.current_stream(tensor.device).cuda_stream
    return handle


def threads(tensor: Tensor) -> int:
    """How many threads torch uses on the CPU, wherever the tensor lies in its memory."""
    return torch.get_num_threads()
