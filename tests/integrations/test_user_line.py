"""A warning of what a loader hands out is at the user's line, whatever library's loop is between."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import CollapseGuard, ELLELoss, LocalLinearity, attacks
from elle_fast._core import user_line
from elle_fast.integrations.accelerate import AcceleratedLoss
from elle_fast.integrations.lightning import ELLEModule
from elle_fast.integrations.timm import ELLETask
from tests.helpers import built
from tests.integrations import cases, test_lightning, test_transformers
from tests.integrations.cases import EPS, criterion, net, sgd

pytestmark = [*test_lightning.pytestmark, test_transformers.pytestmark]

X, Y = cases.data(1).tensors
FAR = X * 6 - 3


def shown(call: Callable[[], Any]) -> tuple[str, str]:
    """The file and the text of the line at which the one warning of pictures is shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    (one,) = [each for each in caught if "expected pictures in [0, 1]" in str(each.message)]
    return one.filename, Path(one.filename).read_text().splitlines()[one.lineno - 1].strip()


def by_lightning(folder: Path) -> None:
    module = ELLEModule(net(), criterion(), sgd)
    test_lightning.trainer().fit(module, DataLoader(TensorDataset(FAR, Y), len(Y)))


def by_hugging_face(folder: Path) -> None:
    data = [{**image, "pixel_values": image["pixel_values"] * 6 - 3} for image in test_transformers.IMAGES]
    run = test_transformers.trainer(folder, test_transformers.vit(), criterion(), data, max_steps=1)
    run.train()


def by_accelerate(folder: Path) -> None:
    loss = AcceleratedLoss(accelerate.Accelerator(cpu=True), criterion())
    loss(net(), FAR, Y)
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def by_timm(folder: Path) -> None:
    task = ELLETask(net(), criterion())
    task(FAR, Y)


def by_guard(folder: Path) -> None:
    model = net()
    guard = CollapseGuard(model, sgd(model.parameters()), eps=EPS, bounds=None)
    guard.step(FAR, Y)


def by_attack(folder: Path, *, attack: Any) -> None:
    attack(net(), FAR, Y, EPS)


def by_criterion(folder: Path, *, loss: Any) -> None:
    loss(net(), FAR, Y)


@pytest.mark.parametrize(
    "call, line",
    [
        *((partial(by_attack, attack=attack), "attack(net(), FAR, Y, EPS)") for attack in attacks.SINGLE_STEP.values()),
        (partial(by_criterion, loss=ELLELoss(EPS)), "loss(net(), FAR, Y)"),
        (partial(by_criterion, loss=ELLELoss(EPS, forward="checkpoint")), "loss(net(), FAR, Y)"),
        (partial(by_criterion, loss=LocalLinearity(EPS)), "loss(net(), FAR, Y)"),
        (partial(by_criterion, loss=built("n-fgsm", eps=EPS)), "loss(net(), FAR, Y)"),
        (by_lightning, "test_lightning.trainer().fit(module, DataLoader(TensorDataset(FAR, Y), len(Y)))"),
        (by_hugging_face, "run.train()"),
        (by_accelerate, "loss(net(), FAR, Y)"),
        (by_timm, "task(FAR, Y)"),
        (by_guard, "guard.step(FAR, Y)"),
    ],
)
def test_the_warning_is_at_the_users_line(call, line, tmp_path):
    torch.manual_seed(0)
    assert shown(partial(call, tmp_path)) == (__file__, line)


def test_a_module_of_ones_own_is_the_users_code(tmp_path):
    module = test_lightning.Own()
    file, line = shown(lambda: test_lightning.trainer().fit(module, DataLoader(TensorDataset(FAR, Y), len(Y))))
    assert file == inspect.getsourcefile(test_lightning.Own)
    assert line == "loss: Tensor = self.criterion(self.net, *batch)"


def test_where_there_is_no_line_of_a_user_it_is_the_callers(monkeypatch):
    roots = {*user_line._PASSED, *_roots()}
    monkeypatch.setattr(user_line, "_PASSED", roots)
    with pytest.warns(UserWarning, match="^said$") as caught:
        user_line.warn("said")
    assert caught[0].filename == __file__


def _roots() -> set[str]:
    """Whose code called a test."""
    return {frame.frame.f_globals.get("__name__", "").partition(".")[0] for frame in inspect.stack()}
