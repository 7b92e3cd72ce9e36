"""The operators in a graph, under autocast, in checkpoints; and the path past the dispatcher in eager mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from elle_fast import AdaptiveLambda, ELLELoss, functional
from elle_fast.backends import extension
from elle_fast.ops import dispatch
from elle_fast.ops.elle_loss import triton as loss_triton
from elle_fast.ops.elle_loss import triton_reduce
from elle_fast.ops.elle_loss.schema import ELLE_LOSS
from elle_fast.ops.elle_loss.validation import FIXED, LamRule, Linearity
from elle_fast.ops.pack_points import triton as pack_triton
from elle_fast.ops.pack_points.op import statistics as statistics_of
from elle_fast.ops.pack_points.validation import Packing
from elle_fast.testing import no_host_sync, no_launches
from tests.helpers import Recorder, Smooth, labels, random, rng, seed_of

# Everything here is on the CPU, where Triton's kernels run in its interpreter.
interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
built = pytest.mark.skipif(extension.load() is None, reason="the extension is not built")
KERNELS = [pytest.param("triton", marks=interpreter), pytest.param("cpp", marks=built)]
kernels = pytest.mark.parametrize("backend", KERNELS)
backends = pytest.mark.parametrize("backend", ["reference", *KERNELS])

pytestmark = [
    # torch's compiler warns of its own doings: of every autograd.Function that it meets, of parts of itself.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- opcheck

PACKINGS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "all": {
        "bounds": (0.0, 1.0),
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.2, 0.3),
        "start": 1.0,
        "project": True,
        "triplets": 2,
        "fraction": 0.5,
        "dtype": torch.bfloat16,
        "memory_format": torch.channels_last,
    },
    "l2": {"norm": "l2", "points": "elle-2p"},
}


@kernels
@pytest.mark.parametrize("name", PACKINGS)
def test_opcheck_pack_points(backend, name):
    packing = Packing.checked(0.1, **PACKINGS[name])
    statistics = statistics_of(packing, torch.device("cpu"))
    x, grad = random(3, 3, 4, 4, seed=1), random(3, 3, 4, 4, seed=2) - 0.5
    for given in ((grad, None), (None, grad)):
        opcheck(torch.ops.elle_fast.pack_points.default, (x, *given, None, seed_of(3), statistics, backend, *packing))
    opcheck(torch.ops.elle_fast.random_start.default, (x, seed_of(3), backend, *packing))
    # Of the options the start has its own alone: neither the statistics nor the kind of points.
    plain = packing._replace(memory_format=torch.preserve_format)
    start = torch.ops.elle_fast.random_start.default(x, seed_of(3), backend, *plain)
    own: dict[str, Any] = {"start": packing.start, "bounds": packing.bounds, "norm": packing.norm}
    expected = functional.random_start(x, 0.1, seed=seed_of(3), backend="reference", **own)
    assert torch.equal(start, expected)  # the l2 ball's radius is 0 here


def elle_state(window: int | None = None) -> list[Tensor]:
    return AdaptiveLambda(10.0, window=window).state(torch.device("cpu"))


@kernels
@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("adv", [True, False])
@pytest.mark.parametrize("lam", ["fixed", "adaptive", "window", "relative"])
def test_opcheck_elle_loss(backend, of, adv, lam):
    options = Linearity.checked(of=of, label_smoothing=0.1)._replace(adv=adv)
    logits, alpha = torch.randn(16 if adv else 12, 5, generator=rng(1)), random(4, seed=2)
    if lam == "relative" and of == "logits":
        pytest.skip("relative E_lin is of losses")
    known: dict[str, Any] = {"adaptive": {}, "window": {"window": 4}, "relative": {"rule": "relative"}}
    controller = AdaptiveLambda(10.0, **known.get(lam, {}))
    state = [] if lam == "fixed" else controller.state(torch.device("cpu"))
    fixed = (state, backend, *controller.numbers, *options)
    arguments = (logits, labels(4, 5), alpha, torch.tensor(2.0), *fixed)
    opcheck(torch.ops.elle_fast.elle_loss.default, arguments)
    saved = torch.ops.elle_fast.elle_loss.default(*arguments)[-1]
    one = torch.ones(())
    for upstream in ((one, None, None), (None, one, one)):
        rest = (saved, *upstream, backend, *options)
        opcheck(torch.ops.elle_fast.elle_loss_backward.default, (logits, labels(4, 5), alpha, *rest))


@kernels
@pytest.mark.parametrize("known", [{}, {"window": 4}, {"rule": "relative"}], ids=str)
def test_opcheck_update_lam(backend, known):
    controller = AdaptiveLambda(10.0, **known)
    state = controller.state(torch.device("cpu"))
    opcheck(torch.ops.elle_fast.update_lam.default, (torch.tensor(0.3), state, backend, *controller.numbers))


# ---- torch.compile


def pack(x: Tensor, grad: Tensor, seed: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    return functional.pack_points(x, grad, 0.1, seed=seed, backend=backend, **options)


@backends
@pytest.mark.parametrize("options", [{}, {"points": "five-point", "mean": [0.5] * 3, "std": [2.0] * 3}], ids=str)
def test_pack_points_compiles_into_one_graph(backend, options):
    counter = CompileCounter()
    compiled = torch.compile(pack, backend=counter, fullgraph=True, dynamic=True)
    for batch, seed in ((4, 1), (4, 2), (7, 3), (9, 3)):
        x, grad = random(batch, 3, 5, 6, seed=batch), random(batch, 3, 5, 6, seed=batch + 1) - 0.5
        expected = pack(x, grad, seed_of(seed), backend, **options)
        found = compiled(x, grad, seed_of(seed), backend, **options)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert counter.frame_count == 1


@backends
def test_out_is_written_by_a_compiled_graph(backend):
    x, grad = random(4, 3, 5, 6, seed=1), random(4, 3, 5, 6, seed=2) - 0.5
    expected = pack(x, grad, seed_of(3), backend)
    out = (torch.zeros_like(expected[0]), torch.zeros_like(expected[1]))
    compiled = torch.compile(pack, backend="aot_eager", fullgraph=True)
    result = compiled(x, grad, seed_of(3), backend, out=out)
    assert all(torch.equal(kept, right) for kept, right in zip(out, expected, strict=True))
    assert all(torch.equal(got, right) for got, right in zip(result, expected, strict=True))


@backends
def test_a_fraction_of_a_batch_of_any_size_compiles(backend):
    counter = CompileCounter()
    compiled = torch.compile(pack, backend=counter, fullgraph=True, dynamic=True)
    for batch in (4, 6, 7, 10):
        x = random(batch, 3, 5, seed=batch)
        found = compiled(x, x - 0.5, seed_of(1), backend, fraction=0.5)
        assert torch.equal(found[0], pack(x, x - 0.5, seed_of(1), backend, fraction=0.5)[0])
    assert counter.frame_count == 1


@backends
@pytest.mark.parametrize("lam_kind", ["tensor", "adaptive", "adaptive, window"])
@pytest.mark.parametrize("of", ["loss", "logits"])
def test_elle_loss_compiles_into_one_graph(backend, lam_kind, of):
    """The batch, lam and its history change; the graph does not."""
    counter = CompileCounter()
    window = 4 if "window" in lam_kind else None
    controllers = [AdaptiveLambda(50.0, window=window) for _ in range(2)]

    def step(logits: Tensor, target: Tensor, alpha: Tensor, lam: Any) -> tuple[Tensor, ...]:
        return functional.elle_loss(logits * 1.0, target, alpha, lam, of=of, backend=backend)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for turn, batch in enumerate((4, 5, 5, 9, 4, 6)):
        scale = 20.0 if turn == 4 else 1.0
        base = scale * torch.randn(4 * batch, 5, generator=rng(turn))
        target, alpha = labels(batch, 5), random(batch, seed=turn)
        results = []
        for run, controller in zip((step, compiled), controllers, strict=True):
            lam = controller if "adaptive" in lam_kind else torch.tensor(float(turn))
            logits = base.clone().requires_grad_()
            values = run(logits, target, alpha, lam)
            (values[0] + 2 * values[1]).backward()
            results.append([*(v.detach() for v in values), logits.grad])
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert counter.frame_count == 1
    for one, other in zip(controllers[0].buffers(), controllers[1].buffers(), strict=True):
        assert torch.equal(one, other)
    if "adaptive" in lam_kind:
        assert controllers[0].count.item() == 6
        assert controllers[0].lam.item() > 0


@backends
@pytest.mark.parametrize("dynamic, most", [(None, 2), (True, 1)])
def test_lam_as_a_number_is_no_constant_of_the_graph(backend, dynamic, most):
    """Left to itself, torch takes the first number for a constant, and the second makes any float an input."""
    counter = CompileCounter()

    target, alpha = labels(4, 5), random(4, seed=1)

    def step(logits: Tensor, lam: float) -> Tensor:
        return functional.elle_loss(logits, target, alpha, lam, backend=backend)[0]

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    logits = torch.randn(16, 5, generator=rng(0))
    for lam in (1.0, 2.5, 3.5, 4.25):
        torch.testing.assert_close(compiled(logits, lam), step(logits, lam), rtol=2e-7, atol=0)
    assert counter.frame_count <= most


@kernels
def test_the_default_compiler_runs_the_kernels(backend):
    """Inductor: strides, dtypes and mutation as the fakes promised."""
    controller = AdaptiveLambda(50.0)

    def step(x: Tensor, grad: Tensor, seed: Tensor, weight: Tensor, target: Tensor, lam: Any) -> Tensor:
        points, alpha = pack(x, grad, seed, backend, memory_format=torch.channels_last)
        return functional.elle_loss(points.flatten(1) @ weight, target, alpha, lam, backend=backend)[0]

    compiled = torch.compile(step, fullgraph=True)
    other = AdaptiveLambda(50.0)
    for turn in range(5):
        x, weight = random(4, 3, 4, 4, seed=turn), torch.randn(48, 5, generator=rng(turn)).requires_grad_()
        rest = (x, x - 0.5, seed_of(turn))
        found = compiled(*rest, weight, labels(4, 5), controller)
        (found_grad,) = torch.autograd.grad(found, weight)
        expected = step(*rest, weight, labels(4, 5), other)
        (expected_grad,) = torch.autograd.grad(expected, weight)
        # Products of 48 terms of at most 1.1 * 3, summed in another order: 48 roundings each, and so in the gradient.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_grad, expected_grad, rtol=1e-3, atol=1e-4)
    assert controller.count.item() == other.count.item() == 5


# ---- Autocast, checkpoints, second derivatives


def step_values(model: torch.nn.Module, criterion: ELLELoss, x: Tensor, y: Tensor) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad()
    loss = criterion(model, x, y)
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [loss.detach(), criterion.stats["e_lin"], *grads]


@kernels
def test_a_step_gives_the_same_as_the_reference(backend):
    x, y = random(6, 12, seed=1), labels(6, 4)
    model = Smooth(12, 4, gain=3.0)
    found, expected = (
        step_values(model, ELLELoss(0.2, lam=10.0, adaptive=True, attack="rs-fgsm", backend=b), x, y)
        for b in (backend, "reference")
    )
    # The points have the same bits; the losses differ by some 20 roundings of numbers near 1, and so do the gradients.
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(backend, dtype):
    """The model runs in low precision; pack_points and elle_loss compute in float32 whatever they are given."""
    x, y = random(6, 12, seed=1), labels(6, 4)
    model = Smooth(12, 4, gain=3.0)
    results = []
    for name in ("reference", backend):
        with torch.autocast("cpu", dtype):
            values = step_values(model, ELLELoss(0.2, lam=10.0, backend=name), x, y)
        assert values[0].dtype == torch.float32
        results.append(values)
    # The same points and logits to the bit, so only the loss and its gradient differ: float32 roundings in the loss,
    # and one rounding to the model's dtype, taken through its layers, in the gradients.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-5, atol=2e-6)
    for one, other in zip(results[1][2:], results[0][2:], strict=True):
        assert (one - other).abs().max() <= 4 * unit * other.abs().max()


@kernels
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_activation_checkpointing(backend, reentrant):
    x, y = random(6, 12, seed=1), labels(6, 4)
    model = Smooth(12, 4, gain=3.0)

    class Checkpointed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, points: Tensor) -> Any:
            hidden = self.inner.first(points)
            return checkpoint(lambda h: self.inner.last(torch.tanh(h)), hidden, use_reentrant=reentrant)

    # The reentrant kind cannot give the gradient of the input alone, which the attack takes.
    options: dict[str, Any] = {"lam": 10.0, "backend": backend, "attack": "none" if reentrant else "fgsm"}
    plain = step_values(model, ELLELoss(0.2, **options), x, y)
    recomputed = step_values(Checkpointed(), ELLELoss(0.2, **options), x, y)
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


@kernels
def test_elle_loss_inside_a_checkpoint(backend):
    alpha, target = random(4, seed=1), labels(4, 5)
    logits = torch.randn(16, 5, generator=rng(0)).requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return functional.elle_loss(z, target, alpha, 3.0, backend=backend)[0]

    (plain,) = torch.autograd.grad(loss(logits), logits)
    (again,) = torch.autograd.grad(checkpoint(loss, logits, use_reentrant=False), logits)
    assert torch.equal(plain, again)


@kernels
def test_a_second_derivative_is_refused(backend):
    logits = torch.randn(16, 5, generator=rng(0)).requires_grad_()
    loss = functional.elle_loss(logits, labels(4, 5), random(4, seed=1), 3.0, backend=backend)[0]
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert grad.requires_grad  # and not a constant, which would be wrong without a word
    with pytest.raises(RuntimeError, match=r"^elle_loss: expected one backward pass, .*backend='reference'"):
        grad.square().sum().backward()


@kernels
def test_results_can_be_changed_in_place(backend):
    """As `loss /= n` for gradient accumulation does; the gradient keeps to what was computed."""
    logits = torch.randn(16, 5, generator=rng(0)).requires_grad_()
    call = lambda: functional.elle_loss(logits, labels(4, 5), random(4, seed=1), 3.0, backend=backend)  # noqa: E731
    (whole,) = torch.autograd.grad(call()[0], logits)
    loss, ce, e_lin = call()
    loss /= 4
    ce += 1
    (part,) = torch.autograd.grad(loss, logits)
    assert torch.equal(part, whole / 4)
    assert e_lin.item() == call()[2].item()


# ---- Past the dispatcher


@kernels
def test_eager_calls_take_the_short_way_and_give_the_same(backend):
    logits, alpha, target = torch.randn(16, 5, generator=rng(0)), random(4, seed=1), labels(4, 5)
    short = functional.elle_loss(logits, target, alpha, 2.0, backend=backend)
    with Recorder() as recorder:
        long = functional.elle_loss(logits, target, alpha, 2.0, backend=backend)
    assert [name for name, *_ in recorder.calls if name in ("elle_loss", "pack_points")] == ["elle_loss"]
    assert all(torch.equal(one, other) for one, other in zip(short, long, strict=True))


@kernels
def test_a_traced_graph_holds_the_operators(backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        points, alpha = pack(x, x - 0.5, seed_of(1), backend)
        return points, functional.elle_loss(logits, labels(4, 5), alpha, 2.0, backend=backend)[0]

    arguments = (random(4, 6, seed=1), torch.randn(16, 5, generator=rng(0)))
    for mode in ("real", "fake"):
        graph = make_fx(step, tracing_mode=mode)(*arguments)
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert "elle_fast.pack_points.default" in names
        assert "elle_fast.elle_loss.default" in names


@interpreter
@pytest.mark.parametrize("norm", ["linf", "l2"])
@no_launches()
def test_what_the_host_does_for_a_launch_waits_for_nothing(norm):
    """The guard sees into the launching code itself, which no operator hides here."""
    x = random(4, 3, 6, 6, seed=1).contiguous(memory_format=torch.channels_last)
    grad = random(4, 3, 6, 6, seed=2)[..., ::2].repeat(1, 1, 1, 2)
    packing = Packing.checked(
        0.1, norm=norm, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), bounds=(0.0, 1.0), fraction=0.5
    )
    statistics = statistics_of(packing, x.device)
    logits, target, alpha = torch.randn(16, 5, generator=rng(0)), labels(4, 5), random(4, seed=1)
    options = Linearity.checked()
    pack_triton.pack_points(x, grad, None, None, seed_of(1), statistics, packing)  # constants go to the device once
    loss_triton.elle_loss(logits, target, alpha, 1.0, [], FIXED, options)
    with no_host_sync():
        pack_triton.pack_points(x, grad, None, None, seed_of(1), statistics, packing)
        pack_triton.random_start(x, seed_of(1), packing)
        saved = loss_triton.elle_loss(
            logits.T.contiguous().T,
            target,
            alpha,
            0.0,
            elle_state(),
            LamRule(1.0, 0.9, 2.0, 3),
            options,
        )[-1]
        one = torch.ones(())
        loss_triton.elle_loss_backward(logits, target, alpha, saved, one, None, one, options)
        loss_triton.update_lam(one, elle_state(5), LamRule(1.0, 0.9, 2.0, 3))


@interpreter
def test_two_launches_forward_and_one_backward(monkeypatch):
    launched: list[str] = []
    assert ELLE_LOSS.kernel("triton") is loss_triton.elle_loss
    for name in ("rows_forward", "rows_backward"):
        monkeypatch.setattr(loss_triton, name, Counted(getattr(loss_triton, name), name, launched))
    for name in ("reduce_forward", "update_lam"):
        counted = Counted(getattr(triton_reduce, name), name, launched)
        monkeypatch.setattr(triton_reduce, name, counted)
    dispatch.forget_plans()
    for of, adaptive in itertools.product(("loss", "logits"), (False, True)):
        launched.clear()
        lam = AdaptiveLambda(3.0) if adaptive else 3.0
        logits = torch.randn(16, 5, generator=rng(0)).requires_grad_()
        loss = functional.elle_loss(logits, labels(4, 5), random(4, seed=1), lam, of=of, backend="triton")[0]
        assert launched == ["rows_forward", "reduce_forward"]
        loss.backward()
        assert launched == ["rows_forward", "reduce_forward", "rows_backward"]
    dispatch.forget_plans()


class Counted:
    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


# ---- What the kernels cannot follow


@backends
def test_the_state_of_elle_a_counts_its_versions(backend):
    """A graph that has saved lam must not go on with another value of it."""
    for with_loss in (False, True):
        controller = AdaptiveLambda(100.0, min_history=1)
        controller.update(torch.tensor(1.0), backend)
        weight = torch.tensor(2.0, requires_grad=True)
        product = weight * controller.lam
        if with_loss:
            logits = torch.randn(16, 5, generator=rng(0))
            functional.elle_loss(logits, labels(4, 5), random(4, seed=1), controller, backend=backend)
        else:
            controller.update(torch.tensor(1e3), backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@kernels
def test_transforms_of_torch_func_are_refused(backend):
    logits, target, alpha = torch.randn(16, 5, generator=rng(0)), labels(4, 5), random(4, seed=1)

    def loss(z: Tensor, name: str) -> Tensor:
        return functional.elle_loss(z, target, alpha, 2.0, backend=name)[0]

    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, "auto"), leaf)
    torch.testing.assert_close(torch.func.grad(lambda z: loss(z, "auto"))(logits), expected)
    with pytest.raises(RuntimeError, match=r"^backend: expected no torch\.func transform"):
        torch.func.grad(lambda z: loss(z, backend))(logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits))
        assert torch.autograd.forward_ad.unpack_dual(loss(dual, "auto")).tangent is not None
        with pytest.raises(RuntimeError, match=r"^backend: expected no torch\.func transform"):
            loss(dual, backend)


@kernels
@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize("label", [-1, 5, -100, 2**40])
def test_a_label_that_is_no_class_spoils_the_loss_and_the_gradient(backend, of, label):
    target = labels(4, 5)
    target[3] = label  # beyond the part that the regulariser looks at
    logits = torch.randn(4 + 3 * 2, 5, generator=rng(0)).requires_grad_()
    if backend == "cpp":  # which need not wait for a device to tell
        with pytest.raises(ValueError, match=rf"^target: expected class indices in \[0, 5\), got {label}$"):
            functional.elle_loss(logits, target, random(2, seed=1), 2.0, of=of, backend=backend)
        return
    loss = functional.elle_loss(logits, target, random(2, seed=1), 2.0, of=of, backend=backend)[0]
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert grad[3].isnan().all()


@kernels
def test_negated_views_are_read_as_what_they_are(backend):
    z = torch.randn(16, 5, generator=rng(0))
    arguments = (labels(4, 5), random(4, seed=1), 2.0)
    plain = functional.elle_loss(z, *arguments, backend=backend)
    view = functional.elle_loss(torch._neg_view(-z), *arguments, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(plain, view, strict=True))


@kernels
@pytest.mark.parametrize("place", [0, 1, 2], ids=["loss", "ce", "e_lin"])
def test_an_upstream_gradient_whose_negative_bit_is_set(backend, place):
    z = torch.randn(16, 5, generator=rng(0)).requires_grad_()
    arguments = (labels(4, 5), random(4, seed=1), 2.0)
    upstream = torch.tensor(2.0 + 3.0j).conj().imag
    assert upstream.is_neg()
    value = functional.elle_loss(z, *arguments, backend=backend)[place]
    (expected,) = torch.autograd.grad(value, z, torch.tensor(-3.0), retain_graph=True)
    (found,) = torch.autograd.grad(value, z, upstream)
    assert torch.equal(found, expected)


@kernels
def test_saved_tensors_that_a_hook_gives_back_strided(backend):
    z = torch.randn(16, 5, generator=rng(0)).requires_grad_()
    arguments = (labels(4, 5), random(4, seed=1), 2.0)
    (expected,) = torch.autograd.grad(functional.elle_loss(z, *arguments, backend=backend)[0], z)
    strided = lambda t: torch.stack([t, t], dim=-1)[..., 0]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(strided, lambda t: t):
        loss = functional.elle_loss(z, *arguments, backend=backend)[0]
    (found,) = torch.autograd.grad(loss, z)
    assert torch.equal(found, expected)


@kernels
@pytest.mark.parametrize("of", ["loss", "logits"])
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((64, 100), torch.bfloat16),  # the logits
        ((64, 100), torch.float64),
        ((16, 100), torch.float64),  # probabilities
        ((16,), torch.int32),  # labels, and alpha
        ((16,), torch.float64),
    ],
    ids=str,
)
def test_saved_tensors_that_a_hook_gives_back_in_another_dtype(backend, shape, dtype, of):
    """As to keep them in less memory. Read as what they were they would end beyond their memory."""
    z, alpha = torch.randn(64, 100, generator=rng(0)).requires_grad_(), random(16, seed=1)
    target = torch.softmax(torch.randn(16, 100, generator=rng(1)), 1) if shape == (16, 100) else labels(16, 100)

    def another(t: Tensor) -> Tensor:
        return t.to(dtype) if t.shape == shape and t.is_floating_point() == dtype.is_floating_point else t

    (expected,) = torch.autograd.grad(functional.elle_loss(z, target, alpha, 2.0, of=of, backend=backend)[0], z)
    with torch.autograd.graph.saved_tensors_hooks(another, lambda t: t):
        loss = functional.elle_loss(z, target, alpha, 2.0, of=of, backend=backend)[0]
    (found,) = torch.autograd.grad(loss, z)
    # Logits of up to 4, rounded to 2^-9 of them, move a probability by 2^-7 of it, and p - q by no more; and as much
    # again by the loss of the row.
    error = 2.0**-6 if dtype == torch.bfloat16 else 0.0
    assert (found - expected).abs().max() <= error * expected.abs().max()


@kernels
def test_a_call_while_another_thread_compiles(backend, monkeypatch):
    """torch.compiler.is_compiling() is then true for all threads."""
    z = torch.randn(16, 5, generator=rng(0)).requires_grad_()
    arguments = (labels(4, 5), random(4, seed=1), 2.0)
    x, options = random(2, 5, seed=1), {"seed": seed_of(1), "backend": backend}

    def results() -> list[Tensor]:
        loss = functional.elle_loss(z, *arguments, backend=backend)[0]
        packed = functional.pack_points(x, x - 0.5, 0.1, **options)
        return [loss, *torch.autograd.grad(loss, z), *packed, functional.random_start(x, 0.1, **options)]

    expected = results()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert all(map(torch.equal, results(), expected))


class Anew(Tensor):
    """Every function that takes one returns one, another object."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(cls) if isinstance(result, Tensor) else result


@kernels
def test_tensors_whose_functions_return_new_objects(backend):
    z, target, alpha = torch.randn(16, 5, generator=rng(0)), labels(4, 5), random(4, seed=1)
    expected = functional.elle_loss(z, target, alpha, 2.0, backend=backend)[0]
    x, grad, seed = random(2, 5, seed=1), random(2, 5, seed=2) - 0.5, seed_of(1)
    points = functional.pack_points(x, grad, 0.1, seed=seed, backend=backend)[0]
    start = functional.random_start(x, 0.1, seed=seed, backend=backend)
    for _ in range(2):
        found = functional.elle_loss(z, target.as_subclass(Anew), alpha.as_subclass(Anew), 2.0, backend=backend)[0]
        assert torch.equal(found, expected)
        for other in (
            functional.pack_points(x, grad.as_subclass(Anew), 0.1, seed=seed, backend=backend)[0],
            functional.pack_points(x, grad, 0.1, seed=seed.as_subclass(Anew), backend=backend)[0],
        ):
            assert torch.equal(other, points)
        assert torch.equal(functional.random_start(x, 0.1, seed=seed.as_subclass(Anew), backend=backend), start)


@kernels
def test_a_seed_and_a_lam_whose_negative_bit_is_set(backend):
    x, z, seed, lam = random(2, 5, seed=1), torch.randn(16, 5, generator=rng(0)), seed_of(7), torch.tensor(2.0)
    found, expected = (
        [
            *functional.pack_points(x, x - 0.5, 0.1, seed=seed, backend=backend),
            functional.random_start(x, 0.1, seed=seed, backend=backend),
            *functional.elle_loss(z, labels(4, 5), random(4, seed=1), lam, backend=backend),
        ]
        for seed, lam in ((torch._neg_view(-seed), torch._neg_view(-lam)), (seed, lam))
    )
    assert all(map(torch.equal, found, expected))


@kernels
def test_points_lie_as_those_of_the_reference_do(backend):
    """A negated view of a part of a channels-last tensor, whose copy without the sign is channels-last."""
    part = random(4, 3, 8, 8, seed=1).to(memory_format=torch.channels_last)[:, :, ::2]
    x, grad = torch._neg_view(part), random(4, 3, 4, 8, seed=2) - 0.5
    expected = functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend="reference")
    found = functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend=backend)
    given = torch.zeros_like(expected[0]), torch.zeros_like(expected[1])
    functional.pack_points(x, grad, 0.1, seed=seed_of(1), backend=backend, out=given)
    start = functional.random_start(x, 0.1, seed=seed_of(1), backend=backend)
    for points, _ in (found, given):
        assert torch.equal(points, expected[0])
        assert points.stride() == expected[0].stride()
    assert start.is_contiguous()
    assert torch.equal(start, functional.random_start(x, 0.1, seed=seed_of(1), backend="reference"))


@kernels
def test_operators_take_what_a_graph_has_detached(backend):
    """A compiler may leave out a detach, and hand the operator a tensor that requires grad."""
    x, grad = random(4, 6, seed=1).requires_grad_(), (random(4, 6, seed=2) - 0.5).requires_grad_()

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            seed = torch.zeros((), dtype=torch.int64)
            points = functional.pack_points(x.detach(), grad.detach(), 0.1, seed=seed, backend=backend)[0]
            return points, functional.random_start(x.detach(), 0.1, seed=seed, backend=backend)

    expected = Module()(x, grad)
    found = torch.export.export(Module(), (x, grad)).module()(x, grad)
    assert all(map(torch.equal, found, expected))
    packing = Packing.checked(0.1)
    direct = torch.ops.elle_fast.pack_points.default(x, grad, None, None, seed_of(0), None, backend, *packing)[0]
    assert torch.equal(direct, expected[0])


@kernels
def test_tensors_that_wrap_others_go_to_the_reference(backend):
    from torch.testing._internal.two_tensor import TwoTensor

    z, target, alpha = torch.randn(16, 5, generator=rng(0)), labels(4, 5), random(4, seed=1)
    expected = functional.elle_loss(z, target, alpha, 2.0, backend="reference")[0]
    found = functional.elle_loss(TwoTensor(z, z), target, alpha, 2.0)[0]
    assert isinstance(found, TwoTensor)
    assert torch.equal(found.a, expected)
    with pytest.raises(TypeError, match=rf"^backend: expected plain tensors with backend='{backend}', got one that"):
        functional.elle_loss(z, target, TwoTensor(alpha, alpha), 2.0, backend=backend)


@kernels
def test_no_tensor_is_born_inside_an_operator_and_kept(backend):
    """It would lie in the memory of whatever graph was captured then."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call(x: Tensor, seed: Tensor) -> Tensor:
        return functional.pack_points(
            x, x - 0.5, 0.1, seed=seed, mean=(0.11, 0.12, 0.13), std=(0.5, 0.5, 0.5), backend=backend
        )[0]

    x = random(2, 3, 4, seed=1)
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(x), mode.from_tensor(seed_of(1))).shape == (8, 3, 4)
    assert torch.equal(call(x, seed_of(1)), torch.compile(call, backend="aot_eager", fullgraph=True)(x, seed_of(1)))


# ---- The oldest torch


def test_the_version_of_each_tensor_rises_by_itself(monkeypatch):
    """torch 2.4 takes no list of tensors."""
    whole, tensors = torch.autograd.graph.increment_version, [torch.zeros(2), torch.zeros(3)]

    def increment(tensor: Tensor) -> None:
        assert isinstance(tensor, Tensor), "increment_version expect a Tensor as input"
        whole(tensor)

    monkeypatch.setattr(torch.autograd.graph, "increment_version", increment)
    dispatch.changed(tensors)
    dispatch.changed([])
    assert [tensor._version for tensor in tensors] == [1, 1]
