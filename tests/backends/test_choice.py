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
from elle_fast.backends import extension, triton_host
from tests.helpers import MustNotBeCalled, labels, random, seed_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
built = pytest.mark.skipif(extension.load() is None, reason="the extension is not built")


@pytest.fixture
def an_extension(monkeypatch):
    """As on a machine where the CPU's kernels can run."""
    monkeypatch.setattr(extension, "_cpp_reason", lambda: None)


@pytest.fixture
def no_extension(monkeypatch):
    """As in an installation without a compiler."""
    monkeypatch.setattr(extension, "_file", lambda: None)
    monkeypatch.setattr(extension, "_FAILURE", types.SimpleNamespace(read_text=lambda encoding: "g++: not found\n"))
    cached = (extension._loaded, extension._cpp_reason, extension._cuda_reason)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """As on a machine with a GPU: Triton can run, and not on the CPU."""
    monkeypatch.setattr(triton_host, "_reason", lambda: None)
    monkeypatch.setattr(triton_host, "interpreted", lambda: False)


def test_auto(a_gpu, an_extension, monkeypatch):
    names, fast = ("x", "grad"), (torch.float32, torch.bfloat16)
    assert backends.choose("auto", CUDA, names, fast) == "triton"
    assert backends.choose("auto", CUDA, names, (torch.float16, None)) == "triton"
    assert backends.choose("auto", CPU, names, fast) == "cpp"
    assert backends.choose("auto", torch.device("mps"), names, fast) == "reference"
    # What the kernels do not take goes to the reference as it is; nothing is cast without a word.
    assert backends.choose("auto", CUDA, names, (torch.float32, torch.float64)) == "reference"
    assert backends.choose("auto", CUDA, names, fast, constant=False) == "reference"
    assert backends.choose("auto", torch.device("xpu"), names, fast) == "triton"
    # The kernels of the one that is there.
    monkeypatch.setattr(triton_host, "_reason", lambda: "no Triton")
    monkeypatch.setattr(extension, "_cuda_reason", lambda: None)
    assert backends.choose("auto", CUDA, names, fast) == "cuda"
    monkeypatch.setattr(extension, "_cuda_reason", lambda: "built without CUDA")
    assert backends.choose("auto", CUDA, names, fast) == "reference"
    assert backends.choose("auto", torch.device("xpu"), names, fast) == "reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_auto_on_the_cpu(an_extension, dtype):
    assert backends.choose("auto", CPU, ("x", "grad"), (dtype, None)) == "cpp"
    assert backends.choose("auto", CPU, ("x", "grad"), (dtype, torch.float64)) == "reference"
    assert backends.choose("auto", CPU, ("x", "grad"), (dtype, dtype), constant=False) == "reference"
    chosen: list[str] = []

    def choose(z: torch.Tensor) -> torch.Tensor:
        chosen.append(backends.choose("auto", CPU, ("logits",), (dtype,)))
        return z.sum()

    z = torch.ones(3)
    choose(z)
    torch.func.grad(choose)(z)
    torch.func.vmap(choose)(z[None])
    with torch.autograd.forward_ad.dual_level():
        choose(z)
    choose(z)
    assert chosen == ["cpp", "reference", "reference", "reference", "cpp"]


@built
def test_auto_runs_the_extension_on_the_cpu():
    """The same bits as by name; of the loss the reference has others."""
    x, logits = random(3, 3, 8, 8, seed=1), 3 * torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
    found, expected = (
        [
            *functional.pack_points(x, x - 0.5, 0.1, seed=seed_of(1), backend=backend),
            functional.random_start(x, 0.1, seed=seed_of(1), backend=backend),
            *functional.elle_loss(logits, labels(3, 7), random(3, seed=2), 2.0, backend=backend),
        ]
        for backend in ("auto", "cpp")
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    wide = logits.double()
    assert functional.elle_loss(wide, labels(3, 7), random(3, seed=2), 2.0)[0].dtype == torch.float64
    target = torch.full((3, 7), 1 / 7, requires_grad=True)
    functional.elle_loss(logits, target, random(3, seed=2), 2.0)[0].backward()
    assert target.grad is not None


def test_without_the_extension(no_extension):
    assert backends.choose("auto", CPU, ("x",), (torch.float32,)) == "reference"
    x = random(2, 5, seed=1)
    points, _ = functional.pack_points(x, x - 0.5, 0.1, seed=seed_of(1))
    assert torch.equal(points, functional.pack_points(x, x - 0.5, 0.1, seed=seed_of(1), backend="reference")[0])
    for name in ("cpp", "cuda"):
        message = (
            rf"^backend: '{name}' is not available: the extension is not built; with g\+\+ or clang\+\+ in place, "
            r"`pip install .*` in a checkout builds it\. Its build failed:\n  g\+\+: not found$"
        )
        with pytest.raises(RuntimeError, match=message):
            ELLELoss(0.1, backend=name)
        with pytest.raises(RuntimeError, match=message):
            functional.pack_points(x, x, 0.1, seed=seed_of(1), backend=name)


@pytest.mark.parametrize("name, runs_on, device", [("cpp", "the CPU", "meta"), ("cuda", "CUDA devices", "cpu")])
def test_tensors_on_another_device(an_extension, monkeypatch, name, runs_on, device):
    monkeypatch.setattr(extension, "_cuda_reason", lambda: None)
    x, seed = random(8, 5, seed=1).to(device), seed_of(1).to(device)
    message = (
        rf"^backend: expected tensors on {runs_on} with backend='{name}', got {device}; "
        r"backend='auto' takes what serves that device$"
    )
    with pytest.raises(ValueError, match=message):
        functional.pack_points(x, x, 0.1, seed=seed, backend=name)
    with pytest.raises(ValueError, match=message):
        functional.random_start(x, 0.1, seed=seed, backend=name)
    with pytest.raises(ValueError, match=message):
        functional.elle_loss(x, labels(2, 5).to(device), x[0, :2], 1.0, backend=name)
    with pytest.raises(ValueError, match=message):
        AdaptiveLambda(1.0).to(device).update(x[0, 0], backend=name)


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


def pack(x: torch.Tensor, grad: torch.Tensor | None, backend: str, **options: Any) -> Any:
    return functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend=backend, **options)


named = pytest.mark.parametrize("backend", ["triton", pytest.param("cpp", marks=built)])


@named
@pytest.mark.parametrize(
    "call, name",
    [
        (lambda x, wide, b: pack(wide, wide, b), "x"),
        (lambda x, wide, b: pack(x, wide, b), "grad or x_adv"),
        (lambda x, wide, b: pack(x, None, b, x_adv=wide), "grad or x_adv"),
        (lambda x, wide, b: pack(x, x, b, dtype=torch.float64), "dtype"),
        (lambda x, wide, b: functional.random_start(wide, 0.1, seed=seed_of(1), backend=b), "x"),
        (lambda x, wide, b: functional.elle_loss(wide, labels(2, 5), x[0, :2], 1.0, backend=b), "logits"),
        (lambda x, wide, b: functional.local_linearity(wide[2:], labels(2, 5), x[0, :2], backend=b), "logits"),
    ],
)
def test_float64_given_to_kernels(call, name, backend):
    x = random(8, 5, seed=1)
    message = (
        rf"^{name}: expected float32, float16 or bfloat16 with backend='{backend}', got torch.float64; backend='auto'"
    )
    with pytest.raises(TypeError, match=message):
        call(x, x.double(), backend)


@named
@pytest.mark.parametrize("name", ["alpha", "target", "lam"])
def test_what_only_the_reference_differentiates(name, backend):
    tensors: dict[str, Any] = {
        "alpha": random(2, seed=1),
        "target": torch.full((2, 5), 0.2),
        "lam": torch.tensor(2.0),
    }
    tensors[name].requires_grad_()
    logits = random(8, 5, seed=2)
    with pytest.raises(
        ValueError, match=rf"^target, alpha, lam: expected tensors that require no grad with backend='{backend}'"
    ):
        functional.elle_loss(logits, **tensors, backend=backend)
    loss, _, _ = functional.elle_loss(logits, **tensors)
    (grad,) = torch.autograd.grad(loss, tensors[name])
    assert grad.abs().max().item() > 0


def test_a_triton_that_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.1.0"))
    triton_host._reason.cache_clear()
    try:
        with pytest.raises(
            RuntimeError, match=r"^backend: 'triton' is not available: Triton 3\.\d or newer is needed, got 3\.1\.0"
        ):
            ELLELoss(0.1, backend="triton")
    finally:
        triton_host._reason.cache_clear()


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


WITH_ISA = """
import elle_fast
import torch
from elle_fast import ELLELoss, functional
x = torch.rand(2, 5)
pack = lambda backend: functional.pack_points(x, x, 0.1, seed=torch.tensor(1), backend=backend)
pack("reference")
for call in (lambda: pack("auto"), lambda: pack("cpp"), lambda: ELLELoss(0.1, backend="cpp")):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@built
@pytest.mark.parametrize("name", ["wrong", "neon"])
def test_an_instruction_set_that_is_not_there(name):
    """Unknown, of another machine: said where it is first used, and not by the import."""
    done = run(WITH_ISA, ELLE_FAST_ISA=name)
    assert (done.returncode, done.stderr) == (0, "")
    for said in done.stdout.splitlines():
        assert said.startswith("ELLE_FAST_ISA: expected an instruction set that this machine and this build have (")
        assert said.endswith(f"baseline), got {name!r}")
    assert len(done.stdout.splitlines()) == 3


INTERPRETED = """
import torch
from elle_fast import backends, functional
x = torch.rand(2, 5)
assert backends.choose("auto", x.device, ("x",), (x.dtype,)) != "triton"
points = [functional.pack_points(x, x, 0.1, seed=torch.tensor(1), backend=b)[0] for b in ("triton", "reference")]
assert torch.equal(*points)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_interpreter_runs_by_name_alone():
    pytest.importorskip("triton")
    done = run(INTERPRETED, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@named
def test_the_backend_is_checked_before_the_model_runs(backend):
    x = random(2, 5, seed=1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"^x: expected float32"):
        ELLELoss(0.1, attack="none", backend=backend)(MustNotBeCalled(), x, labels(2, 3))
