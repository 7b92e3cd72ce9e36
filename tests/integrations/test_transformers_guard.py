"""The Guard callback in an ELLETrainer: against the plain loop with a guard, resumed, in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from elle_fast import CollapseGuard
from elle_fast.guard import CollapsedError
from elle_fast.integrations.transformers import Guard
from tests.helpers import labels
from tests.integrations.cases import ALARM, CALM, CLASSES, EPS, MEAN, STD, Noted, criterion, plain, same, state
from tests.integrations.test_transformers import IMAGES, PIXELS, TEXTS, N, bert, fitted, pytestmark, trainer, vit

__all__ = ["pytestmark"]

HELD_OUT = PIXELS[:6], labels(N, CLASSES)[:6]


def run(folder: Path, guard: Guard, model: Any = None, loss: Any = None, data: Any = IMAGES, **options: Any) -> Any:
    """The trainer and the criterion's losses."""
    resume = options.pop("resume", None)
    started = trainer(folder, model or vit(), loss or criterion(), data, **options)
    started.add_callback(guard)
    noted = Noted(started.criterion)
    torch.manual_seed(1)
    started.train(resume_from_checkpoint=resume)
    return started, noted.losses


@pytest.mark.parametrize("parts", [1, 2])
def test_without_an_alarm_the_losses_are_those_without_a_guard(parts, tmp_path):
    options = {"gradient_accumulation_steps": parts, "max_steps": 6 // parts}
    guard = Guard(held_out=HELD_OUT, **CALM)
    watched, losses = run(tmp_path, guard, **options)
    alone, expected = fitted(tmp_path, vit(), criterion(), IMAGES, **options)
    assert guard.alarms == []
    assert guard.guarding.state_dict()["step"] == 6 // parts
    assert same(losses, expected)
    assert same(state(watched.model), state(alone.model))


@pytest.mark.parametrize("parts", [1, 2])
def test_after_an_alarm_it_is_the_plain_loop_with_a_guard(parts, tmp_path):
    """Two epochs: six batches each."""
    options = {"gradient_accumulation_steps": parts, "max_steps": 6, "num_train_epochs": 2}
    guard = Guard(**ALARM)
    watched, losses = run(tmp_path, guard, **options)
    other, loss = vit(), criterion()
    loader = trainer(tmp_path, other, loss, IMAGES, **options)
    torch.manual_seed(1)
    rows = loader.get_train_dataloader()
    other.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    logits = lambda output: output.logits  # noqa: E731
    by_hand = CollapseGuard(other, optimizer, eps=EPS, bounds=None, lam=loss.lam, also=[loss], logits=logits, **ALARM)

    def loss_of(model: Any, x: Any, y: Any) -> Any:
        return loss(lambda points: model(points).logits, x, y)

    loss_of.frozen = loss.frozen  # type: ignore[attr-defined]
    batches = ((each["pixel_values"], each["labels"]) for _ in range(parts) for each in rows)
    expected = plain(other, loss_of, batches, parts=parts, optimizer=optimizer, guard=by_hand)
    assert [(alarm.step, alarm.back_to) for alarm in guard.alarms] == [(4, 1)]
    assert guard.alarms == by_hand.alarms
    assert same(losses, expected)
    assert same(state(watched.model), state(other))
    assert same(state(watched.criterion), state(loss))


def test_a_resume_goes_on_to_the_bit(tmp_path):
    """From within the steps to which E_lin is added. With the names by which ViT is saved, see the other resume."""
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 6}
    whole, again = Guard(**ALARM), Guard(**ALARM)
    one, losses = run(tmp_path, whole, model=resnet(), **options)
    middle = tmp_path / "checkpoint-5"
    assert (middle / "guard.pt").is_file()
    other, rest = run(tmp_path / "again", again, model=resnet(9), resume=str(middle), **options)
    assert whole.alarms == again.alarms
    assert len(whole.alarms) == 1
    assert same(rest, losses[5:])
    assert same(state(one.model), state(other.model))
    assert again.guarding.state_dict()["step"] == 6
    (middle / "guard.pt").unlink()
    anew = Guard(**ALARM)
    run(tmp_path / "again", anew, model=resnet(), resume=str(middle), **options)
    assert anew.guarding.state_dict()["step"] == 1


def resnet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=CLASSES
    )
    return transformers.ResNetForImageClassification(config)


def test_normalized_pixels(tmp_path):
    """The guard sees pixels, and the model what the loader hands out, of the held-out samples too."""
    data = [{**image, "pixel_values": (image["pixel_values"] - MEAN[0]) / STD[0]} for image in IMAGES]
    model, seen = resnet(), []
    guard = Guard(held_out=HELD_OUT, probe_every=1, **ALARM)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = criterion(mean=MEAN, std=STD, bounds=(0.0, 1.0))
    run(tmp_path, guard, model=model, loss=loss, data=data, normalized=True, max_steps=4)
    assert [alarm.step for alarm in guard.alarms] == [4]
    probes = [points for points in seen if len(points) == len(HELD_OUT[0])]
    assert len(probes) == 4 * 11
    assert min(points.min() for points in seen) >= -MEAN[0] / STD[0] - 1e-5
    assert max(points.max() for points in probes) > 1.2  # pixels would be at most 1


def test_a_stop_ends_the_training(tmp_path):
    guard, model = Guard(action="stop", **ALARM), vit()
    with pytest.raises(CollapsedError, match=r"^the training collapsed"):
        run(tmp_path, guard, model=model, max_steps=6)
    assert not guard.guarding.running
    assert "logits" in model(PIXELS[:1])  # the hooks are gone


def test_texts(tmp_path):
    """Tokens and masks go with the offsets of their embeddings, in the loss, in a look and in a probe."""
    columns = {name: torch.stack([text[name] for text in TEXTS[:6]]) for name in ("input_ids", "attention_mask")}
    model = bert()
    offsets = torch.zeros(*columns["input_ids"].shape, model.get_input_embeddings().weight.shape[1])
    guard = Guard(held_out=(offsets, HELD_OUT[1], columns), probe_every=1, bounds=None, **ALARM)
    run(tmp_path, guard, model=model, data=TEXTS, max_steps=4)
    (alarm,) = guard.alarms
    assert (alarm.step, alarm.signal) == (4, "linearity")
    assert 0 < alarm.value < 1


def test_what_cannot_be_guarded(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    other = transformers.Trainer(vit(), args, train_dataset=IMAGES, callbacks=[Guard(**ALARM)])
    with pytest.raises(TypeError, match=r"^trainer: expected an ELLETrainer.* got another one"):
        other.train()
    started = trainer(tmp_path, vit(), criterion(), IMAGES)
    started.add_callback(Guard(**ALARM))
    for name in ("deepspeed", "fsdp"):
        setattr(started, f"is_{name}_enabled", True)
        with pytest.raises(ValueError, match=rf"^{name}: expected none with a Guard, which keeps whole weights"):
            started.train()
        setattr(started, f"is_{name}_enabled", False)


RANKS = r"""
import sys
from pathlib import Path
from tests.optional import import_torchvision
import_torchvision()
import torch
torch.set_num_threads(1)
from accelerate import debug_launcher
from tests.integrations import test_transformers_guard as here
debug_launcher(here.rank_run, (Path(sys.argv[1]),), num_processes=2)
"""


def rank_run(folder: Path) -> None:
    """A training in two processes whose guard raises an alarm and adds E_lin; the wrapper looks for unused weights."""
    guard = Guard(**ALARM)
    started, _ = run(folder / "run", guard, max_steps=6, num_train_epochs=2)
    wrapper: Any = started.model_wrapped
    assert isinstance(wrapper, nn.parallel.DistributedDataParallel)
    assert wrapper.find_unused_parameters
    found = [[repr(alarm) for alarm in guard.alarms], state(started.model)]
    torch.save(found, folder / f"{started.args.process_index}.pt")


def test_two_processes_decide_alike(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (alarms, weights), (others, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert alarms == others
    assert len(alarms) == 1
    assert "back_to=1" in alarms[0]
    assert same(weights, other_weights)
