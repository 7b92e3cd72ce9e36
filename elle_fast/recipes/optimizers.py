"""The optimisers of a run: how one is built, steered from step to step, and restored from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.recipes import depths

# AdamW's are torch's own.
WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 1e-2}
NAMES = tuple(WEIGHT_DECAYS)
ADAMW_RATE = 1e-3
DECAYS = ("all", "weights")
_STEERED = {False: ("lr",), True: ("lr", "momentum", "betas")}
_FUSED = ("cpu", "cuda")  # devices with one kernel for all weights
_OF_THE_DEVICE = ("fused", "capturable")  # options that change no number


def build(
    name: str,
    model: nn.Module,
    *,
    momentum: float,
    weight_decay: float,
    decay: str,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """SGD or AdamW with a rate of 0, for :func:`steer` to set; on the CPU and CUDA with ``fused=True``.

    On CUDA AdamW's step can be captured as a graph.

    SGD's momentum begins with zeros that are there before the first step. torch's fused one leaves it uninitialised if
    a GradScaler finds the first step's gradients not finite, and goes on with that.

    Args:
        name: one of :data:`NAMES`.
        model: whose parameters it moves, if they require a gradient.
        momentum: of SGD, or AdamW's first beta.
        weight_decay: of all parameters, or of some.
        decay: ``"all"``, or ``"weights"``: parameters of one dimension or none (biases, and the scales and shifts of
            norms) do not decay.
        layer_decay: the rate of each layer (:func:`elle_fast.recipes.depths.layers`) is this times that of the next
            one; a group for each layer has its factor as ``rate_factor``.

    Raises:
        TypeError, ValueError: for another name or decay.
    """
    checks.choice("decay", decay, DECAYS)
    factors = {} if layer_decay is None else depths.factors(model, layer_decay)
    together: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = decay == "all" or parameter.dim() > 1
            together.setdefault((factors.get(key, 1.0), decays), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (factor, decays), parameters in sorted(together.items(), key=lambda each: (each[0][0], not each[0][1])):
        groups.append({"params": parameters, **({} if decays else {"weight_decay": 0.0})})
        if layer_decay is not None:
            groups[-1]["rate_factor"] = factor
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay}
    if groups and groups[0]["params"][0].device.type in _FUSED:
        options["fused"] = True
    if checks.choice("optimizer", name, NAMES) == "adamw":
        capturable = bool(groups) and groups[0]["params"][0].device.type == "cuda"
        adamw = torch.optim.AdamW(groups, betas=(momentum, 0.999), capturable=capturable, **options)
        # Or torch warns that steps outside of a graph might be slower: a fused one is the same kernel.
        adamw._warned_capturable_if_run_uncaptured = True
        return adamw
    optimizer = torch.optim.SGD(groups, momentum=momentum, **options)
    if momentum:
        for parameter in (each for group in groups for each in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def steer(optimizer: torch.optim.Optimizer, rate: float, momentum: float) -> None:
    """Set the rate, times the factor of each group, and the momentum (AdamW's first beta) of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_factor", 1.0)
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state for a checkpoint. Rates are numbers there, also if a captured step has made them tensors."""
    state = optimizer.state_dict()
    return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}


def restore(optimizer: torch.optim.Optimizer, saved: dict[str, Any], *, begun: bool, cycled: bool) -> None:
    """Load a state that this optimiser could have had.

    torch would take options, and tensors of any name and shape, and fail in the next step.

    Args:
        optimizer: as :func:`build` made it; it stays fused and capturable, or not, as it is.
        saved: what :func:`saved` gave of a run's optimiser.
        begun: whether that run had taken a step.
        cycled: whether its momentum changes from step to step.

    Raises:
        ValueError: for another state.
    """
    owns = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    groups = saved["param_groups"]
    for group, own in zip(groups, owns, strict=False):  # load_state_dict counts them
        fixed = {name: value for name, value in own.items() if name not in (*_STEERED[cycled], *_OF_THE_DEVICE)}
        if differing := [name for name, value in fixed.items() if name not in group or group[name] != value]:
            raise ValueError(f"optimizer: expected the options of this run, got other {differing}")
    names = ("step", "exp_avg", "exp_avg_sq") * begun if "betas" in owns[0] else ()
    if owns[0].get("momentum"):
        names = ("momentum_buffer",)
    for index, parameter in enumerate(each for group in optimizer.param_groups for each in group["params"]):
        shape = list(parameter.shape)
        expected = {name: [] if name == "step" else shape for name in names}
        found = {
            name: list(value.shape) if isinstance(value, Tensor) else checks.describe(value)
            for name, value in saved["state"].get(index, {}).items()
            if value is not None  # without momentum
        }
        if found != expected:
            raise ValueError(f"optimizer: expected a state of shapes {expected} for weights {shape}, got {found}")
    # With its own options first: torch puts AdamW's counter where a fused one needs it.
    steered = [{**group, **own} for group, own in zip(groups, owns, strict=False)]
    optimizer.load_state_dict({**saved, "param_groups": steered + groups[len(owns) :]})
