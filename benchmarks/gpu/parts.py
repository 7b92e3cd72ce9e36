"""What a part of gpu_report.py does in its process: check, then time, pack_points, elle_loss and a step."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.harness.clock import Call, Clock
from benchmarks.ops.sizes import (
    BACKENDS,
    EPS,
    F32,
    LOSS_CASES,
    PACK_CASES,
    PACKED,
    LossCase,
    PackCase,
    dry_loss_cases,
    dry_pack_cases,
)
from elle_fast import AdaptiveLambda, ELLELoss, backends
from elle_fast._core.files import write_json
from elle_fast.functional import draw_seed, elle_loss, pack_points

ROOT = Path(__file__).resolve().parents[2]

Case = TypeVar("Case", PackCase, LossCase)


class Run:
    """What a part has: its clock, its time, and the file to which it writes what it has found."""

    def __init__(self, clock: Clock, path: Path, seconds: float, *, quick: bool) -> None:
        self.clock = clock
        self.quick = quick
        self.record: dict[str, Any] = {}
        self._path = path
        self._begin = time.monotonic()
        self._seconds = seconds

    def left(self) -> float:
        """The fraction of its time that is left."""
        return 1 - (time.monotonic() - self._begin) / self._seconds

    def save(self) -> None:
        """Write what has been found so far."""
        write_json(self._path, self.record)

    def each(self, cases: Sequence[Case], measure: Callable[[Run, Case, dict[str, Any]], None]) -> None:
        """Measure all cases for which there is time; one that fails is recorded with its error."""
        results = self.record.setdefault("cases", [])
        for case in cases:
            result: dict[str, Any] = {"case": case.name}
            results.append(result)
            if self.left() <= 0:
                result["skipped"] = "out of time"
            else:
                with recorded(result):
                    measure(self, case, result)
            self.save()
            self.clock.free()


@contextmanager
def recorded(result: dict[str, Any], name: str = "error") -> Iterator[None]:
    """An exception is written into the result instead of ending the part."""
    try:
        yield
    except Exception:
        result[name] = traceback.format_exc(limit=-8).replace(f"{ROOT}{os.sep}", "")[-4000:]
        print(result[name], flush=True)


def copy_rate(run: Run) -> float:
    """Bytes per second of a large copy on the device, read and written."""
    elements = 1 << (10 if run.clock.dry else 29)
    source = _random((elements,), run.clock.device, torch.bfloat16)
    target = torch.empty_like(source)
    timing = run.clock.events(lambda: target.copy_(source))
    if not torch.equal(target, source):
        raise AssertionError("a copy differs from its source")
    rate = 2 * elements * source.itemsize / timing.median
    run.record.setdefault("copy", []).append(
        {"bytes": 2 * elements * source.itemsize, "bytes_per_second": rate, **timing.microseconds()}
    )
    return rate


def add_timing(
    run: Run, result: dict[str, Any], what: str, backend: str, calls: Sequence[Call], replay: bool, repeatable: bool
) -> None:
    """Time calls that are the same but for their inputs; a large call has but one set of them."""
    entry = result["timings"].setdefault(what, {}).setdefault(backend, {})
    with recorded(result, f"error in {what}, {backend}"):
        entry["events"] = run.clock.events(calls[0]).microseconds()
        if len(calls) > 1:
            entry["host"] = run.clock.host(calls[0]).microseconds()
            if replay:
                entry["replay"] = run.clock.replay(calls, repeatable=repeatable).microseconds()
    run.save()


def add_ratios(result: dict[str, Any], what: str, moved: int, rate: float) -> None:
    """Bytes per second over those of the copy, and times of the reference over those of the kernels."""
    timings = result["timings"][what]
    ratios: dict[str, float] = {}
    kernel = timings["triton"]
    if "events" in kernel:
        ratios["of_copy_rate"] = moved / (1e-6 * kernel["events"]["median_us"]) / rate
    for clock in ("events", "replay"):
        for other in BACKENDS[1:]:
            if clock in kernel and clock in timings.get(other, {}):
                ratios[f"{clock}_{other}"] = timings[other][clock]["median_us"] / kernel[clock]["median_us"]
    result.setdefault("ratios", {})[what] = {name: float(f"{ratio:.4g}") for name, ratio in ratios.items()}


def eager_backends() -> dict[str, str]:
    """What is timed as it is, by its name in the report; the last one is the reference."""
    cuda = {} if backends.BACKENDS["cuda"].why_not() is not None else {"cuda": "cuda"}
    return {"triton": "triton", **cuda, "eager": "reference"}


def sets_of_inputs(run: Run, launch_bound: bool) -> int:
    """How many sets of inputs the calls rotate among."""
    if not launch_bound:
        return 1
    return 2 if run.clock.dry else 24


@contextmanager
def poisoned() -> Iterator[None]:
    """``torch.empty`` is filled with NaN, so that an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, device=device, dtype=dtype)


# ---- pack_points


class PackInputs(NamedTuple):
    """Fresh random inputs."""

    x: Tensor
    grad: Tensor
    seed: Tensor


def pack_inputs(case: PackCase, device: torch.device) -> PackInputs:
    """x uniform in [0, 1), a gradient with both signs and some zeros, a seed."""
    memory_format = torch.channels_last if case.channels_last else torch.contiguous_format
    x = _random(case.shape, device, case.dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    grad = torch.where(grad.abs() < 0.05, 0, grad)
    return PackInputs(x, grad, draw_seed(device))


def measure_pack(run: Run, case: PackCase, result: dict[str, Any]) -> None:
    """Check, then time, one case of pack_points."""

    def call(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def packed(x: Tensor, grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
            return pack_points(x, grad, EPS, seed=seed, backend=backend, **case.options)

        return packed

    rotated = [pack_inputs(case, run.clock.device) for _ in range(sets_of_inputs(run, case.launch_bound))]
    functions = {name: call(backend) for name, backend in eager_backends().items()}
    for name in list(functions)[:-1]:
        with poisoned():
            packed = functions[name](*rotated[0])
        result["check" if name == "triton" else f"check {name}"] = check_points(
            packed, functions["eager"](*rotated[0]), case
        )
        del packed
    # Translating takes seconds, of which the last cases may have none; tracing alone, a second on the CPU.
    if case.target or (run.left() > 0.3 and not run.clock.dry):
        with recorded(result, "error in pack, compiled"):
            compiled = run.clock.compiled(call("reference"))
            check_points(compiled(*rotated[0]), functions["eager"](*rotated[0]), case)
            functions["compiled"] = compiled
    result["bytes"] = case.bytes
    result["timings"] = {}
    for backend, function in functions.items():
        calls = [partial(function, *inputs) for inputs in rotated]
        add_timing(run, result, "pack", backend, calls, replay=True, repeatable=True)
    add_ratios(result, "pack", case.bytes, run.record["copy"][0]["bytes_per_second"])


def check_points(packed: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], case: PackCase) -> dict[str, Any]:
    """The largest error: at most 16 roundings in float32 and one step of the points' dtype, of the largest value.

    The l2 ball's lengths are sums over a sample, in another order in each backend: 1e-5 of the largest value more.
    """
    points, alpha = packed
    if (
        points.dtype != expected[0].dtype
        or points.stride() != expected[0].stride()
        or points.shape[1:] != case.shape[1:]
    ):
        raise AssertionError(f"got points {points.dtype} {points.stride()}, not as {expected[0].stride()}")
    largest = expected[0].abs().max().item()
    error = max(
        (ours.float() - theirs.float()).abs().max().item()
        for ours, theirs in zip(points.chunk(2 * PACKED), expected[0].chunk(2 * PACKED), strict=True)
    )
    roundings = 16 * 2.0**-24 + torch.finfo(points.dtype).eps + (1e-5 if case.options.get("norm") == "l2" else 0)
    allowed = largest * roundings
    if not error <= allowed:
        raise AssertionError(f"points differ from the reference's by {error:.3g}, more than {allowed:.3g}")
    torch.testing.assert_close(alpha, expected[1], rtol=0, atol=0)
    return {"largest_error": error, "allowed": allowed}


def part_pack_points(run: Run) -> None:
    """The cases of pack_points."""
    copy_rate(run)
    cases = dry_pack_cases() if run.clock.dry else PACK_CASES
    run.each([case for case in cases if case.target or not run.quick], measure_pack)
    copy_rate(run)


# ---- elle_loss


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
    # A mean that no E_lin exceeds: lam decays a little with each call.
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
        checked = check_loss(functions[name], loss_inputs(case, run.clock.device))
        result["check" if name == "triton" else f"check {name}"] = checked
    run.clock.free()
    if run.left() > 0.3 or case.target:
        with recorded(result, "error in forward and backward, compiled"):
            compiled = run.clock.compiled(call("reference"))
            check_loss(compiled, loss_inputs(case, run.clock.device), poison=False)
            functions["compiled"] = compiled
    # One controller, as compiled code may be made anew for each module that it is given.
    controller = _controller(run.clock.device)
    sets = range(sets_of_inputs(run, case.launch_bound))
    rotated = [loss_inputs(case, run.clock.device, controller) for _ in sets]
    result["timings"] = {}
    for backend, function in functions.items():
        for what, calls in loss_calls(function, rotated).items():
            # A backward on its own belongs to a forward on another stream than the capture's.
            replay = what != "backward"
            add_timing(run, result, what, backend, calls, replay=replay, repeatable=not case.adaptive)
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

    Beside that 32 roundings in float32 of the largest number involved, as an error of the reference may be 0 by chance.
    Triton's interpreter cuts numbers off to bfloat16 where the hardware rounds them: twice the error of a rounding.
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

    # What is compiled with poison has to be compiled again without.
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
    cases = dry_loss_cases() if run.clock.dry else LOSS_CASES
    run.each([case for case in cases if case.target or not run.quick], measure_loss)
    copy_rate(run)


# ---- The step


def part_step(run: Run) -> None:
    """One forward and backward of ELLE-A around a small network: times, launches, and that nothing waits."""
    device, batch, width = run.clock.device, *((4, 4) if run.clock.dry else (128, 32))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    ).to(device)
    size = 8 if run.clock.dry else 32
    x, y = _random((batch, 3, size, size), device, F32), torch.randint(10, (batch,), device=device)
    parameters = list(model.parameters())
    run.record.update(batch=batch, shape=[3, size, size], timings={"step": {}}, launches={}, without_sync={})

    def step(criterion: ELLELoss) -> tuple[Tensor, ...]:
        loss = criterion(model, x, y)
        return loss, *torch.autograd.grad(loss, parameters)

    losses = {}
    for name, backend in eager_backends().items():
        torch.manual_seed(1)
        losses[name] = step(ELLELoss(EPS, lam=10.0, bounds=(0.0, 1.0), backend=backend))[0].detach()
    # The points differ by a rounding, after which a convolution may differ by several; E_lin is what feels it.
    for loss in losses.values():
        torch.testing.assert_close(loss, losses["eager"], rtol=1e-3, atol=1e-5)
    for name, backend in eager_backends().items():
        criterion = ELLELoss(EPS, lam=10.0, bounds=(0.0, 1.0), adaptive=True, backend=backend).to(device)
        calls = [partial(step, criterion)] * 2
        with recorded(run.record, f"error in sync, {name}"):
            run.record["without_sync"][name] = False
            run.clock.without_sync(calls[0])
            run.record["without_sync"][name] = True
        add_timing(run, run.record, "step", name, calls, replay=True, repeatable=False)
        with recorded(run.record, f"error in launches, {name}"):
            run.record["launches"][name] = run.clock.launches(calls[0])
        run.save()
    rate = copy_rate(run)
    add_ratios(run.record, "step", 0, rate)
