"""benchmarks/detector/{recorder,trainings,traces}.py: what is recorded, and that recording changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.detector import traces
from benchmarks.detector.recorder import COLUMNS, GROUP, Recorder
from benchmarks.detector.traces import Trace, main, record
from benchmarks.detector.trainings import Cell, ImageTraining, TokenTraining, of_images, of_tokens
from benchmarks.paper.settings import SETTINGS
from elle_fast import ELLELoss, attacks, data
from elle_fast._core.seeds import derived_seed
from elle_fast.functional import draw_seed, pack_points
from tests.helpers import cross_entropy64

TINY = replace(
    SETTINGS["digits"].config, limit=100, validation=36, batch_size=32, epochs=3, width=4, checkpoint_every=0
)
METHODS = ("fgsm", "n-fgsm", "zero-grad", "elle-a")


def read(config):
    return data.load("digits", limit=config.limit, test_limit=16)


@pytest.fixture(params=METHODS)
def config(request):
    fast: dict[str, Any] = {"skip_below": 0.01, "triplet_fraction": 0.5} if request.param == "elle-a" else {}
    return replace(TINY, method=request.param, **fast)


def state(training):
    return {name: value.clone() for name, value in training.model.state_dict().items()}


def alone(config, folder):
    """The same training with nothing beside it, and lam of each step."""
    training = ImageTraining(config, read(config), folder / "alone.pt", resumed=False)
    lams = []
    while training.step < training.steps:
        for x, y in training.upcoming(training.steps_per_epoch):
            training.take_step(x, y)
            lams.append(float(training._run.criterion.stats.get("lam", 0.0)))
    training.close()
    return training, lams


def test_the_training_is_what_it_is_without_a_recorder(config, tmp_path, monkeypatch):
    cell, kept = of_images(config, read, 2), []
    start = cell.start

    def started(folder, resumed):
        kept.append(start(folder, resumed))
        return kept[0]

    record(replace(cell, start=started), tmp_path)
    expected, lams = alone(config, tmp_path)
    # All of the state: batch norm's statistics and its count of batches too.
    torch.testing.assert_close(state(kept[0]), state(expected), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{cell.name}.npz"]
    with np.load(tmp_path / f"{cell.name}.npz") as found:
        assert found["rows"][:, COLUMNS.index("lam")].tolist() == lams


def test_a_trace_has_every_step_and_probe(config, tmp_path):
    cell = of_images(config, read, 2)
    record(cell, tmp_path)
    with np.load(tmp_path / f"{cell.name}.npz") as found:
        assert found["columns"].tolist() == list(COLUMNS)
        assert found["rows"].shape == (6, len(COLUMNS))
        assert found["probes"][:, 0].tolist() == [0, 2, 4]
        assert found["ended"] == "stands"
        rows = dict(zip(COLUMNS, found["rows"].T, strict=True))
    measured = [name for name in COLUMNS if name not in {f"group_{i}" for i in range(2, 8)}]
    assert all(np.isfinite(rows[name]).all() for name in measured)
    assert np.isnan(rows["group_2"]).all()
    assert ((rows["falls"] >= 0) & (rows["falls"] <= 1)).all()


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_a_stopped_cell_goes_on_and_ends_with_the_same_trace(config, tmp_path, stopped_after, monkeypatch):
    cell = of_images(config, read, 2)
    record(cell, tmp_path / "whole")
    take_step = ImageTraining.take_step

    def stopping(self, x, y):
        if self.step == stopped_after:
            raise KeyboardInterrupt
        take_step(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTraining, "take_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            record(cell, tmp_path / "stopped")
    running = tmp_path / "stopped" / cell.name / "running.npz"
    assert running.exists() == (stopped_after > 1)
    seen: list[int] = []

    def counting(self, x, y):
        seen.append(self.step)
        take_step(self, x, y)

    monkeypatch.setattr(ImageTraining, "take_step", counting)
    record(cell, tmp_path / "stopped")
    assert seen == [*range(stopped_after // 2 * 2, 6)]
    with np.load(tmp_path / "whole" / f"{cell.name}.npz") as a, np.load(tmp_path / "stopped" / f"{cell.name}.npz") as b:
        for name in ("rows", "probes", "ended"):
            np.testing.assert_array_equal(a[name], b[name])


def test_a_stop_between_trace_and_checkpoint_leaves_no_gap(tmp_path, monkeypatch):
    cell = of_images(TINY, read, 2)
    record(cell, tmp_path / "whole")
    saves = []

    def stopping(self):
        saves.append(self.step)
        if len(saves) == 2:
            raise KeyboardInterrupt
        save(self)

    save = ImageTraining.save
    with monkeypatch.context() as patch:
        patch.setattr(ImageTraining, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            record(cell, tmp_path / "stopped")
    record(cell, tmp_path / "stopped")
    with np.load(tmp_path / "whole" / f"{cell.name}.npz") as a, np.load(tmp_path / "stopped" / f"{cell.name}.npz") as b:
        np.testing.assert_array_equal(a["rows"], b["rows"])
        np.testing.assert_array_equal(a["probes"], b["probes"])


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 10)
        return nn.Sequential(*layers).double().train()


@pytest.mark.parametrize("batch", [40, 12])
def test_the_columns_of_e_lin_against_the_formula(batch):
    """In float64, each of the three points in a pass of its own: so without batch norm, which makes one of them."""
    model, eps = network(), 0.3
    model[1] = nn.Identity()
    x, y = torch.rand(batch, 1, 8, 8, dtype=torch.float64), torch.randint(10, (batch,))
    found = Recorder(model, eps, 5, (0.0, 1.0)).of_triplets(x, y, step=7)

    seed = draw_seed(x.device, torch.Generator().manual_seed(derived_seed(5, 7)))
    points, alpha = pack_points(x, None, eps, seed=seed, bounds=(0.0, 1.0))
    assert ((points - x.repeat(3, 1, 1, 1)).abs().amax((1, 2, 3)) <= eps).all()
    losses = []
    for each in points.split(batch):
        leaf = model(each).detach().requires_grad_()
        losses.append((leaf, nn.functional.cross_entropy(leaf, y, reduction="none")))
    (z_a, a), (z_b, b), (z_c, c) = losses
    r = c - (1 - alpha) * a - alpha * b
    gradients = torch.autograd.grad(r.square().mean(), [z_a, z_b, z_c])
    of, rise = r.detach().numpy(), (b - a).detach().numpy()
    expected = {"r1": of.mean(), "r4": (of**4).mean(), "rise": (rise**2).mean(), "own_pass": (of[:GROUP] ** 2).mean()}
    expected["e_lin_norm"] = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    for i in range(8):
        part = of[i * GROUP : (i + 1) * GROUP]
        expected[f"group_{i}"] = (part**2).mean() if len(part) else math.nan
    assert found == pytest.approx(expected, rel=1e-10, nan_ok=True)


def test_the_own_pass_has_batch_norm_of_its_own():
    """The first 16 samples as `fast` sees them: normalised by their own 48 rows."""
    model, eps = network(), 0.3
    x, y = torch.rand(40, 1, 8, 8, dtype=torch.float64), torch.randint(10, (40,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = Recorder(model, eps, 5, None).of_triplets(x, y, step=7)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

    seed = draw_seed(x.device, torch.Generator().manual_seed(derived_seed(5, 7)))
    points, alpha = pack_points(x, None, eps, seed=seed)
    own = torch.cat([each[:GROUP] for each in points.split(40)])
    at = alpha[:GROUP].numpy()
    a, b, c = (cross_entropy64(each, y[:GROUP]) for each in model(own).split(GROUP))
    assert found["own_pass"] == pytest.approx(((c - (1 - at) * a - at * b) ** 2).mean(), rel=1e-10)
    assert found["own_pass"] != pytest.approx(found["group_0"], rel=1e-3)


@pytest.mark.parametrize("attack", ["fgsm", "n-fgsm", "rs-fgsm"])
def test_the_columns_of_the_attack_against_the_formula(attack):
    model, eps = network(), 0.1
    model[1] = nn.Identity()
    x, y = torch.rand(24, 1, 8, 8, dtype=torch.float64), torch.randint(10, (24,))
    recorder, seen = Recorder(model, eps, 0, (0.0, 1.0)), []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))
    criterion = ELLELoss(eps, 0.0, attack=attack, bounds=(0, 1))
    with recorder.step():
        criterion(model, x, y).backward()
    handle.remove()
    found = recorder.of_attack(y)

    start, x_adv = seen[0].requires_grad_(), seen[1][:24]
    if attack == "fgsm":
        torch.testing.assert_close(x_adv, attacks.fgsm(model, x, y, eps, bounds=(0, 1)), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(start), y, reduction="sum"), start)
    start = start.detach()
    leaf = model(x_adv).detach().requires_grad_()
    (of_logits,) = torch.autograd.grad(nn.functional.cross_entropy(leaf, y), leaf)
    before, after = cross_entropy64(model(start), y), cross_entropy64(model(x_adv), y)
    expected = {"start": before.mean(), "adv": after.mean(), "falls": (after < before).mean()}
    expected["predicted"] = float((grad * (x_adv - start)).sum()) / 24
    expected["ce_norm"] = float(of_logits.norm())
    assert found == pytest.approx(expected, rel=1e-10)
    assert found["predicted"] > 0


def test_passes_outside_a_step_are_not_taken_for_the_attack():
    model = network()
    recorder = Recorder(model, 0.1, 0, None)
    x, y = torch.rand(8, 1, 8, 8, dtype=torch.float64), torch.randint(10, (8,))
    with recorder.step():
        ELLELoss(0.1, 0.0)(model, x, y)
    first = recorder.of_attack(y)
    model(x + 1)
    assert recorder.of_attack(y) == first
    recorder.close()
    assert not model._forward_hooks


def test_tokens_are_recorded_and_their_training_is_left_alone(tmp_path):
    cell = of_tokens("elle-a", seed=3, epochs=1)
    kept = []

    def start(folder, resumed):
        kept.append(TokenTraining("elle-a", 3, 1))
        return kept[0]

    record(replace(cell, start=start), tmp_path)
    expected = TokenTraining("elle-a", 3, 1)
    for x, y in expected.upcoming(expected.steps_per_epoch):
        expected.take_step(x, y)
    torch.testing.assert_close(state(kept[0]), state(expected), rtol=0, atol=0)
    with np.load(tmp_path / f"{cell.name}.npz") as found:
        assert found["rows"].shape == (21, len(COLUMNS))
        assert found["probes"][:, 0].tolist() == [0, 10, 20]
        rows = dict(zip(COLUMNS, found["rows"].T, strict=True))
    assert np.isfinite(rows["own_pass"]).all()
    assert (rows["rise"] > 0).all()
    # No batch norm: the first group is the same in either pass, but for the order of float32 sums.
    np.testing.assert_allclose(rows["own_pass"], rows["group_0"], rtol=1e-2)


def traced(robust, every=25):
    trace = Trace()
    trace.probes = [(every * i, 0.5, value) for i, value in enumerate(robust)]
    return trace


def test_a_collapse_is_certain_after_twelve_probes_below_a_third():
    up = [0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3]
    assert traced([*up, *[0.05] * 11]).certain_at() is None
    assert traced([*up, *[0.05] * 12, 0.3, 0.3]).certain_at() == 25 * 18
    assert traced([*up, *[0.05] * 6, 0.15, *[0.05] * 11]).certain_at() is None
    # A single high probe is not what was lost.
    assert traced([0.06, 0.06, 0.3, 0.06, 0.06, *[0.05] * 30]).certain_at() is None


def test_how_a_training_ends():
    class Training:
        step, steps = 600, 1000

    certain = traced([*[0.3] * 7, *[0.05] * 12])
    assert certain.certain_at() == 450
    assert certain.ended(Training, 150) == "collapsed"
    assert certain.ended(Training, 151) is None
    assert certain.ended(Training, None) is None
    Training.step = 1000
    assert certain.ended(Training, None) == "collapsed"
    stands = traced([0.3] * 40)
    assert stands.ended(Training, 200) == "stands"
    Training.step = 600
    stands.rows = [[math.nan] * len(COLUMNS)]
    assert stands.ended(Training, 200) == "nan"


def test_a_cell_is_one_process_alone(tmp_path, monkeypatch):
    begun = []

    def of(name):
        return Cell(name, lambda folder, resumed: pytest.fail("not to be started"), 2)

    def recorded(cell, folder):
        begun.append(cell.name)
        if cell.name == "a":  # while it is under way another process looks for work, and finds b alone
            assert main(["--work", str(folder)]) == 0
        (folder / f"{cell.name}.npz").touch()

    monkeypatch.setattr(traces, "cells", lambda read: [of("a"), of("b")])
    monkeypatch.setattr(traces, "record", recorded)
    assert main(["--work", str(tmp_path)]) == 0
    assert begun == ["a", "b"]
