"""What a CUDA graph of a training step asks of the model's parameters and of the optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Optimisers whose state is zeros before the first step.
_FROM_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def check_captured(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """Plain parameters, and an optimiser whose step waits for nothing."""
    if any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters()):
        raise ValueError(
            "model: expected plain parameters for a CUDA graph, got ones that wrap others, as of fully_shard; "
            "run such a model's steps as they are, without capture"
        )
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        # Where there is such an option torch's step() refuses a capture without it, fused or not.
        needed = "capturable" if "capturable" in group else "fused"
        if not group.get(needed):
            raise ValueError(
                f"optimizer: expected {needed}=True in each group, without which its step cannot be in a CUDA graph, "
                f"got {name} without it"
            )
        if group.get("dampening") and group.get("momentum") and not optimizer.state:
            raise ValueError(
                "optimizer: expected dampening=0, as the first step of SGD is another one with it, or an optimizer "
                "that has taken a step already, got neither"
            )
    # GradScaler asks the optimiser by this private name whether it has to wait for the device.
    if scaler is not None and scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"scaler: expected an optimizer with fused=True, as for others GradScaler waits for the device, got {name}"
        )
    if not optimizer.state and not isinstance(optimizer, _FROM_ZEROS):
        raise ValueError(
            f"optimizer: expected one that has taken a step already, as the first state of {name} is not known to be "
            "zeros, got one without state"
        )


def rate_on_device(rate: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate as a tensor on the device, which the graphs read."""
    if isinstance(rate, Tensor) and (rate.device, rate.dtype, rate.dim()) == (device, torch.float32, 0):
        return rate
    return torch.as_tensor(rate, dtype=torch.float32, device=device).detach().reshape(()).clone()
