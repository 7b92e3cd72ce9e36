"""ELLETask in the loop of timm's trainer, with its mixup, its EMA, its loader and its checkpoints."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from elle_fast import methods
from elle_fast.integrations.timm import ELLETask
from tests.helpers import built, random
from tests.integrations import cases
from tests.integrations.cases import (
    ALARM,
    CALM,
    CLASSES,
    EPS,
    MEAN,
    STD,
    B,
    Noted,
    criterion,
    loader,
    net,
    plain,
    same,
    sgd,
    state,
)


def trained(task: ELLETask, batches: Any, parts: int = 1, optimizer: Any = None) -> list[dict[str, Any]]:
    """An epoch, as timm's train.py does it: the last step is of the batches that are left."""
    task.get_trainable_module().train()
    optimizer = optimizer or sgd(task.get_trainable_module().parameters())
    results, last, batches = [], len(batches) % parts, list(batches)
    for i, (x, y) in enumerate(batches):
        result = task(x, y)
        results.append({name: value.detach().clone() for name, value in result.items()})
        (result["loss"] / (last if i >= len(batches) - last else parts)).backward()
        if (i + 1) % parts == 0 or i + 1 == len(batches):
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
    return results


def losses(results: list[dict[str, Any]]) -> list[Tensor]:
    return [result["loss"] for result in results]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_losses_are_the_plain_loops(parts):
    task = ELLETask(net(), criterion(), accumulation=parts)
    torch.manual_seed(1)
    results = trained(task, loader(4), parts)
    model, loss = net(), criterion()
    torch.manual_seed(1)
    assert same(losses(results), plain(model, loss, loader(4), parts=parts))
    assert same(state(task.get_trainable_module()), state(model))
    assert same(state(task.criterion), state(loss))
    assert results[-1].keys() >= {"loss", "output", "ce", "e_lin", "lam"}
    assert results[-1]["output"].shape == (B, CLASSES)


def test_an_epoch_whose_last_step_is_short():
    """lam follows the first part of each step of the next epoch too."""
    task = ELLETask(net(), criterion(), accumulation=2)
    optimizer = sgd(task.get_trainable_module().parameters())
    counts, controller = [0], task.criterion.controller
    task.criterion.register_forward_hook(lambda *args: counts.append(int(controller.count)))  # type: ignore[union-attr, arg-type]
    for _ in range(3):
        trained(task, loader(3), 2, optimizer)
    assert [after - before for before, after in itertools.pairwise(counts)] == [1, 0, 1] * 3


def test_what_a_scaler_skips_ends_a_step_all_the_same():
    """The weights stay, and the number of calls tells."""
    task = ELLETask(net(), criterion(), accumulation=2)
    for i, batch in enumerate(loader(6)):
        before = int(task.criterion.controller.count)  # type: ignore[union-attr, arg-type]
        task(*batch)
        assert int(task.criterion.controller.count) - before == (i % 2 == 0)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("parts", [1, 2])
def test_without_an_alarm_the_losses_are_those_without_a_guard(parts):
    task, alone = (ELLETask(net(), criterion(), accumulation=parts) for _ in range(2))
    optimizer = sgd(task.get_trainable_module().parameters())
    guard = task.watch(optimizer, held_out=cases.held_out(), **CALM)
    torch.manual_seed(1)
    found = losses(trained(task, loader(11), parts, optimizer))
    torch.manual_seed(1)
    assert same(found, losses(trained(alone, loader(11), parts)))
    assert guard.alarms == []
    assert guard.state_dict()["step"] == math.ceil(11 / parts)
    assert same(state(task.get_trainable_module()), state(alone.get_trainable_module()))


@pytest.mark.parametrize("parts", [1, 2])
def test_after_an_alarm_it_is_the_plain_loop_with_a_guard(parts):
    task = ELLETask(net(), criterion(), accumulation=parts)
    optimizer, noted = sgd(task.get_trainable_module().parameters()), Noted(task.criterion)
    guard = task.watch(optimizer, **ALARM)
    torch.manual_seed(1)
    results = trained(task, loader(8 * parts), parts, optimizer)
    model, loss = net(), criterion()
    torch.manual_seed(1)
    expected, by_hand = cases.guarded(model, loss, loader(8 * parts), parts=parts)
    assert [(alarm.step, alarm.back_to) for alarm in guard.alarms] == [(4, 1)]
    assert guard.alarms == by_hand.alarms
    assert same(noted.losses, expected)
    assert [bool(result["loss"] > own) for result, own in zip(results, expected, strict=True)] == [
        4 * parts <= i < 7 * parts for i in range(8 * parts)
    ]
    assert same(state(task.get_trainable_module()), state(model))
    assert same(state(task.criterion), state(loss))


def test_the_average_goes_back_too():
    task = ELLETask(net(), criterion())
    task.setup_ema(decay=0.5)
    optimizer = sgd(task.get_trainable_module().parameters())
    guard = task.watch(optimizer, **ALARM)
    trained(task, loader(4), 1, optimizer)
    assert len(guard.alarms) == 1
    # That of step 1 had not begun, and the update after the alarm is on the weights of step 1.
    for mean, old, new in zip(
        task.get_trainable_module(ema=True).module.parameters(),
        net().parameters(),
        task.get_trainable_module().parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mean, (old + new) / 2)


@pytest.mark.parametrize("watched_first", [True, False])
def test_a_resume_with_a_guard_goes_on_to_the_bit(watched_first, tmp_path):
    """From within the steps to which E_lin is added."""
    task = ELLETask(net(), criterion())
    optimizer = sgd(task.get_trainable_module().parameters())
    guard = task.watch(optimizer, **ALARM)
    trained(task, list(loader(8))[:5], 1, optimizer)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = str(tmp_path / "last.pth.tar")
    resumed = ELLETask(net(9), criterion())
    other = sgd(resumed.get_trainable_module().parameters())
    if watched_first:
        again = resumed.watch(other, **ALARM)
    resume_task_checkpoint(resumed, path, optimizer=other, log_info=False)
    if not watched_first:
        again = resumed.watch(other, **ALARM)
    assert again.alarms == guard.alarms
    assert again.rescuing
    found = []
    for each, moved in ((task, optimizer), (resumed, other)):
        torch.manual_seed(2)
        found.append(losses(trained(each, list(loader(8))[5:], 1, moved)))
    assert same(*found)
    assert same(state(task.get_trainable_module()), state(resumed.get_trainable_module()))
    with pytest.raises(RuntimeError, match=r"^watch: expected one call"):
        resumed.watch(other)


def test_mixup_makes_probabilities_that_are_trained_on():
    mixup = timm.data.Mixup(mixup_alpha=0.5, cutmix_alpha=1.0, num_classes=CLASSES, label_smoothing=0.1)
    np.random.seed(0)  # noqa: NPY002  # what mixup draws from
    batches = []
    for x, y in loader(4):
        # It mixes in place, on whatever device the target is; its default is CUDA.
        batches.append(mixup(x.clone(), y) if torch.cuda.is_available() else _mixed(mixup, x.clone(), y))
    assert all(y.shape == (B, CLASSES) for _, y in batches)
    task = ELLETask(net(), criterion())
    torch.manual_seed(1)
    results = trained(task, batches)
    model, loss = net(), criterion()
    torch.manual_seed(1)
    assert same(losses(results), plain(model, loss, batches))


def _mixed(mixup: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    lam = mixup._mix_batch(x)
    return x, timm.data.mixup.mixup_target(y, mixup.num_classes, lam, mixup.label_smoothing)


def test_the_average_is_of_the_weights():
    task = ELLETask(net(), criterion())
    task.setup_ema(decay=0.5)
    start = [weight.detach().clone() for weight in task.get_trainable_module().parameters()]
    torch.manual_seed(1)
    trained(task, loader(1))
    ema = task.get_trainable_module(ema=True).module
    for old, new, mean in zip(start, task.get_trainable_module().parameters(), ema.parameters(), strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
    assert task.get_task_state(ema=True) == {}


def test_timms_loader_normalizes_and_the_task_puts_it_back():
    """A loader of timm's, whose pictures are bytes, and one step on what it hands out."""
    bytes_of = (random(B, 1, 6, 6, seed=3) * 255).to(torch.uint8)
    batches = [(bytes_of, torch.arange(B) % CLASSES)]
    prefetched: Any = timm.data.loader.PrefetchLoader(batches, MEAN, STD, channels=1, device=torch.device("cpu"))
    ((x, y),) = prefetched
    assert x.min() < 0
    seen: list[Tensor] = []
    loss = criterion(mean=MEAN, std=STD, bounds=(0.0, 1.0))
    loss.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    ELLETask(net(), loss, normalized=True)(x, y)["loss"].backward()
    torch.testing.assert_close(seen[0], bytes_of / 255, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    plainly: Any = timm.data.loader.PrefetchLoader(batches, (0.0,), (1.0,), channels=1, device=torch.device("cpu"))
    ((x, y),) = plainly
    ELLETask(net(), criterion(bounds=(0.0, 1.0)))(x, y)


def test_a_resume_goes_on_to_the_bit(tmp_path):
    task = ELLETask(net(), criterion())
    optimizer = sgd(task.get_trainable_module().parameters())
    torch.manual_seed(1)
    trained(task, list(loader(4))[:2])
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    path = tmp_path / "last.pth.tar"
    resumed = ELLETask(net(9), criterion())
    assert resume_task_checkpoint(resumed, str(path), log_info=False) == 1
    assert int(resumed.criterion.controller.count) == 2  # type: ignore[union-attr, arg-type]
    torch.manual_seed(2)
    rest = losses(trained(task, list(loader(4))[2:]))
    torch.manual_seed(2)
    assert same(losses(trained(resumed, list(loader(4))[2:])), rest)
    torch.save({"state_dict": task.get_trainable_module().state_dict()}, path)
    with pytest.raises(ValueError, match=r"^state: expected one with the key 'criterion'"):
        resume_task_checkpoint(resumed, str(path), log_info=False)


def test_another_method_and_a_timm_model():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=CLASSES, in_chans=1)
    task = ELLETask(model, methods.build("gat", eps=EPS, lam=1.0))
    results = trained(task, loader(2))
    assert all(result["loss"].isfinite() for result in results)
    evaluator = task.create_evaluator()
    assert evaluator is not None


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: ELLETask(net, criterion()), TypeError, r"^model: expected a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: ELLETask(net(), nn.CrossEntropyLoss()), TypeError, r"^criterion: expected ELLELoss"),  # type: ignore[arg-type]
        (lambda: ELLETask(net(), built("pgi", eps=EPS)), ValueError, r"^criterion: expected one without a memory"),
        (lambda: ELLETask(net(), criterion(), normalized=True), ValueError, r"^normalized: expected a criterion with"),
        (lambda: ELLETask(net(), criterion(), accumulation=0), ValueError, r"^accumulation: expected"),
    ],
)
def test_what_cannot_train(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_it_counts_lam_once_for_each_step():
    task = ELLETask(net(), criterion(), accumulation=2)
    trained(task, loader(4), 2)
    assert int(task.criterion.controller.count) == 2  # type: ignore[union-attr, arg-type]
