"""The part of gpu_report.py that checks, then times, elle_loss forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.run import (
    Run,
    add_ratios,
    add_timings,
    copy_rate,
    eager_backends,
    poisoned,
    recorded,
    sets_of_inputs,
)
from benchmarks.harness.device import compiled
from benchmarks.harness.timing import Call
from benchmarks.ops.sizes import LOSS_CASES, PACKED, LossCase, dry_loss_cases
from elle_fast import AdaptiveLambda
from elle_fast.functional import elle_loss


class LossInputs(NamedTuple):
    """Fresh random inputs."""

    logits: Tensor
    target: Tensor
    alpha: Tensor
    lam: float | AdaptiveLambda


def loss_inputs(case: LossCase, device: torch.device, controller: AdaptiveLambda | None = None) -> LossInputs:
    """Logits of standard deviation 3; ELLE-A in the middle of a training (``controller``, or a new one)."""
    batch = case.rows // PACKED
    logits = (3 * torch.randn(case.rows, case.classes, device=device)).to(case.dtype).requires_grad_()
    target = torch.randint(case.classes, (batch,), device=device)
    alpha = torch.rand(batch, device=device)
    return LossInputs(logits, target, alpha, (controller or _controller(device)) if case.adaptive else 4000.0)


def _controller(device: torch.device) -> AdaptiveLambda:
    controller = AdaptiveLambda(4000.0).to(device)
    # No E_lin exceeds this mean, so lam decays a little with each call.
    for name, value in (("lam", 2000.0), ("count", 10), ("mean", 1e9)):
        controller.get_buffer(name).fill_(value)
    return controller


def measure_loss(run: Run, case: LossCase, result: dict[str, Any]) -> None:
    """Check, then time, one case of elle_loss."""

    def call(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        def loss(
            logits: Tensor, target: Tensor, alpha: Tensor, lam: float | AdaptiveLambda
        ) -> tuple[Tensor, Tensor, Tensor]:
            return elle_loss(logits, target, alpha, lam, backend=backend)

        return loss

    functions = {name: call(backend) for name, backend in eager_backends().items()}
    for name in list(functions)[:-1]:
        checked = check_loss(functions[name], loss_inputs(case, run.device.device))
        result["check" if name == "triton" else f"check {name}"] = checked
    run.device.free()
    if run.left() > 0.3 or case.target:
        with recorded(result, "error in forward and backward, compiled"):
            translated = compiled(call("reference"), dry=run.device.dry)
            check_loss(translated, loss_inputs(case, run.device.device), poison=False)
            functions["compiled"] = translated
    # One controller, because torch.compile may compile again for each new module.
    controller = _controller(run.device.device)
    sets = range(sets_of_inputs(run, case.launch_bound))
    rotated = [loss_inputs(case, run.device.device, controller) for _ in sets]
    result["timings"] = {}
    sides = {name: loss_calls(function, rotated) for name, function in functions.items()}
    for what in ("both", "forward", "backward"):
        # A backward alone cannot be captured: its forward ran on another stream.
        calls = {name: of_side[what] for name, of_side in sides.items()}
        add_timings(run, result, what, calls, replay=what != "backward", repeatable=not case.adaptive)
    result["bytes"] = {what: case.bytes(what) for what in result["timings"]}
    for what, moved in result["bytes"].items():
        add_ratios(result, what, moved, run.record["copy"][0]["bytes_per_second"])


def loss_calls(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]], rotated: Sequence[LossInputs]
) -> dict[str, list[Call]]:
    """The forward (with the graph that training needs), the backward of one forward, and both."""

    def forward(inputs: LossInputs) -> Tensor:
        return function(*inputs)[0]

    def gradient(loss: Tensor, inputs: LossInputs) -> Tensor:
        (grad,) = torch.autograd.grad(loss, inputs.logits, retain_graph=True)
        return grad

    def both(inputs: LossInputs) -> Tensor:
        return gradient(forward(inputs), inputs)

    def detached(inputs: LossInputs) -> Tensor:
        return forward(inputs).detach()

    return {
        "both": [partial(both, inputs) for inputs in rotated],
        "forward": [partial(detached, inputs) for inputs in rotated],
        "backward": [partial(gradient, forward(inputs), inputs) for inputs in rotated],
    }


def check_loss(
    function: Callable[..., tuple[Tensor, Tensor, Tensor]], inputs: LossInputs, *, poison: bool = True
) -> dict[str, Any]:
    """Errors against the reference in float64: at most twice those of the reference in the logits' own precision.

    In addition, 32 float32 roundings of the largest number involved, as the reference's error may be 0 by chance.
    Triton's interpreter truncates to bfloat16 where the hardware rounds, which doubles the error.
    """
    cut = torch.finfo(inputs.logits.dtype).eps if inputs.logits.device.type == "cpu" else 0.0

    def results(made_by: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> list[Tensor]:
        logits = inputs.logits.detach().to(dtype).requires_grad_()
        lam = inputs.lam if isinstance(inputs.lam, float) else _controller(logits.device)
        values = made_by(logits, inputs.target, inputs.alpha, lam)
        (grad,) = torch.autograd.grad(values[0], logits)
        return [*(value.detach() for value in values), grad]

    def reference(*arguments: Any) -> tuple[Tensor, ...]:
        return elle_loss(*arguments, backend="reference")

    # Code compiled with poison would have to be compiled again without it.
    with poisoned() if poison else nullcontext():
        ours = results(function, inputs.logits.dtype)
    theirs, exact = results(reference, inputs.logits.dtype), results(reference, torch.float64)
    report: dict[str, Any] = {}
    for name, our, their, true in zip(("loss", "ce", "e_lin", "grad"), ours, theirs, exact, strict=True):
        error, other = ((value.double() - true).abs().max().item() for value in (our, their))
        largest = max(true.abs().max().item(), 0.0 if name == "grad" else 1.0)
        allowed = 2 * other + (32 * 2.0**-24 + cut) * largest
        if not error <= allowed:
            raise AssertionError(
                f"{name} differs from the reference in float64 by {error:.3g}, more than {allowed:.3g}"
            )
        report[name] = {"largest_error": error, "of_the_reference": other, "allowed": allowed}
    return report


def part_elle_loss(run: Run) -> None:
    """The cases of elle_loss."""
    copy_rate(run)
    cases = dry_loss_cases() if run.device.dry else LOSS_CASES
    run.each(cases, measure_loss)
    copy_rate(run)
