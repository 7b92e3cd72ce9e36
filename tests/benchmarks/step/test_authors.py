"""The authors' trainer, restated: its step against numbers computed independently, its data, its epoch."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step.authors import AuthorsList, AuthorsStep, AuthorsTrainer, Pictures, loader
from elle_fast.data import Split
from elle_fast.recipes import models

EPS, LAM = 0.1, 20.0


def images(count: int = 10, side: int = 8) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(count) % 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return models.build("cnn", in_shape=(3, 8, 8), classes=3, width=2)


class Recorded:
    """The points of every forward pass since last asked."""

    def __init__(self, model: nn.Module) -> None:
        self.points: list[Tensor] = []
        model.register_forward_pre_hook(lambda module, given: self.points.append(given[0].detach().clone()))

    def of_a_step(self) -> list[Tensor]:
        points, self.points = self.points, []
        return points


def plain_gradients(model: nn.Module, x_adv: Tensor, triplet: Tensor, y: Tensor, lam: float) -> tuple[Any, float]:
    """Of the loss at given points, from the formulas; alpha from the pixel in which x_a and x_b are furthest apart."""
    a, b, c = (each.flatten(1) for each in triplet.chunk(3))
    far = (b - a).abs().argmax(dim=1, keepdim=True)
    alpha = ((c - a).gather(1, far) / (b - a).gather(1, far))[:, 0]
    assert ((alpha >= 0) & (alpha <= 1)).all()
    torch.testing.assert_close(c, a + alpha[:, None] * (b - a))

    def losses(points: Tensor) -> Tensor:
        return -F.log_softmax(model(points), dim=1).gather(1, y.repeat(len(points) // len(y))[:, None])[:, 0]

    ce = losses(x_adv).mean()
    at_a, at_b, at_c = losses(triplet).chunk(3)
    e_lin = (at_c - (1 - alpha) * at_a - alpha * at_b).square().mean()
    return torch.autograd.grad(ce + lam * e_lin, list(model.parameters())), e_lin.item()


def test_the_step_is_that_of_the_formulas() -> None:
    model = network().double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step, other = AuthorsStep(model, optimizer, eps=EPS, lam=LAM, scheduler=scheduler), copy.deepcopy(model)
    recorded = Recorded(model)
    buffers = [torch.zeros_like(each) for each in other.parameters()]
    lam, rate = 0.0, 0.05
    seen: list[float] = []
    lams: list[float] = []
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    for number in range(8):
        if number == 4:  # steeper logits: E_lin jumps, which the detector is for
            for net in (model, other):
                with torch.no_grad():
                    list(net.parameters())[-2].mul_(30)
        before = copy.deepcopy(other.state_dict())
        loss = step(x, y)
        start, x_adv, triplet, clean = recorded.of_a_step()
        assert torch.equal(start, x)
        assert torch.equal(clean, x)
        points = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(other(points), y), points)
        torch.testing.assert_close(x_adv, x + EPS * grad.sign())
        assert 0.9 * EPS < (triplet - x.repeat(3, 1, 1, 1)).abs().max() <= EPS + 1e-12
        gradients, e_lin = plain_gradients(other, x_adv, triplet, y, lam)
        other.load_state_dict(before | {name: value for name, value in other.state_dict().items() if "running" in name})
        with torch.no_grad():
            for now in (rate, rate / 2):  # two optimiser steps on the same gradient, the rate moved between them
                for weight, gradient, buffer in zip(other.parameters(), gradients, buffers, strict=True):
                    buffer.mul_(0.9).add_(gradient + 5e-4 * weight)
                    weight.sub_(now * buffer)
        rate /= 2
        other.eval()
        for name, value in other.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-8, atol=1e-10)
        other.train()
        assert step.loss.rule.history[-1] == pytest.approx(e_lin, rel=1e-6)
        assert loss.item() == pytest.approx(step.loss.numbers["loss"])
        detects = len(seen) > 2 and e_lin > np.mean(seen) + 2 * np.std(seen)
        lam = LAM if detects else 0.99 * lam
        seen.append(e_lin)
        lams.append(step.loss.rule.lam)
        assert lams[-1] == pytest.approx(lam)
    assert LAM in lams[4:]  # the gradients of the steps after it had its weight
    assert lams[:3] == [0.0, 0.0, 0.0]


def test_the_first_three_values_detect_nothing() -> None:
    rule = AuthorsList(LAM)
    for value in (1.0, 100.0, 1e4, 1.0):
        rule.update(torch.tensor(value))
        assert rule.lam == 0.0


def test_autocast_is_around_the_forward_passes() -> None:
    model = network()
    seen: list[torch.dtype] = []
    model[0].register_forward_hook(lambda module, given, output: seen.append(output.dtype))  # type: ignore[index]
    step = AuthorsStep(model, torch.optim.SGD(model.parameters(), 0.1), eps=EPS, lam=LAM, autocast=torch.bfloat16)
    assert step(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)).isfinite()
    assert seen == [torch.bfloat16] * 4


def test_pictures_are_cropped_out_of_four_pixels_of_padding_and_flipped() -> None:
    split = images(1)
    padded = F.pad(split.images[0].float() / 255, (4, 4, 4, 4))
    crops = {(top, left): padded[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)}
    seen = set()
    torch.manual_seed(0)
    for _ in range(600):
        picture, label = Pictures(split, augment=True)[0]
        assert label == 0
        found = [
            (place, flipped)
            for place, crop in crops.items()
            for flipped in (False, True)
            if torch.equal(picture, crop.flip(2) if flipped else crop)
        ]
        assert found
        seen.add(found[0])
    assert len({place for place, _ in seen}) > 75
    assert {flipped for _, flipped in seen} == {False, True}
    assert torch.equal(Pictures(split, augment=False)[0][0], split.images[0].float() / 255)


def test_an_epoch_has_each_picture_once_and_its_last_batch() -> None:
    batches = list(loader(images(), 4, workers=0, augment=False))
    assert [len(y) for _, y in batches] == [4, 4, 2]
    found = {tuple(x.flatten().tolist()) for xs, _ in batches for x in xs}
    assert found == {tuple((x.float() / 255).flatten().tolist()) for x in images().images}


def test_an_epoch_of_the_trainer() -> None:
    trainer = AuthorsTrainer(network(), images(), eps=EPS, lam=LAM, epochs=2, batch_size=4, rate=0.01, workers=0)
    rates = [trainer.optimizer.param_groups[0]["lr"]]
    numbers = trainer.epoch()
    rates.append(trainer.optimizer.param_groups[0]["lr"])
    trainer.epoch()
    rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.01, 0])
    assert set(numbers) == {"loss", "clean_acc", "adversarial_acc", "lin_err"}
    assert numbers["lin_err"] == pytest.approx(np.mean(trainer.step.loss.rule.history[:3]))
