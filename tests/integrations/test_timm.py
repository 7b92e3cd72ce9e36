"""ELLETask in the loop of timm's trainer, with its mixup, its EMA, its loader and its checkpoints."""

from __future__ import annotations

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
from tests.integrations.cases import CLASSES, EPS, MEAN, STD, B, criterion, loader, net, plain, same, sgd, state


def trained(task: ELLETask, batches: Any, parts: int = 1) -> list[dict[str, Any]]:
    """As timm's train.py does."""
    task.train()
    optimizer = sgd(task.get_trainable_module().parameters())
    results = []
    for i, (x, y) in enumerate(batches):
        result = task(x, y)
        results.append({name: value.detach().clone() for name, value in result.items()})
        (result["loss"] / parts).backward()
        if (i + 1) % parts == 0:
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
