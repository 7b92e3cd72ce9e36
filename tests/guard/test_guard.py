"""The guard: it changes nothing until an alarm, and then goes back and adds E_lin."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from elle_fast import LocalLinearity, attacks
from elle_fast.functional import relative_linearity
from elle_fast.guard import Alarm, CollapsedError, CollapseGuard
from elle_fast.passes import NO_KWARGS
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, labels, rng

EPS = 0.1
PIXELS = torch.full((2, 3, 8, 8), 0.5)


def batch(step: int = 0, size: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(size, 3, 8, 8, generator=rng(step)), labels(size, 4, seed=step)


class Training:
    """FGSM of a small network, watched by a guard or not."""

    def __init__(self, guarded: bool = True, also: tuple[Any, ...] = (), dropout: bool = False, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = convnet(dropout=dropout).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        given = {"eps": EPS, "every": 2, "snapshot_every": 4, "margin": 3, "rescue_steps": 6, **options}
        self.guard = CollapseGuard(self.model, self.optimizer, also=also, **given) if guarded else None
        self.done = 0

    def take(self, steps: int) -> None:
        for _ in range(steps):
            x, y = batch(self.done)
            x_adv = attacks.fgsm(self.model, x, y, EPS)
            loss = F.cross_entropy(self.model(x_adv), y)
            if self.guard is not None:
                loss = loss + self.guard.penalty(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.guard is not None:
                self.guard.step(x, y)
            self.done += 1

    def state(self) -> dict[str, torch.Tensor]:
        moments = {f"m{i}": each["momentum_buffer"] for i, each in enumerate(self.optimizer.state.values())}
        return copy.deepcopy({**self.model.state_dict(), **moments})


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_an_alarm_the_training_is_that_without_a_guard():
    held_out = batch(99)
    alone = Training(guarded=False, dropout=True)
    watched = Training(dropout=True, held_out=held_out, probe_every=2, threshold=1.0)
    for one in (alone, watched):
        torch.manual_seed(5)
        one.take(9)
    assert watched.guard is not None
    assert watched.guard.alarms == []
    assert same(alone.state(), watched.state())
    assert watched.model.training


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linearity_is_relative_e_lin_of_the_first_sixteen(norm):
    training = Training(every=1, threshold=1.0, seed=7, norm=norm)
    x, y = batch(1)
    guard = training.guard
    assert guard is not None
    expected = []
    ours = LocalLinearity(EPS, bounds=(0.0, 1.0), norm=norm, generator=rng(7))
    twin = copy.deepcopy(training.model)  # in train mode, its statistics left alone
    for _ in range(2):
        guard.step(x, y)
        with torch.no_grad():
            rows, alpha = ours.triplets(twin, x[:16], y[:16], ours.packing, None, NO_KWARGS)
        expected.append(relative_linearity(rows, y[:16], alpha).item())
    guard.step(x, y)  # reads what was sent
    mean, count = guard.state_dict()["judge"]["means"]["linearity"]
    assert count == 2
    assert mean == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert min(expected) > 0


def test_an_alarm_goes_back_to_a_snapshot_that_is_old_enough_and_adds_e_lin():
    seen: list[Alarm] = []
    training = Training(horizon=3, threshold=1.0, on_alarm=seen.append)
    averaged = AveragedModel(training.model)
    training = Training(horizon=3, threshold=1.0, on_alarm=seen.append, also=(averaged,))
    guard = training.guard
    assert guard is not None
    states = {0: training.state()}
    for _ in range(12):
        training.take(1)
        averaged.update_parameters(training.model)
        states[training.done] = training.state()
    assert seen == []
    kept = [each["step"] for each in guard.state_dict()["snapshots"]["kept"]]
    assert len(kept) == 2
    assert kept[1] - kept[0] >= 4
    guard._judge._averages["linearity"] = (3, 0.0)  # whatever is seen next is an alarm
    averages_before = int(averaged.n_averaged)
    while not seen:
        x, y = batch(training.done)
        assert guard.penalty(x, y) == 0.0
        training.take(1)
    (alarm,) = seen
    assert (alarm.signal, alarm.step, alarm.limit) == ("linearity", training.done, 0.0)
    assert alarm.value > 0
    assert alarm.back_to == max(step for step in kept if step <= alarm.step - 3)
    assert alarm.back_to is not None
    assert same(training.state(), states[alarm.back_to])
    assert int(averaged.n_averaged) < averages_before
    # E_lin is in the loss for six steps, with the weight of lam.
    assert guard.rescuing
    x, y = batch(50)
    generator = torch.Generator().manual_seed(0)
    generator.set_state(guard.state_dict()["generator"])
    expected = LocalLinearity(EPS, bounds=(0.0, 1.0), generator=generator)(copy.deepcopy(training.model), x, y)
    found = guard.penalty(x, y)
    assert isinstance(found, torch.Tensor)
    assert found.item() == pytest.approx(4000.0 * expected.item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found, list(training.model.parameters())))
    guard._judge._averages["linearity"] = (3, 1.0)
    training.take(6)
    assert not guard.rescuing
    assert guard.penalty(x, y) == 0.0


def test_a_collapse_in_the_first_steps_goes_back_to_the_first_one():
    training = Training(threshold=0.0, snapshot_every=100)
    training.take(1)
    first = training.state()
    guard = training.guard
    assert guard is not None
    while not guard.alarms:
        training.take(1)
    assert guard.alarms[0].back_to == 1
    assert same(training.state(), first)


def test_before_the_margin_the_weights_stay_and_a_warning_says_so():
    training = Training(threshold=0.0, margin=50)
    guard = training.guard
    assert guard is not None
    with pytest.warns(
        UserWarning, match=r"^CollapseGuard: linearity is \S+ in step \d+, and no snapshot is 50 steps old"
    ):
        training.take(9)
    assert guard.alarms[0].back_to is None
    assert guard.rescuing


def test_actions():
    stop = Training(threshold=0.0, action="stop")
    with pytest.raises(CollapsedError, match=r"^the training collapsed: Alarm\(step=\d+, signal='linearity'"):
        stop.take(20)
    alarm = Training(threshold=0.0, action="alarm")
    alone = Training(guarded=False)
    for one in (alarm, alone):
        one.take(12)
    assert alarm.guard is not None
    assert alarm.guard.alarms
    assert {each.back_to for each in alarm.guard.alarms} == {None}
    assert not alarm.guard.rescuing
    assert alarm.guard.state_dict()["snapshots"]["kept"] == []  # as none is gone back to
    assert same(alarm.state(), alone.state())
    back = Training(threshold=0.0, action="rollback")
    assert back.guard is not None
    while not back.guard.alarms:
        back.take(1)
    assert back.guard.rescuing
    assert back.guard.penalty(*batch()) == 0.0


def test_a_rescue_that_does_not_hold_is_not_tried_for_ever():
    training = Training(threshold=0.0, snapshot_every=1000, rescue_steps=6)
    guard = training.guard
    assert guard is not None
    message = "and the last 3 returns to step 1 did not hold: the weights stay as they are"
    with pytest.warns(UserWarning, match=message) as caught:
        training.take(60)
    assert [each.back_to for each in guard.alarms[:6]] == [1, 1, 1, None, None, None]
    assert caught[0].filename == __file__  # of the user's line, not of the package's


def test_arguments_beside_x_go_with_the_samples():
    """A model that takes a shift for each sample, and a scale for all, is the model of the points so shifted."""
    torch.manual_seed(0)
    inner = convnet().eval()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: float) -> torch.Tensor:
            logits: torch.Tensor = self.inner(x + scale * shift)
            return logits

    (x, y), (held_x, held_y) = batch(), batch(99, size=32)
    shift, held_shift = (0.1 * torch.randn(n, 3, 1, 1, generator=rng(n)) for n in (20, 32))
    found = []
    for model, points, given in (
        (Shifted(), held_x, {"shift": held_shift, "scale": 2.0}),
        (inner, held_x + 2.0 * held_shift, {}),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"eps": EPS, "bounds": None, "every": 1, "probe_every": 1}
        guard = CollapseGuard(model, optimizer, held_out=(points, held_y, given), **options)
        own = {"shift": shift, "scale": 2.0} if given else {}
        guard.step(x if given else x + 2.0 * shift, y, own)
        guard._rescue_until = 9
        penalty = guard.penalty(x if given else x + 2.0 * shift, y, own)
        assert isinstance(penalty, torch.Tensor)
        found.append((*(numbers for _, _, numbers in guard.state_dict()["sent"]), penalty.item()))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    assert 0 < found[0][1][0] < 32


def test_falling_losses_are_an_alarm():
    training = Training(linearity=False)
    guard = training.guard
    assert guard is not None
    x, y = batch()
    rising, falling = torch.zeros(20), torch.zeros(20)
    rising[:] = 1.0
    for _ in range(6):
        guard.step(x, y, losses=(torch.zeros(20), rising))
    assert not guard.alarms
    falling[:4] = -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no snapshot that is old enough
        for _ in range(6):
            guard.step(x, y, losses=(torch.zeros(20), falling))
    assert guard.alarms[0].signal == "falls"
    for bad in ((torch.zeros(20), torch.zeros(19)), (torch.zeros(19), torch.zeros(19)), (1.0, 2.0)):
        with pytest.raises(ValueError, match=r"^losses: expected two tensors \[B = 20\].* got .* and "):
            guard.step(x, y, losses=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^losses: expected two tensors \[B\], got 3"):
        guard.step(x, y, losses=3)  # type: ignore[arg-type]


def test_a_probe_counts_what_withstands_pgd():
    x, y = batch(99, size=32)
    training = Training(linearity=False, held_out=(x, y), probe_every=1, every=1)
    guard = training.guard
    assert guard is not None
    guard.step(*batch())
    ((signal, step, numbers),) = guard.state_dict()["sent"]
    assert (signal, step, numbers[1:]) == ("probe", 1, [32.0, 4.0])
    model = copy.deepcopy(training.model).eval()
    points = attacks.pgd(model, x, y, EPS, steps=10, generator=rng(0))
    assert numbers[0] == (model(points).argmax(1) == y).sum()
    assert (points - x).abs().max() > 0


def test_normalised_models_and_outputs_of_another_form():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    torch.manual_seed(0)
    inner = convnet()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.inner(x)}

    def normalised(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = inner((x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1))
        return logits

    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held_out = batch(99, size=32)
    options: dict[str, Any] = {"mean": mean, "std": std, "logits": lambda output: output["logits"]}
    guard = CollapseGuard(model, optimizer, eps=EPS, held_out=held_out, every=1, probe_every=1, **options)
    guard.step(*batch())
    found = {signal: numbers for signal, _, numbers in guard.state_dict()["sent"]}
    model.eval()
    points = attacks.pgd(normalised, *held_out, EPS, steps=10, generator=_after_one_draw(guard))
    assert found["probe"][0] == (normalised(points).argmax(1) == held_out[1]).sum()
    assert 0 < found["linearity"][0] < found["linearity"][1]


def _after_one_draw(guard: CollapseGuard) -> torch.Generator:
    """The guard's generator before its probe: it has drawn the triplets' seed."""
    from elle_fast.functional import draw_seed

    generator = rng(0)
    draw_seed(torch.device("cpu"), generator)
    return generator


def test_a_resumed_training_goes_on_as_if_it_had_not_stopped():
    options: dict[str, Any] = {"threshold": 0.01, "horizon": 3, "held_out": batch(99), "probe_every": 5}
    whole = Training(**options)
    whole.take(24)
    assert whole.guard is not None
    assert whole.guard.alarms
    for stop_after in (5, 10, 17):
        first = Training(**options)
        first.take(stop_after)
        assert first.guard is not None
        saved: dict[str, Any] = {"model": first.model, "optimizer": first.optimizer, "guard": first.guard}
        file = io.BytesIO()
        torch.save({name: each.state_dict() for name, each in saved.items()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        second = Training(**options)
        assert second.guard is not None
        second.done = stop_after
        second.model.load_state_dict(state["model"])
        second.optimizer.load_state_dict(state["optimizer"])
        second.guard.load_state_dict(state["guard"])
        second.take(24 - stop_after)
        assert second.guard.alarms == whole.guard.alarms
        assert same(second.state(), whole.state())


def test_no_snapshot_is_taken_soon_after_an_alarm():
    """What is on its way from the lost weights, and how the rescue goes, is not known yet."""
    training = Training(threshold=0.0, snapshot_every=1, margin=8, every=1, horizon=1)
    guard = training.guard
    assert guard is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no snapshot that is old enough
        while not guard.alarms:
            training.take(1)
    guard._judge._averages["linearity"] = (1, 1.0)
    first = guard.alarms[0].step
    training.take(16)
    taken = [each["step"] for each in guard.state_dict()["snapshots"]["kept"] if each["step"] > first]
    assert taken
    assert min(taken) >= first + 8


def test_joined_batches_are_refused(tmp_path, monkeypatch):
    """A rank that has none left would not take part in the sums, and the others would wait for it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(convnet())
        guard = CollapseGuard(model, torch.optim.SGD(model.parameters(), lr=0.1), eps=EPS, every=1)
        monkeypatch.setattr(dist, "get_world_size", lambda *given: 2)
        with model.join(), pytest.raises(RuntimeError, match=r"^model: expected no join\(\) around CollapseGuard"):
            guard.step(*batch())
    finally:
        dist.destroy_process_group()


def test_snapshots_are_far_enough_apart_to_go_back_to():
    training = Training(snapshot_every=1, margin=5, every=1, threshold=1.0)
    guard = training.guard
    assert guard is not None
    training.take(30)
    older, newer = (each["step"] for each in guard.state_dict()["snapshots"]["kept"])
    assert newer - older >= 5


def test_weights_that_are_not_finite_are_an_alarm_and_no_snapshot():
    training = Training(horizon=3, threshold=1.0)
    guard = training.guard
    assert guard is not None
    training.take(12)
    kept = [each["step"] for each in guard.state_dict()["snapshots"]["kept"]]
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    while not guard.alarms:
        training.take(1)
        assert guard.state_dict()["snapshots"]["kept"][0]["step"] in kept
    assert guard.alarms[0].back_to in kept
    assert all(value.isfinite().all() for value in training.model.state_dict().values())


def test_losses_do_not_hide_weights_that_are_not_finite():
    """Nor does a probe: neither may make a snapshot of them."""
    for linearity in (True, False):
        training = Training(horizon=3, threshold=1.0, linearity=linearity, falls=1.0, held_out=batch(99), probe_every=2)
        guard = training.guard
        assert guard is not None
        training.take(12)
        (kept,) = {tuple(each["step"] for each in guard.state_dict()["snapshots"]["kept"])}
        with torch.no_grad():
            next(training.model.parameters()).fill_(float("nan"))
        for step in range(12):
            x, y = batch(step)
            before = F.cross_entropy(training.model(x), y, reduction="none").detach()
            guard.step(x, y, losses=(before, before - 1))
            if guard.alarms:
                break
        (alarm,) = guard.alarms
        assert alarm.value != alarm.value
        assert alarm.back_to in kept
        assert all(value.isfinite().all() for value in training.model.state_dict().values())


def test_a_probe_of_a_model_of_nan_is_nan():
    training = Training(linearity=False, held_out=batch(99), probe_every=1, every=1)
    guard = training.guard
    assert guard is not None
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    guard.step(*batch())
    ((signal, _, numbers),) = guard.state_dict()["sent"]
    assert (signal, numbers[1:]) == ("probe", [20.0, 4.0])
    assert numbers[0] != numbers[0]


def test_a_snapshot_of_weights_that_are_not_finite_is_not_gone_back_to():
    training = Training(threshold=1.0)
    guard = training.guard
    assert guard is not None
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    with pytest.warns(UserWarning, match="no snapshot is 3 steps old and finite: the weights stay as they are"):
        training.take(12)
    assert [each["step"] for each in guard.state_dict()["snapshots"]["kept"]] == [1]
    assert [alarm.back_to for alarm in guard.alarms] == [None] * len(guard.alarms)
    # The older of two is taken where the newer is not finite.
    training = Training(threshold=1.0)
    guard = training.guard
    assert guard is not None
    training.take(12)
    older, newer = guard._snapshots._kept
    newer["model"]["0.weight"].fill_(float("nan"))
    assert guard._snapshots.nearest(99) == older["step"]


def test_going_back_forgets_what_the_lost_weights_withstood():
    training = Training(linearity=True, threshold=1.0, held_out=batch(99), probe_every=2, snapshot_every=1000)
    guard = training.guard
    assert guard is not None
    training.take(8)
    assert guard._judge.best > 0
    guard._judge._averages["linearity"] = (3, 0.0)
    while not guard.alarms:
        training.take(1)
    assert guard.alarms[0].back_to == 1
    assert guard._judge.best == 0.0  # step 1 had no probe


def test_a_look_is_in_float32_whatever_the_loop_casts_to():
    """Rounding to bfloat16 looks like curvature, and moves what withstands PGD."""
    found = []
    for casts, rounds in ((False, False), (True, False), (True, True)):
        training = Training(every=1, held_out=batch(99), probe_every=1)
        guard = training.guard
        assert guard is not None
        x, y = batch()
        x = x.bfloat16().to(torch.bfloat16 if rounds else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            guard.step(x, y)
            guard._rescue_until = 9
            penalty = guard.penalty(x, y)
        assert isinstance(penalty, torch.Tensor)
        found.append(([numbers for _, _, numbers in guard.state_dict()["sent"]], penalty.item()))
    assert found[0] == found[1] == found[2]
    asked = Training(every=1, triplet_precision="bf16").guard
    assert asked is not None
    asked.step(x.float(), y)
    assert asked.state_dict()["sent"][0][2] != found[0][0][0]


def test_a_model_in_bfloat16_is_looked_at_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = CollapseGuard(model, optimizer, eps=EPS, bounds=None, every=1, probe_every=1, held_out=batch(99))
    x, y = batch()
    guard.step(x.bfloat16(), y)
    (signal, _, linear), (_, _, probe) = guard.state_dict()["sent"]
    assert signal == "linearity"
    assert linear[1] > 0
    assert probe[1:] == [20.0, 4.0]


def test_what_goes_back_too_may_keep_what_it_is_given():
    class Keeps:
        def __init__(self) -> None:
            self.value = torch.zeros(2)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.value = state["value"]

    own = Keeps()
    training = Training(threshold=0.0, also=(own,), snapshot_every=1000, rescue_steps=1)
    guard = training.guard
    assert guard is not None
    while len(guard.alarms) < 2:
        training.take(1)
        if guard.alarms and guard.alarms[-1].step == training.done:
            assert own.value.tolist() == [0.0, 0.0]
        own.value += 1


def test_another_radius_begins_the_probes_anew():
    training = Training(linearity=False, held_out=batch(99), probe_every=1, every=1)
    guard = training.guard
    assert guard is not None
    training.take(2)
    assert guard._judge.best > 0
    guard.eps = 2 * EPS
    assert guard.eps == 2 * EPS
    state = guard.state_dict()
    assert (state["judge"]["bests"], state["sent"]) == ([], [])
    guard.step(*batch())
    points = state["snapshots"]["kept"]
    assert points
    again = Training(linearity=False, held_out=batch(99), probe_every=1, every=1)
    assert again.guard is not None
    again.guard.load_state_dict(guard.state_dict())
    assert again.guard.eps == 2 * EPS


def test_held_out_labels_may_be_probabilities():
    x, y = batch(99, size=8)
    soft = F.one_hot(y, 4).float()
    counts = []
    for labels_of in (y, soft):
        training = Training(linearity=False, held_out=(x, labels_of), probe_every=1, every=1)
        assert training.guard is not None
        training.guard.step(*batch())
        counts.append(training.guard.state_dict()["sent"][0][2])
    assert counts[0][1:] == counts[1][1:] == [8.0, 4.0]
    assert counts[0] == counts[1]


def _train_on_one_of_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(convnet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    held_out = batch(90 + rank, size=8 + rank)
    given: dict[str, Any] = {
        "eps": EPS,
        "every": 2,
        "margin": 4,
        "snapshot_every": 4,
        "threshold": 0.0,
        "probe_every": 4,
    }
    guard = CollapseGuard(model, optimizer, held_out=held_out, seed=rank, **given)
    sent = []
    for step in range(16):
        x, y = batch(100 * rank + step)
        loss = F.cross_entropy(model(x), y) + guard.penalty(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        guard.step(x, y, losses=(torch.zeros(20), torch.arange(20.0) - 3 * rank))
        sent.append(guard.state_dict()["sent"])
    weights = dict(model.named_parameters())  # batch norm's statistics are each rank's own
    torch.save({"weights": weights, "alarms": guard.state_dict()["alarms"], "sent": sent}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_see_the_same_numbers_and_decide_alike(tmp_path):
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        _train_on_one_of_two_ranks, (str(tmp_path),), nprocs=2
    )
    one, other = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert one["sent"] == other["sent"]
    assert one["alarms"] == other["alarms"]
    assert len(one["alarms"]) >= 2
    assert {alarm["back_to"] for alarm in one["alarms"]} != {None}
    assert same(one["weights"], other["weights"])
    numbers = {signal: values for step in one["sent"] for signal, _, values in step}
    assert numbers["falls"] == [3.0, 40.0]  # of both
    assert numbers["probe"][1:] == [8.5, 4.0]  # as many as a rank has, on average


def test_a_step_waits_for_no_device():
    """In two steps after one, in which all is sent, and nothing is old enough to be read."""
    training = Training(every=2, held_out=batch(99), probe_every=2)
    training.take(1)
    guard = training.guard
    assert guard is not None
    guard._rescue_until = 9
    x, y = batch()
    for _ in range(2):
        with no_host_sync():
            guard.step(x, y, losses=(torch.zeros(20), torch.ones(20)))
            penalty = guard.penalty(x, y)
        assert isinstance(penalty, torch.Tensor)
    assert [(signal, step) for signal, step, _ in guard._sent] == [
        *(("falls", 2), ("linearity", 2), ("probe", 2), ("falls", 3))
    ]


def test_numbers_are_read_when_they_are_old_enough():
    training = Training(every=3, threshold=1.0, held_out=batch(99), probe_every=2)
    guard = training.guard
    assert guard is not None
    for step in range(1, 10):
        x, y = batch(step)
        guard.step(x, y, losses=(torch.zeros(20), torch.ones(20)))
        if step % 3 == 0:
            assert min(sent for _, sent, _ in guard._sent) == step - 2


def test_buffers_of_any_layer_are_as_without_the_guard():
    """Spectral norm's vectors change in each pass in train mode."""
    found = []
    for guarded in (True, False):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(192, 4))
        model = nn.Sequential(nn.Flatten(), layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"eps": EPS, "every": 1, "probe_every": 1, "threshold": 1.0, "held_out": batch(99)}
        guard = CollapseGuard(model, optimizer, **options) if guarded else None
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if guard is not None:
                guard.step(x, y)
        found.append(copy.deepcopy(model.state_dict()))
    assert same(*found)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"eps": -1.0}, ValueError, "eps: expected"),
        ({"every": 0}, ValueError, "every: expected an integer >= 1, got 0"),
        ({"margin": 1.5}, TypeError, "margin: expected an integer >= 1"),
        ({"threshold": 2.0}, ValueError, "threshold: expected"),
        ({"lam": -1.0}, ValueError, "lam: expected"),
        ({"action": "pray"}, ValueError, "action: expected one of 'elle', 'rollback', 'stop', 'alarm', got 'pray'"),
        ({"penalty": "abs"}, TypeError, "CollapseGuard: expected options among"),
        ({"also": (3,)}, TypeError, "also: expected objects with state_dict and load_state_dict, got 3"),
        ({"also": None}, TypeError, "also: expected objects with state_dict and load_state_dict, got None"),
        ({"held_out": (PIXELS, labels(3, 4))}, ValueError, "target: expected"),
        ({"held_out": (PIXELS, torch.zeros(2, 2, 2)), "loss_fn": torch.sub}, ValueError, "held_out: expected x and y"),
        ({"held_out": 3}, TypeError, "held_out: expected x and y"),
        ({"on_alarm": 3}, TypeError, "on_alarm: expected"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        CollapseGuard(model, optimizer, **{"eps": EPS, **options})


def test_what_is_no_model_or_optimizer_is_refused():
    model = convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module"):
        CollapseGuard(lambda x: x, optimizer, eps=EPS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^optimizer: expected a torch.optim.Optimizer"):
        CollapseGuard(model, 0.1, eps=EPS)  # type: ignore[arg-type]
    one = CollapseGuard(model, optimizer, eps=EPS)
    one.step(*batch())
    narrower = convnet(classes=1)
    for another in (nn.Linear(2, 2), narrower):
        other = CollapseGuard(another, optimizer, eps=EPS)
        before = other.state_dict()
        with pytest.raises(ValueError, match=r"^snapshots: expected those of this model, got those of another one"):
            other.load_state_dict(one.state_dict())
        assert other.state_dict()["step"] == before["step"] == 0
