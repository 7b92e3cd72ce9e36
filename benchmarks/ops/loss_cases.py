"""elle_loss forward and backward, the fixed cost of a call, and torch's own threads: cases of bench_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.device import compiled
from benchmarks.harness.timing import Side
from benchmarks.ops import plain_torch
from benchmarks.ops.sides import Case, kernels
from benchmarks.ops.sizes import EPS, SMALL, LossCase
from elle_fast import AdaptiveLambda, functional
from elle_fast.testing import use_isa

LAM = 4000.0
# The targets' sizes as rows of logits, and the same numbers as samples of four rows each.
LOSSES = (LossCase(512, 10), LossCase(2048, 10), LossCase(1024, 1000), LossCase(4096, 1000))
CALL_US = 30.0  # the target of a call's fixed cost
FIXED = (
    "draw_seed",
    "random_start",
    "pack_points",
    "elle_loss",
    "elle_loss-no-grad",
    "elle_loss-adaptive",
    "local_linearity",
    "AdaptiveLambda.update",
)
MATMUL = ("alone", "after-pack_points", "after-torch-cat")


def loss_name(form: LossCase) -> str:
    """Of the case."""
    return f"elle_loss-{form.rows}x{form.classes}-fp32"


def fixed_name(function: str) -> str:
    """Of the case."""
    return f"fixed-cost-{function}"


def cases(dry: bool) -> list[Case]:
    """elle_loss, the fixed cost of each public function, and torch's matmul between calls; ``dry``: tiny sizes."""
    found = [Case(loss_name(form), partial(_prepare_loss, dry, form)) for form in LOSSES]
    for function in FIXED:
        # A seed comes from torch's generator, whatever the backend.
        names = ("torch",) if function == "draw_seed" else (*kernels()[:1], "eager-reference")
        found.append(Case(fixed_name(function), partial(_prepare_fixed, function, names), threads=1))
    if kernels():
        found.append(Case("matmul-between-calls", partial(_prepare_matmul, dry)))
    return found


# ---- elle_loss, forward and backward


def _prepare_loss(dry: bool, form: LossCase) -> dict[str, Side | str]:
    classes, batch = (10, 4) if dry else (form.classes, form.rows // 4)
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4 * batch, classes, generator=generator)).requires_grad_()
    target = torch.randint(classes, (batch,), generator=generator)
    alpha = torch.rand(batch, generator=generator)

    def reference(logits: Tensor, target: Tensor, alpha: Tensor) -> Any:
        return functional.elle_loss(logits, target, alpha, LAM, backend="reference")

    def plain(logits: Tensor, target: Tensor, alpha: Tensor) -> Any:
        return plain_torch.elle_loss(logits, target, alpha, LAM)

    def there_and_back(function: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        loss = function(logits, target, alpha)[0]
        logits.grad = None
        loss.backward()
        assert logits.grad is not None
        return loss.detach(), logits.grad

    functions: dict[str, Callable[..., Any]] = {
        "eager-plain": plain,
        "eager-reference": reference,
        "compiled-plain": compiled(plain, dry=dry),
        "compiled-reference": compiled(reference, dry=dry),
    }
    sides: dict[str, Side | str] = {name: Side(partial(there_and_back, call)) for name, call in functions.items()}
    for name in kernels():
        backend, _, isa = name.partition("-")
        call = partial(functional.elle_loss, lam=LAM, backend=backend)
        sides[name] = Side(partial(there_and_back, call), isa=isa)
    exact = logits.detach().double().requires_grad_()
    loss = functional.elle_loss(exact, target, alpha, LAM, backend="reference")[0]
    loss.backward()
    assert exact.grad is not None
    _check_loss(sides, (loss.detach(), exact.grad))
    return sides


def _check_loss(sides: dict[str, Side | str], exact: tuple[Tensor, Tensor]) -> None:
    """Loss and gradient may be twice as far from float64 as torch's are in float32, and 8 eps more."""

    def errors(name: str) -> list[float]:
        side = sides[name]
        assert isinstance(side, Side)
        with use_isa(side.isa):
            found = side.call()
        return [(got - right).abs().max().item() for got, right in zip(found, exact, strict=True)]

    slack = [8 * torch.finfo(torch.float32).eps * right.abs().max().item() for right in exact]
    allowed = [2 * error + more for error, more in zip(errors("eager-reference"), slack, strict=True)]
    for name in sides:
        for what, error, most in zip(("loss", "gradient"), errors(name), allowed, strict=True):
            assert error <= most, f"{name}: {what} {error:g} from that in float64, {most:g} allowed"


# ---- The fixed cost of a call


def fixed_calls(backend: str, shape: tuple[int, ...] = (1, 4)) -> dict[str, Callable[[], Any]]:
    """A call of each public function on random inputs, the same each time: x of that shape, ten classes."""
    generator = torch.Generator().manual_seed(1)
    batch = shape[0]
    x, grad, alpha = (torch.rand(each, generator=generator) for each in (shape, shape, batch))
    logits = torch.randn(4 * batch, 10, generator=generator).requires_grad_()
    triplets = logits.detach()[batch:].clone().requires_grad_()
    seed, target, e_lin = (torch.tensor(value) for value in (1, [0] * batch, 0.5))
    controller = AdaptiveLambda(LAM)
    loss = partial(functional.elle_loss, logits, target, alpha, backend=backend)
    return {
        "draw_seed": partial(functional.draw_seed, x.device),
        "random_start": partial(functional.random_start, x, EPS, seed=seed, backend=backend),
        "pack_points": partial(functional.pack_points, x, grad, EPS, seed=seed, backend=backend),
        "elle_loss": partial(loss, LAM),
        "elle_loss-no-grad": partial(functional.elle_loss, logits.detach(), target, alpha, LAM, backend=backend),
        "elle_loss-adaptive": partial(loss, controller),
        "local_linearity": partial(functional.local_linearity, triplets, target, alpha, backend=backend),
        "AdaptiveLambda.update": partial(controller.update, e_lin, backend),
    }


def _prepare_fixed(function: str, names: tuple[str, ...]) -> dict[str, Side | str]:
    sides: dict[str, Side | str] = {}
    results = {}
    for name in names:
        backend, _, isa = ("reference", "", "") if name == "eager-reference" else name.partition("-")
        sides[name] = Side(fixed_calls(backend)[function], isa=isa)
        results[name] = fixed_calls(backend)[function]()
    _check_fixed(results)
    return sides


def _check_fixed(results: dict[str, Any]) -> None:
    """All backends give the same results, up to some roundings of float32."""
    for result in results.values():
        expected = results.get("eager-reference", result)
        torch.testing.assert_close(result, expected, rtol=64 * torch.finfo(torch.float32).eps, atol=1e-6)


# ---- Do our threads slow torch's down?


def _prepare_matmul(dry: bool) -> dict[str, Side | str]:
    size = 16 if dry else 512
    shape = (4, 3, 8, 8) if dry else SMALL
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    x, grad, seed = torch.rand(shape), torch.randn(shape), torch.tensor(1)
    backend = kernels()[0].partition("-")[0]
    pack = partial(functional.pack_points, x, grad, EPS, seed=seed, backend=backend)
    multiply = partial(torch.mm, a, b, out=out)
    # torch.cat moves as many bytes through the caches, with torch's own threads.
    others = (None, pack, partial(torch.cat, [x, grad, x, grad]))
    return {name: Side(multiply, before=before) for name, before in zip(MATMUL, others, strict=True)}
