"""An option that is set later takes effect, or is refused by a message that names it and says what to do."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity, TrainingStep, capture, methods
from elle_fast.regularizers import CURE, GAT, LLR, AdvLC, GradAlign, NuAT
from tests.helpers import built, labels, random

B, C, D = 6, 3, 5
X, Y = random(B, D, seed=1), labels(B, C)

# What a step leaves, and what belongs to torch.
STATE = {"training", "last", "stats", "output", "measured", "perturbation"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))


def step(**options: Any) -> TrainingStep:
    net = model()
    return TrainingStep(ELLELoss(0.1, 10.0), net, torch.optim.SGD(net.parameters(), lr=0.1, fused=True), **options)


def captured() -> Any:
    made = step()
    assert isinstance(made.criterion, ELLELoss)
    return capture(made.criterion, made.model, made.optimizer, X, Y)


BUILT: dict[str, Callable[[], Any]] = {
    "elle": lambda: ELLELoss(0.1, 10.0),
    "elle-a": lambda: ELLELoss(0.1, 10.0, adaptive=True, skip_below=0.5),
    "linearity": lambda: LocalLinearity(0.1),
    "controller": lambda: AdaptiveLambda(10.0),
    "window": lambda: AdaptiveLambda(10.0, window=5),
    "ramp": lambda: AdaptiveLambda(10.0, ramp=5),
    "step": step,
    "captured": captured,
    "GradAlign": lambda: GradAlign(0.1),
    "LLR": lambda: LLR(0.1),
    **{each.__name__: each for each in (CURE, GAT, NuAT, AdvLC)},
    **{f"method {name}": partial(built, name, eps=0.1) for name in methods.NAMES},
}


@pytest.mark.parametrize("make", BUILT.values(), ids=BUILT)
def test_nonsense_is_refused(make):
    """Every public attribute and every argument of the constructor, also after a step and in a copy."""
    made = make()
    names = {name for name in vars(made) if not name.startswith("_")} - STATE
    names |= {*getattr(made, "_modules", ()), *getattr(made, "_buffers", ())}
    if not isinstance(made, type(captured())):
        names |= {
            name
            for name in inspect.signature(type(made)).parameters
            if name not in ("linearity", "options", "args", "kwargs")
        }
    if isinstance(made, ELLELoss):
        names |= {*inspect.signature(ELLELoss).parameters, *inspect.signature(LocalLinearity).parameters} | {"gamma"}
        names |= {"adaptive", "window", "controller", "linearity", "packing", "forward_mode"}
    assert names or isinstance(made, (GAT, NuAT))
    for each in [made] if isinstance(made, type(captured())) else [made, copy.deepcopy(made)]:
        for name in names:
            with pytest.raises((AttributeError, TypeError, ValueError), match=rf"(^|\.|'){name}(:|')"):
                setattr(each, name, "nonsense")
        assert not any(value == "nonsense" for value in vars(each).values() if isinstance(value, str))


@pytest.mark.parametrize(
    "make, name, hint",
    [
        (lambda: ELLELoss(0.1, adaptive=True), "lam", "set controller.lam_max"),
        (lambda: ELLELoss(0.1, adaptive=True), "gamma", "set controller.gamma"),
        (lambda: ELLELoss(0.1, adaptive=True), "skip_below", "build another one"),
        (lambda: ELLELoss(0.1), "forward_mode", "build another one"),
        (lambda: ELLELoss(0.1), "norm", "build another one"),
        (lambda: methods.build("nuat", eps=0.1), "steps", "build another one"),
    ],
)
def test_the_message(make, name, hint):
    made = make()
    kind = type(made).__name__
    with pytest.raises(
        AttributeError, match=rf"^{kind}.{name}: expected no other value .*; {hint}, got 0.25 \(float\)$"
    ):
        setattr(made, name, 0.25)


@pytest.mark.parametrize("name", [name for name, row in methods.TABLE.items() if "lam" not in row.takes])
def test_a_method_without_a_weight_takes_none(name):
    made = methods.build(name, eps=0.1)
    with pytest.raises(AttributeError, match=r"\.lam: expected no other value .*, got 1.0 \(float\)$"):
        made.lam = 1.0
    assert not hasattr(made, "lam")


def test_a_lam_that_is_set_counts():
    net, criterion = model(), ELLELoss(0.1, 10.0)
    for lam in (10.0, 3, 0.0):
        criterion.lam = lam
        loss = criterion(net, X, Y)
        stats = criterion.stats
        assert stats["lam"].item() == lam
        assert loss.item() == pytest.approx((stats["ce"] + lam * stats["e_lin"]).item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"^lam: expected a finite number in \[0, .*, got -1$"):
        criterion.lam = -1
    for wrong in (nn.Linear(1, 1), nn.Parameter(torch.ones(())), AdaptiveLambda(1.0)):  # which torch would register
        with pytest.raises(TypeError, match=r"^lam: expected a finite number in "):
            criterion.lam = wrong  # type: ignore[assignment]
        with pytest.raises(TypeError, match=r"^lam: expected a finite number in "):
            ELLELoss(0.1, wrong if isinstance(wrong, nn.Linear) else torch.ones(()))  # type: ignore[arg-type]
    assert criterion.lam == 0.0


def test_options_of_the_controller_that_are_set_count():
    criterion = ELLELoss(0.1, AdaptiveLambda(10.0, min_history=1, sensitivity=0.0, gamma=1.0), skip_below=0.5)
    controller = criterion.controller
    assert controller is not None
    controller.update(torch.tensor(1.0))
    controller.lam_max = 20.0
    assert controller.update(torch.tensor(2.0)).item() == criterion.lam == 20.0
    controller.gamma = 0.5
    assert controller.update(torch.tensor(0.0)).item() == 10.0
    assert criterion.next_kind(nn.Identity()) == "light"  # 10 is half of the lam_max of now
    controller.lam_max = 18.0
    assert criterion.next_kind(nn.Identity()) == "full"
    controller.sensitivity = 1e9
    assert controller.update(torch.tensor(9.0)).item() == 5.0
    controller.lam = torch.tensor(7, dtype=torch.int64)  # the state itself, in its own dtype
    assert controller.update(torch.tensor(0.0)).item() == 3.5


def test_options_of_a_regularizer_that_are_set_count():
    net, regularizer = model(), LLR(0.1, generator=torch.Generator().manual_seed(0))
    regularizer.eps = 0
    assert regularizer(net, X, Y).item() < 1e-12
    regularizer.eps, regularizer.generator = 0.3, torch.Generator().manual_seed(1)
    expected = LLR(0.3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(regularizer(net, X, Y), expected(net, X, Y))
    method = methods.build("gradalign", eps=0.1)
    method.lam = 3.0
    loss = method(net, X, Y)
    stats = method.stats
    assert loss.item() == pytest.approx((stats["ce"] + 3.0 * stats["penalty"]).item(), rel=1e-6)


def test_options_of_a_step_that_are_set_count():
    made, seen = step(), []

    def criterion(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        output = net(x)
        seen.append(output.dtype)
        return F.cross_entropy(output, target)

    made.criterion, made.autocast, made.clip_grad_norm = criterion, torch.bfloat16, 1e-6
    made(X, Y)
    assert seen == [torch.bfloat16]
    gradients = [parameter.grad for parameter in made.model.parameters()]
    assert sum(gradient.square().sum() for gradient in gradients if gradient is not None) <= 1.01e-12


def test_a_subclass_is_free_in_what_it_adds():
    class Counting(ELLELoss):
        def __init__(self, eps: float, calls: int = 0) -> None:
            super().__init__(eps, 10.0)
            self.calls = calls

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            return super().forward(*args)

    criterion = Counting(0.1)
    criterion(model(), X, Y)
    criterion.calls += 1
    criterion.note = "mine"
    assert criterion.calls == 2
    with pytest.raises(AttributeError, match=r"^Counting.skip_below: "):
        criterion.skip_below = 0.1


@pytest.mark.parametrize(
    "name", ["elle", "elle-a", "window", "linearity", "method gat+elle-a", "method free-at", "LLR"]
)
def test_copies_and_moves(name):
    made = BUILT[name]()
    saved = io.BytesIO()
    torch.save(made, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(made),
        copy.copy(made),
        pickle.loads(pickle.dumps(made)),
        torch.load(saved, weights_only=False),
    ]
    for each in [*copies, made.to("cpu"), made.double(), made.half(), made.eval().train()]:
        assert repr(each) == repr(made)
        each.load_state_dict(made.state_dict())


def test_a_compiler_sees_through_it():
    """What a step leaves is set on the criterion inside of the graph."""
    net = model()
    criterion: Any = methods.build("fgsm", eps=0.1)
    compiled = torch.compile(
        lambda x, y: criterion._record(F.cross_entropy(net(x), y), net(x)), backend="eager", fullgraph=True
    )
    loss = compiled(X, Y)
    assert torch.equal(criterion.stats["loss"], loss.detach())
