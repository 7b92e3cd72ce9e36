"""The choice of a backend, and what is said where one cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from elle_fast import AdaptiveLambda, ELLELoss, backends, functional
from elle_fast.ops import triton_support
from tests.helpers import MustNotBeCalled, labels, random, seed_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine with a GPU: Triton can run, and not on the CPU."""
    monkeypatch.setattr(triton_support, "_reason", lambda: None)
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)


def test_auto(a_gpu, monkeypatch):
    names, fast = ("x", "grad"), (torch.float32, torch.bfloat16)
    assert backends.choose("auto", CUDA, names, fast) == "triton"
    assert backends.choose("auto", CUDA, names, (torch.float16, None)) == "triton"
    assert backends.choose("auto", CPU, names, fast) == "reference"
    assert backends.choose("auto", torch.device("mps"), names, fast) == "reference"
    # What the kernels do not take goes to the reference as it is; nothing is cast without a word.
    assert backends.choose("auto", CUDA, names, (torch.float32, torch.float64)) == "reference"
    assert backends.choose("auto", CUDA, names, fast, constant=False) == "reference"
    monkeypatch.setattr(triton_support, "_reason", lambda: "no Triton")
    assert backends.choose("auto", CUDA, names, fast) == "reference"


def test_float64_goes_to_the_reference_and_keeps_its_precision():
    x = random(2, 5, seed=1, dtype=torch.float64)
    points, alpha = functional.pack_points(x, x - 0.5, 0.1, seed=seed_of(1))
    assert points.dtype == alpha.dtype == torch.float64


def test_tensors_on_the_cpu(a_gpu):
    x = random(2, 5, seed=1)
    message = (
        r"^backend: expected tensors on CUDA, ROCm and XPU devices with backend='triton', got cpu; backend='auto' takes"
    )
    with pytest.raises(ValueError, match=message):
        functional.pack_points(x, x, 0.1, seed=seed_of(1), backend="triton")
    with pytest.raises(ValueError, match=message):
        functional.random_start(x, 0.1, seed=seed_of(1), backend="triton")
    with pytest.raises(ValueError, match=message):
        functional.elle_loss(random(8, 3, seed=1), labels(2, 3), random(2, seed=2), 1.0, backend="triton")
    with pytest.raises(ValueError, match=message):
        AdaptiveLambda(1.0).update(torch.tensor(0.5), backend="triton")


def pack(x: torch.Tensor, grad: torch.Tensor | None, **options: Any) -> Any:
    return functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend="triton", **options)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x, wide: pack(wide, wide), "x"),
        (lambda x, wide: pack(x, wide), "grad or x_adv"),
        (lambda x, wide: pack(x, None, x_adv=wide), "grad or x_adv"),
        (lambda x, wide: pack(x, x, dtype=torch.float64), "dtype"),
        (lambda x, wide: functional.random_start(wide, 0.1, seed=seed_of(1), backend="triton"), "x"),
        (lambda x, wide: functional.elle_loss(wide, labels(2, 5), x[0, :2], 1.0, backend="triton"), "logits"),
        (lambda x, wide: functional.local_linearity(wide[2:], labels(2, 5), x[0, :2], backend="triton"), "logits"),
    ],
)
def test_float64_given_to_triton(call, name):
    x = random(8, 5, seed=1)
    message = (
        rf"^{name}: expected float32, float16 or bfloat16 with backend='triton', got torch.float64; backend='auto'"
    )
    with pytest.raises(TypeError, match=message):
        call(x, x.double())


@pytest.mark.parametrize("name", ["alpha", "target", "lam"])
def test_what_only_the_reference_differentiates(name):
    tensors: dict[str, Any] = {
        "alpha": random(2, seed=1),
        "target": torch.full((2, 5), 0.2),
        "lam": torch.tensor(2.0),
    }
    tensors[name].requires_grad_()
    logits = random(8, 5, seed=2)
    with pytest.raises(
        ValueError, match=r"^target, alpha, lam: expected tensors that require no grad with backend='triton'"
    ):
        functional.elle_loss(logits, **tensors, backend="triton")
    loss, _, _ = functional.elle_loss(logits, **tensors)
    (grad,) = torch.autograd.grad(loss, tensors[name])
    assert grad.abs().max().item() > 0


def test_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.1.0"))
    triton_support._reason.cache_clear()
    try:
        with pytest.raises(
            RuntimeError, match=r"^backend: 'triton' is not available: Triton 3\.\d or newer is needed, got 3\.1\.0"
        ):
            ELLELoss(0.1, backend="triton")
    finally:
        triton_support._reason.cache_clear()


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env={**kept, **environment}
    )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # its import fails
import torch
from elle_fast import ELLELoss, backends
model = torch.nn.Linear(4, 3)
loss = ELLELoss(0.1)(model, torch.rand(2, 4), torch.tensor([0, 1]))
loss.backward()
assert backends.choose("auto", torch.device("cuda"), ("x",), (torch.float32,)) == "reference"
ELLELoss(0.1, backend="triton")
"""


def test_without_triton():
    done = run(WITHOUT_TRITON)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'triton' is not available: Triton cannot be imported")
    assert "pip install triton" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_and_without_the_interpreter():
    done = run("from elle_fast import ELLELoss; ELLELoss(0.1, backend='triton')")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: backend: 'triton' is not available: torch sees no CUDA, ROCm or XPU device")
    assert "TRITON_INTERPRET=1" in last


def test_the_backend_is_checked_before_the_model_runs():
    x = random(2, 5, seed=1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^x: expected float32"):
        ELLELoss(0.1, attack="none", backend="triton")(MustNotBeCalled(), x, labels(2, 3))
