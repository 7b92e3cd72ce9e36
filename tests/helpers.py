"""Shared by the tests: backends to test, an independent Philox, small models, and a guard against host syncs."""

from __future__ import annotations

import importlib.util
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from elle_fast import AdaptiveLambda, functional, methods
from elle_fast.backends import extension, triton_host
from elle_fast.testing import no_host_sync, use_isa
from tests.cuda_emulation.emulate import emulated

STREAM_PAIR, STREAM_SAMPLE, STREAM_START = 0, 1, 2


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1), the same values (up to rounding) in every dtype."""
    return torch.rand(shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def shown(value: object) -> str:
    """The id of a test's case: the same in every process, which a function's ``str`` is not."""
    if isinstance(value, dict):
        return ",".join(f"{name}={shown(v)}" for name, v in value.items()) or "defaults"
    return getattr(value, "__name__", str(value))


def labels(batch: int, classes: int, seed: int = 7) -> Tensor:
    return torch.randint(classes, (batch,), generator=rng(seed))


def probabilities(batch: int, classes: int, seed: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, classes, generator=rng(seed), dtype=torch.float64).softmax(dim=1).to(dtype)


# ---- Training methods by name


def built(name: str, **options: Any) -> Any:
    """The criterion of a method, with what it cannot be built without."""
    takes = methods.find(name).takes
    needed = {"samples": 64} if "samples" in takes else {}
    if name.partition("+")[0].endswith("-cs"):
        needed["epoch_steps"] = 3
    return methods.build(name, **needed | options)


def about(criterion: Any, x: Tensor) -> dict[str, Any]:
    """What a criterion takes beside a batch: the places of its samples, for one that keeps something for each."""
    return {"samples": torch.arange(len(x), device=x.device)} if getattr(criterion, "per_sample", False) else {}


class Called:
    """``(model, x, target) -> loss``: a criterion that is given the places of its samples, too."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion

    def __call__(self, model: Any, x: Tensor, target: Any, **options: Any) -> Tensor:
        loss: Tensor = self.criterion(model, x, target, **about(self.criterion, x), **options)
        return loss


# ---- Where the tests of the ops run


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: str) -> Tensor:
        memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
        return memory.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.cpu(), None


def moved(value: Any, device: str) -> Any:
    """A tensor of the CPU on ``device``, with its strides and its alignment, which ``Tensor.to`` would not keep."""
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    return _Moved.apply(value, device)


class Where(NamedTuple):
    """A backend on a device. Runs the public functions there; arguments and results are on the CPU."""

    backend: str
    device: str
    isa: str = ""  # the instruction set of the compiled kernels

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of points and logits."""
        low = (torch.float32, torch.float16, torch.bfloat16)
        return (torch.float64, *low) if self.backend == "reference" else low

    @property
    def exact(self) -> torch.dtype:
        """The widest of them."""
        return self.dtypes[0]

    @property
    def slow(self) -> bool:
        """Whether large tensors take seconds."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"

    @property
    def name(self) -> str:
        return "-".join([self.backend, *([] if self.device == "cpu" else [self.device]), *filter(None, [self.isa])])

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        marks = [] if self.device == "cpu" else [pytest.mark.gpu]
        if (self.backend, self.device) != ("reference", "cpu") and self != WIDEST:
            marks.append(pytest.mark.other_kernels)
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            marks.append(pytest.mark.skip(reason="Triton is not installed"))
        return marks

    def takes(self, value: object) -> bool:
        """Whether every dtype in ``value``, a dtype or a tuple with dtypes, is one of its own."""
        values = value if isinstance(value, tuple) else (value,)
        return all(v in self.dtypes for v in values if isinstance(v, torch.dtype))

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """``function`` on the device, which must not wait for it and must leave its arguments alone."""
        args = tuple(moved(a, self.device) for a in args)
        options = {name: moved(value, self.device) for name, value in options.items()}
        tensors = [a.detach() for a in (*args, *options.values()) if isinstance(a, Tensor)]
        before = [t.clone() for t in tensors]
        with no_host_sync(), use_isa(self.isa):
            result = function(*args, backend=self.backend, **options)
        assert all(same_values(b, t) for b, t in zip(before, tensors, strict=True))
        return tuple(r.cpu() for r in result) if isinstance(result, tuple) else result.cpu()

    def pack_points(self, x: Tensor, grad: Tensor | None, eps: float, **options: Any) -> tuple[Tensor, Tensor]:
        packed: tuple[Tensor, Tensor] = self.call(functional.pack_points, x, grad, eps, **options)
        return packed

    def random_start(self, x: Tensor, eps: float, **options: Any) -> Tensor:
        start: Tensor = self.call(functional.random_start, x, eps, **options)
        return start

    def elle_loss(
        self, logits: Tensor, target: Tensor, alpha: Tensor, lam: Any, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        values: tuple[Tensor, Tensor, Tensor] = self.call(functional.elle_loss, logits, target, alpha, lam, **options)
        return values

    def local_linearity(self, logits: Tensor, target: Tensor, alpha: Tensor, **options: Any) -> Tensor:
        e_lin: Tensor = self.call(functional.local_linearity, logits, target, alpha, **options)
        return e_lin

    def update(self, controller: AdaptiveLambda, e_lin: Tensor) -> Tensor:
        lam: Tensor = self.call(controller.update, e_lin)
        return lam


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """As many threads for the kernels, and for torch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, but for the signs of zeros and the kinds of NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _wheres() -> list[Where]:
    """Every test of an op runs over these: a new backend joins by one entry."""
    wheres = [Where("reference", "cpu")]
    if (module := extension.load()) is not None:
        wheres += [Where("cpp", "cpu", isa) for isa in module.isas()]
    if emulated():  # tests/test_cuda_emulation.py
        return [Where("cuda", "cpu")]
    if not torch.cuda.is_available():
        return [*wheres, Where("triton", "cpu")]
    if module is not None and module.cuda_built():
        wheres.append(Where("cuda", "cuda"))
    return [*wheres, Where("triton", "cuda"), Where("reference", "cuda")]


WHERES = _wheres()
WIDEST = next((where for where in WHERES if where.backend == "cpp"), None)  # the instruction set that is used


def matrix(share: float = 1.0, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test over ``where`` and every combination of ``axes`` whose dtypes are taken there.

    A Triton kernel is slow in the interpreter and compiled for each combination on a GPU. So it gets a fixed
    pseudo-random ``share`` of them (a third of that without a GPU, so that all tests take less than 12 minutes on two
    cores), and what it takes of the rest for every two values of two axes to meet; and so do the emulated CUDA kernels
    and instruction sets that are not the widest.
    """
    cases = []
    if not torch.cuda.is_available():
        share /= 3
    for where in WHERES:
        product = list(
            itertools.product(*([v for v in values if where.takes(v)] for values in map(list, axes.values())))
        )
        kept = product if where.backend == "reference" or where == WIDEST else _thinned(product, share)
        cases += [
            pytest.param(where, *case, marks=where.marks, id="-".join([where.name, *map(shown, case)])) for case in kept
        ]
    return pytest.mark.parametrize(["where", *axes], cases)


def _thinned(cases: list[tuple[Any, ...]], share: float) -> list[tuple[Any, ...]]:
    names = [tuple(map(shown, case)) for case in cases]
    seen: set[Any] = set()
    kept = set()
    for place, i in enumerate(sorted(range(len(cases)), key=lambda i: (zlib.crc32(repr(names[i]).encode()), i))):
        pairs = set(itertools.combinations(enumerate(names[i]), 2))
        if place < share * len(cases) or not pairs <= seen:
            kept.add(i)
            seen |= pairs
    return [case for i, case in enumerate(cases) if i in kept]


# ---- Philox in Python's integers, which know no width: written from the paper's definition, not from the package.


@lru_cache(maxsize=1 << 18)
def philox_ints(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 1 << 32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 1 << 32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return x0, x1, x2, x3


def block_words(seed: int, sample: int, block: int, stream: int, triplet: int = 0) -> tuple[int, int, int, int]:
    bits = seed % (1 << 64)
    counter = (block % (1 << 32), block >> 32, sample, stream + 256 * triplet)
    return philox_ints(counter, (bits % (1 << 32), bits >> 32))


def pair_word(seed: int, sample: int, element: int, triplet: int, which: int) -> int:
    """Word of x_a (which = 0) or x_b (1)."""
    return block_words(seed, sample, element // 2, STREAM_PAIR, triplet)[2 * (element % 2) + which]


def start_word(seed: int, sample: int, element: int) -> int:
    return block_words(seed, sample, element // 4, STREAM_START)[element % 4]


def sample_word(seed: int, sample: int, triplet: int, place: int) -> int:
    """place: 0 alpha, 1 radius of x_a, 2 of x_b, 3 of the attack's start."""
    return block_words(seed, sample, 0, STREAM_SAMPLE, triplet)[place]


def unit(word: int) -> float:
    return (word >> 8) / (1 << 24)


# ---- Models


class Smooth(nn.Module):
    """A small smooth classifier of flattened inputs, so that E_lin is neither zero nor at a kink."""

    def __init__(self, features: int, classes: int, hidden: int = 8, seed: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Linear(features, hidden), nn.Linear(hidden, classes)
        with torch.no_grad():
            self.first.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(x.flatten(1))))
        return out


def convnet(classes: int = 4, channels: int = 3, norm: bool = True, dropout: bool = False, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(channels, 6, 3, padding=1)]
        layers += [nn.BatchNorm2d(6)] if norm else []
        layers += [nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, stride=2), nn.ReLU()]
        layers += [nn.Dropout(0.3)] if dropout else []
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, classes)]
        return nn.Sequential(*layers)


class MustNotBeCalled(nn.Module):
    """A model for tests of bad input, which has to be refused before any work is done."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model was called before the input was checked")


# ---- Guards

# NumPy, in which the interpreter computes, warns of what the hardware does in silence.
not_finite = pytest.mark.filterwarnings(
    "ignore:(invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning"
)


class Recorder(TorchDispatchMode):
    """Records the ATen calls, forward and backward, as (name, args, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args, result))
        return result


def poison_uninitialised_memory() -> Any:
    """Generator for a fixture: ``torch.empty`` is filled with NaN, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    # Warnings only: on a GPU some operators of the tests' models have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)


def let_kernels_write_nothing(monkeypatch: pytest.MonkeyPatch) -> Where:
    """Where a Triton kernel then leaves what it was given; skips the test where there is no Triton that will do."""
    if (reason := triton_host.why_not()) is not None:
        pytest.skip(reason)
    from triton.runtime import interpreter, jit

    for kind in (interpreter.InterpretedFunction, jit.JITFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *args, **constants: None)
    found = [where for where in WHERES if where.backend == "triton"]
    return found[0] if found else pytest.skip("not with an emulated extension")


# ---- Independent formulas


def log_softmax64(logits: Any) -> Any:
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def soft_target64(target: Tensor, classes: int, label_smoothing: float = 0.0) -> Any:
    """Probabilities ``[B, C]`` of any target, smoothed as the textbook says: (1 - s) q + s / C."""
    if target.is_floating_point():
        q = target.double().numpy()
    else:
        q = np.zeros((target.shape[0], classes))
        q[np.arange(target.shape[0]), target.numpy()] = 1
    return (1 - label_smoothing) * q + label_smoothing / classes


def cross_entropy64(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Any:
    q = soft_target64(target, logits.shape[1], label_smoothing)
    return -(q * log_softmax64(logits.detach().double().numpy())).sum(axis=1)


def grads_of(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))
