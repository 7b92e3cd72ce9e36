"""The numbers of a run's steps: right ones, and none that a step waits for."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from elle_fast._core.host_copy import HostCopy
from elle_fast.recipes import train as training
from elle_fast.recipes.meter import Meter, averages, ruined
from elle_fast.recipes.train import train
from elle_fast.testing import no_host_sync
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet, rows


def criterion(logits, **stats):
    return SimpleNamespace(output=logits, stats={name: torch.tensor(value) for name, value in stats.items()})


def test_means_over_steps_and_samples():
    meter, right = Meter(torch.device("cpu")), torch.eye(3)
    assert meter.state() == {}
    for loss, labels in ((1.0, [0, 1, 2]), (4.0, [1, 1, 1])):
        step = criterion(right, loss=loss, e_lin=2 * loss, skipped=7, light_steps=3)
        meter.add(meter.measure(step, torch.tensor(labels)), 3)
    assert meter.names == ("loss", "e_lin", "correct")
    assert meter.last.tolist() == [4.0, 8.0, 1.0]
    assert meter.sums is not None
    found = averages(meter.names, meter.sums.tolist(), meter.steps, meter.samples)
    assert found == {"loss": 2.5, "e_lin": 5.0, "train_adv": 4 / 6}
    other = Meter(torch.device("cpu"))
    other.restore(meter.state())
    assert other.state() == meter.state()
    assert meter.state()["samples"] == 6
    meter.clear()
    assert meter.state() == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "1.running_var"])
def test_a_weight_or_buffer_that_is_not_finite_is_seen(where, value):
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    model.register_buffer("empty", torch.zeros(0))
    kept = [*model.state_dict().values(), torch.ones(2, dtype=torch.float64), torch.ones((), dtype=torch.float16)]
    assert ruined(kept, torch.float64).tolist() == [0.0]
    model.state_dict()[where].view(-1)[0] = 3e38  # whose square is not
    assert ruined(kept, torch.float64).tolist() == [0.0]
    model.state_dict()[where].view(-1)[-1] = value
    assert ruined(kept, torch.float64).tolist() == [1.0]


class Late:
    """In place of an event: there after some questions, or when somebody waits."""

    waits = 0

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 4

    def synchronize(self) -> None:
        Late.waits += self.asked <= 4


def late(tensor: torch.Tensor) -> HostCopy:
    return HostCopy(tensor, tensor._version, tensor.clone(), Late())  # type: ignore[arg-type]


def test_no_step_waits_and_a_row_is_written_when_its_numbers_are_there(monkeypatch, tmp_path):
    """As on CUDA: copies that arrive four steps late give the same log, to the bit."""
    config = replace(CONFIG, log_every=2, epochs=2, checkpoint_every=0)
    train(config, tmp_path / "at once", dataset=dataset(), console=quiet())
    started, written, logged = [], [], []

    def start(tensor: torch.Tensor) -> HostCopy:
        started.append(tensor)
        return late(tensor)

    monkeypatch.setattr(HostCopy, "start", start)
    monkeypatch.setattr(HostCopy, "tolist", lambda copy: (copy.event.synchronize(), copy.copy.tolist())[1])
    originals = {name: getattr(training._Loop, name) for name in ("_step", "_log_step")}
    for name, original in originals.items():

        def without_a_wait(loop, *args, original=original, name=name):
            with no_host_sync():
                original(loop, *args)
            if name == "_log_step":
                logged.append(loop.run.step)
            written.append((loop.run.step, [row["step"] for row in loop.run.history["steps"]]))

        monkeypatch.setattr(training._Loop, name, without_a_wait)
    Late.waits = 0
    train(config, tmp_path / "late", dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "at once", tmp_path / "late")
    assert len(rows(tmp_path / "late" / "steps.csv")) == 8
    assert logged == [2, 4, 6, 8, 10, 12, 14, 16]
    # The row of step 2 is there in step 6, after four questions, and not before.
    assert next(step for step, there in written if 2 in there) == 6
    # Those of an epoch's last steps are waited for at its end, and so are the epoch's own numbers.
    assert Late.waits == 2 * (3 + 1)
    assert len(started) == 8 + 2


def test_a_loss_that_is_not_finite_names_its_own_step_where_its_number_comes_late(monkeypatch, tmp_path):
    original = training._Loop._step

    def step(loop, x, y):
        original(loop, x * torch.nan if loop.run.step == 8 else x, y)

    monkeypatch.setattr(training._Loop, "_step", step)
    monkeypatch.setattr(HostCopy, "start", late)
    console = Console(file=io.StringIO())
    with pytest.raises(RuntimeError, match="got nan at or before step 9;"):
        train(CONFIG, tmp_path, dataset=dataset(), console=console)
