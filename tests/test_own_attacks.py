"""A user's own attack may call backward(), zero_grad(), eval() and what else libraries call, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss
from elle_fast.methods.adversarial import AdversarialLoss
from tests.helpers import MustNotBeCalled, Smooth, convnet, labels, random, rng

EPS = 0.03


def textbook(model: Any, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    """FGSM as tutorials write it."""
    x.requires_grad = True
    if isinstance(model, nn.Module):
        model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    return x + EPS * x.grad.sign()


def careful(model: Any, x: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
    """The same without a trace."""
    point = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
    return x + EPS * grad.sign()


CRITERIA: dict[str, Callable[[Any], Any]] = {
    "ELLELoss": lambda attack: ELLELoss(EPS, 10.0, attack=attack, generator=rng(3)),
    "split": lambda attack: ELLELoss(EPS, 10.0, attack=attack, generator=rng(3), forward="split"),
    "pixels": lambda attack: ELLELoss(EPS, 10.0, attack=attack, generator=rng(3), mean=[0.5], std=[0.3]),
    "logits": lambda attack: ELLELoss(EPS, 10.0, attack=attack, generator=rng(3), logits=lambda out: out * 2),
    "AdversarialLoss": lambda attack: AdversarialLoss(attack, EPS),
}
criteria = pytest.mark.parametrize("name", CRITERIA)
# A function hides its parameters from whoever calls it.
shapes = pytest.mark.parametrize("shape", [lambda net: net, lambda net: lambda p: net(p)], ids=["module", "function"])


def batch() -> tuple[Tensor, Tensor]:
    return random(6, 1, 4, 2, seed=1), labels(6, 4)


def net(seed: int = 0) -> nn.Module:
    return Smooth(8, 4, seed=seed)


def grads(name: str, attack: Any, model: nn.Module, called: Any) -> list[Tensor]:
    x, y = batch()
    CRITERIA[name](attack)(called, x, y).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@criteria
@shapes
def test_weight_gradients_of_the_attack_do_not_join_the_steps(name, shape):
    one, other = net(), net()
    found, expected = grads(name, textbook, one, shape(one)), grads(name, careful, other, shape(other))
    assert len(found) == len(expected) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@criteria
@shapes
def test_gradients_that_were_there_survive(name, shape):
    """Bit for bit, and in the very tensors: they may be views of a bucket."""
    model, (x, y) = net(), batch()
    before = [torch.randn(p.shape, generator=rng(1)) for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    kept = [grad.clone() for grad in before]
    CRITERIA[name](textbook)(shape(model), x, y)
    for p, grad, values in zip(model.parameters(), before, kept, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, values)


@criteria
def test_gradients_survive_an_attack_that_fails(name):
    model, (x, y) = net(), batch()
    grad = model.last.weight.grad = torch.ones_like(model.last.weight)  # type: ignore[union-attr, arg-type]

    def failing(model: Any, x: Tensor, y: Tensor, *args: Any, **options: Any) -> Tensor:
        textbook(model, x, y)
        raise KeyError("of the attack")

    with pytest.raises(KeyError, match="of the attack"):
        CRITERIA[name](failing)(model, x, y)
    assert model.last.weight.grad is grad  # type: ignore[union-attr]
    assert model.first.weight.grad is None  # type: ignore[union-attr]


@criteria
def test_an_optimiser_in_the_backward_pass_takes_no_step_for_the_attack(name):
    """Hooks of parameters do not see the attack's gradients."""
    model, (x, y) = net(), batch()
    steps: list[Any] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    model.last.bias.register_hook(lambda grad: steps.append(grad))  # type: ignore[union-attr, operator]
    loss = CRITERIA[name](textbook)(model, x, y)
    assert steps == []
    assert all(p.requires_grad for p in model.parameters())
    loss.backward()
    assert len(steps) == 5


@criteria
def test_x_is_the_callers(name):
    """What the attack does with its x, it does with a copy."""
    model, (x, y) = net(), batch()
    before = x.clone()

    def writing(model: Any, x: Tensor, y: Tensor, *args: Any, **options: Any) -> Tensor:
        made = textbook(model, x, y).detach()
        x.requires_grad_(False).fill_(7.0)
        return made

    loss = CRITERIA[name](writing)(model, x, y)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert loss.item() == CRITERIA[name](careful)(model, x, y).item()


@criteria
def test_it_works_where_gradients_are_off(name):
    model, (x, y) = net(), batch()
    with torch.no_grad():
        off = CRITERIA[name](textbook)(model, x, y)
        assert not torch.is_grad_enabled()
    assert off.item() == CRITERIA[name](textbook)(model, x, y).item()


# ---- What the attack is given where that is not the model itself

PIXELS: dict[str, dict[str, Any]] = {
    "mean": {"mean": [0.5] * 3, "std": [0.2] * 3},
    "logits": {"logits": lambda out: out},
    "dtype": {"dtype": torch.float32},
    "nothing": {},
}
pixels = pytest.mark.parametrize("options", PIXELS.values(), ids=PIXELS)


def given(model: Any, options: dict[str, Any], use: Callable[[Any], Any]) -> ELLELoss:
    x, y = random(4, 3, 8, 8, seed=2), labels(4, 4)
    used = []

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        used.append(use(model))
        return x

    criterion = ELLELoss(EPS, attack=attack, **options)
    criterion(model, x, y)
    assert len(used) == 1
    return criterion


@pixels
@pytest.mark.parametrize("training", [True, False])
def test_an_attack_is_given_a_module(options, training):
    model = convnet().train(training)
    parameters = list(model.parameters())

    def use(module: Any) -> None:
        assert isinstance(module, nn.Module)
        assert module.training is training
        assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
        assert not module.eval().training
        assert not any(m.training for m in model.modules())
        module.train()
        assert all(m.training for m in model.modules())
        module.to(torch.float64)
        assert parameters[0].dtype == torch.float64
        module.to(torch.float32).train(training)

    criterion = given(model, options, use)
    # Neither the model nor the criterion becomes a part of the other.
    assert model not in list(criterion.modules())
    assert criterion.linearity not in list(model.modules())
    assert criterion.training
    assert criterion.linearity.training


@pixels
def test_the_criterion_stays_in_its_mode(options):
    criterion = given(convnet(), options, lambda module: module.eval())
    assert criterion.training
    assert criterion.linearity.training


@pixels
def test_a_function_stays_one_to_be_called(options):
    model = convnet()
    given(partial(lambda net, p: net(p), model), options, lambda called: called(random(4, 3, 8, 8, seed=3)).shape)


def test_a_library_that_wants_a_module():
    """torchattacks' and others' first lines."""

    class Library:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.device = model, next(model.parameters()).device

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            training = self.model.training
            self.model.eval()
            try:
                return textbook(self.model, x, y)
            finally:
                self.model.train(training)

    model, (x, y) = convnet(channels=1), (random(4, 1, 8, 8, seed=2), labels(4, 4))

    def attack(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return Library(model)(x, y)

    criterion = ELLELoss(EPS, attack=attack, mean=[0.5], std=[0.2])
    criterion(model, x, y).backward()
    assert model.training


def test_a_bad_attack_is_named():
    x, y = batch()
    for made, got in ((None, "None"), (x[:2], r"\[2, 1, 4, 2\]")):
        with pytest.raises((TypeError, ValueError), match=f"attack's x_adv: .*{got}"):
            AdversarialLoss(lambda *args, made=made, **options: made, EPS)(MustNotBeCalled(), x, y)


@pytest.mark.parametrize("kind", ["method", "partial", "plain tensors", "arguments", "a learnable argument"])
def test_no_gradient_of_an_attack_on_a_function_stays(kind):
    """Whatever the function trains: a module's own parameters, tensors of a closure, arguments."""
    x, y = random(4, 6, seed=1), labels(4, 3)
    results = []
    for attack in (textbook, careful):
        torch.manual_seed(0)
        layer, weight = nn.Linear(6, 3), random(6, 3, seed=3).requires_grad_()
        options: dict[str, Any] = {}
        model: Any = layer.forward
        if kind == "partial":
            model = partial(layer)
        elif kind == "plain tensors":
            model = lambda points, weight=weight: points @ weight  # noqa: E731
        elif kind != "method":
            scale = torch.ones(4, 3)
            options["model_kwargs"] = {"scale": nn.Parameter(scale) if "learnable" in kind else scale}
            model = lambda points, scale, layer=layer: layer(points) * scale  # noqa: E731
        ELLELoss(EPS, 10.0, attack=attack, generator=rng(2))(model, x, y, **options).backward()
        leaves = [weight, *layer.parameters(), *(each for each in options.get("model_kwargs", {}).values())]
        results.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert len(results[0]) == len(results[1]) > 0
    assert all(map(torch.equal, *results))
