"""elle_fast.capture: the step on the CPU, and its handling of CUDA graphs with a graph that runs on the CPU."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import ELLELoss, capture
from tests.helpers import rng

EPS = 0.1


class Net(nn.Module):
    """Batch norm has buffers, dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def parts(seed: int = 0, **options: Any) -> tuple[ELLELoss, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    criterion = ELLELoss(EPS, 10.0, **{"adaptive": True, "gamma": 0.5, "min_history": 2, "sensitivity": 0.5, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
    return criterion, model, optimizer


def batches(count: int, short: int | None = None) -> list[tuple[Tensor, Tensor]]:
    generator = rng(5)
    sizes = [8 if i != short else 5 for i in range(count)]
    return [(torch.rand(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def everything(*parts: Any) -> list[Tensor]:
    criterion, model, optimizer = parts
    tensors = [*model.state_dict().values(), *criterion.state_dict().values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.clone() for tensor in (*tensors, torch.get_rng_state())]


def by_hand(
    parts: tuple[ELLELoss, nn.Module, torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
    rates: list[float],
    *,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
    clip: float | None = None,
) -> list[float]:
    criterion, model, optimizer = parts
    losses = []
    for (x, y), rate in zip(data, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = criterion(model, x, y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class FakeGraph:
    """A graph on the CPU: what is captured is a function that a replay calls, with results in the same tensors."""

    criterion: ELLELoss
    made: list[FakeGraph]

    def __init__(self, device: torch.device, generator: Any, others: list[FakeGraph]) -> None:
        self.replays = 0
        self.others = len(others)
        FakeGraph.made.append(self)

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self.run, self.loss = run, run()
        self.stats = FakeGraph.criterion._stats
        return self.loss

    def replay(self) -> None:
        self.replays += 1
        self.loss.copy_(self.run())
        for name, value in FakeGraph.criterion._stats.items():
            self.stats[name].copy_(value)


def run_all(device: torch.device, runs: Any) -> list[Tensor]:
    return [run() for run in runs]


@pytest.fixture
def graphs(monkeypatch):
    module = sys.modules["elle_fast.step.capture"]
    monkeypatch.setattr(module, "_can_be_captured", lambda device: True)
    monkeypatch.setattr(module, "_Graph", FakeGraph)
    monkeypatch.setattr(module, "_warm_up", run_all)
    FakeGraph.made = []
    return FakeGraph.made


def captured(made: tuple[ELLELoss, nn.Module, torch.optim.Optimizer], **options: Any) -> Any:
    FakeGraph.criterion = made[0]
    return capture(*made, *batches(1)[0], **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "autocast": {"autocast": torch.bfloat16},
    "clipped": {"clip_grad_norm": 0.1},
}
RATES = [0.1, 0.2, 0.2, 0.05, 0.1, 0.3, 0.1, 0.0, 0.1, 0.1, 0.2, 0.1]


@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_cpu_it_is_the_step_itself(name):
    options = OPTIONS[name]
    expected, found = parts(), parts()
    hand = {"autocast": options.get("autocast"), "clip": options.get("clip_grad_norm")}
    torch.manual_seed(1)
    losses = by_hand(expected, batches(12, short=11), RATES, **hand)
    torch.manual_seed(1)
    step = captured(found, **options)
    assert not step.captured
    for (x, y), rate, loss in zip(batches(12, short=11), RATES, losses, strict=True):
        for group in found[2].param_groups:
            group["lr"] = rate
        returned = step(x, y)
        assert returned.item() == loss
        assert not returned.requires_grad
    assert same(everything(*expected), everything(*found))


@pytest.mark.parametrize("options", [{}, {"skip_below": 0.3}, {"skip_below": 0.0, "lagged": True}], ids=str)
def test_replays_are_the_steps(graphs, options):
    """The same weights, statistics, momentum, lam and random numbers as by hand, to the bit; a short batch as well."""
    expected, found = parts(**options), parts(**options)
    data = batches(12, short=6)
    torch.manual_seed(1)
    losses = by_hand(expected, data, RATES)
    torch.manual_seed(1)
    step = captured(found)
    assert step.captured
    stats = []
    for (x, y), rate, loss in zip(data, RATES, losses, strict=True):
        for group in found[2].param_groups:
            group["lr"] = rate  # as a schedule does that knows nothing of tensors
        assert step(x, y).item() == loss
        stats.append(found[0].stats)
    assert same(everything(*expected), everything(*found))
    # What was read stays what it was.
    assert [each["loss"].item() for each in stats] == losses
    assert sum(graph.replays for graph in graphs) == 11 + len(graphs)  # one more of each, before the first step
    if "skip_below" in options:
        counts = [found[0].stats[f"{kind}_steps"].item() for kind in ("light", "full")]
        assert min(counts) > 1
        assert [found[0].stats[f"{kind}_steps"] for kind in ("light", "full")] == [
            expected[0].stats[f"{kind}_steps"] for kind in ("light", "full")
        ]
        assert [graph.others for graph in graphs] == [0, 1]
        assert min(graph.replays for graph in graphs) > 2
    else:
        assert len(graphs) == 1


def test_capturing_changes_nothing(graphs):
    made = parts(skip_below=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    before = everything(*made)
    step = captured(made, scaler=scaler)
    after = everything(*made)
    # The optimiser's state is there now, as zeros.
    extra = after[len(before) - 1 : -1]
    assert len(extra) == 6
    assert not any(tensor.any() for tensor in extra)
    assert same(before, [*after[: len(before) - 1], after[-1]])
    assert made[0].stats == {}
    assert scaler.get_scale() == 1024.0
    assert all(parameter.grad is None for parameter in made[1].parameters())
    # A later capture keeps the momentum that there is.
    step(*batches(1)[0])
    before = everything(*made)
    captured(made)
    assert same(before, everything(*made))


def test_a_scaler_and_clipping(graphs):
    expected, found = parts(), parts()
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    torch.manual_seed(1)
    losses = by_hand(expected, batches(12), RATES, scaler=scalers[0], clip=0.1)
    torch.manual_seed(1)
    step = captured(found, scaler=scalers[1], clip_grad_norm=0.1)
    for (x, y), rate, loss in zip(batches(12), RATES, losses, strict=True):
        found[2].param_groups[0]["lr"].fill_(rate)
        assert step(x, y).item() == loss
    assert same(everything(*expected), everything(*found))
    assert scalers[0].get_scale() == scalers[1].get_scale() == 1024.0 * 2**6


def test_torch_schedules_take_effect(graphs):
    rates = []
    for how in ("by hand", "captured"):
        made = parts()
        step = captured(made) if how == "captured" else None
        schedule = torch.optim.lr_scheduler.CyclicLR(
            made[2], base_lr=0.0, max_lr=0.2, step_size_up=3, cycle_momentum=False
        )
        torch.manual_seed(1)
        for x, y in batches(8):
            if step is None:
                by_hand(made, [(x, y)], [float(made[2].param_groups[0]["lr"])])
            else:
                step(x, y)
            schedule.step()
        rates.append([float(made[2].param_groups[0]["lr"]), *everything(*made)])
    assert rates[0][0] == pytest.approx(rates[1][0], rel=1e-6)
    # A float32 rate on the device, a Python number by hand.
    for one, other in zip(rates[0][1:-1], rates[1][1:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_a_constant_of_the_graph_may_not_change(graphs):
    made = parts()
    criterion, model, optimizer = made
    step, batch = captured(made), batches(1)[0]
    step(*batch)

    def refused(what: str) -> None:
        with pytest.raises(RuntimeError, match=rf"^capture: expected what a CUDA graph holds .*got another .*{what}"):
            step(*batch)

    optimizer.param_groups[0]["momentum"] = 0.8
    refused("momentum of the optimizer's group 0")
    optimizer.param_groups[0]["momentum"] = 0.9
    for module in (model, model.get_submodule("layers.1")):  # one frozen batch norm is enough
        module.eval()
        refused("train or eval mode of a module")
        module.train()
    criterion.eval()
    refused("criterion.training")
    criterion.train()
    criterion.eps = 0.2
    refused("criterion.eps")
    criterion.eps = EPS
    assert criterion.controller is not None
    criterion.controller.gamma = 0.9
    refused("criterion.controller")
    criterion.controller.gamma = 0.5
    weight = next(model.parameters())
    weight.requires_grad_(False)
    refused("tensor of the model, the optimizer or the criterion")
    weight.requires_grad_(True)
    step(*batch)
    kept = weight.data
    weight.data = kept.clone()  # as by model.cpu() and model.cuda()
    refused("tensor of the model")
    weight.data = kept
    step(*batch)
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        refused("tensor of the model, the optimizer")


def test_an_autocast_around_the_call_has_no_stale_weights():
    """It keeps the weights that it has cast until it ends; the optimiser moves them in the meantime."""
    losses = []
    for around in (False, True):
        made = parts(adaptive=False)
        torch.manual_seed(1)
        step = captured(made, autocast=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            losses.append([step(*batches(1)[0]).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_gradients_do_not_outlive_a_call(graphs):
    criterion, model, _ = parts()
    some = torch.optim.SGD(list(model.parameters())[:2], lr=0.1, fused=True)
    step = captured((criterion, model, some))
    for _ in range(2):
        step(*batches(1)[0])
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_rate_that_is_a_tensor_stays_the_users(graphs):
    criterion, model, _ = parts()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)
    step = captured((criterion, model, optimizer))
    rate.fill_(0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step(*batches(1)[0])
    assert same(before, list(model.parameters()))


def test_dropout_cannot_be_captured_with_recomputation(graphs):
    made = parts(forward="checkpoint")
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^model: expected one that draws no random numbers"):
        captured(made)
    assert torch.equal(before, torch.get_rng_state())
    made[1].get_submodule("layers.3").p = 0.0  # type: ignore[assignment]
    captured(made)(*batches(1)[0])


def test_a_failure_leaves_the_scaler_usable(graphs, monkeypatch):
    made = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda self: torch.zeros(2)[3])
        with pytest.raises(RuntimeError, match=r"^capture: expected"):
            captured(made, scaler=scaler, clip_grad_norm=1.0)
    assert not {"grad_scale", "found_inf"} & vars(made[2]).keys()
    captured(made, scaler=scaler, clip_grad_norm=1.0)(*batches(1)[0])


def test_a_replay_that_is_not_finite_is_refused(graphs, monkeypatch):
    monkeypatch.setattr(FakeGraph, "replay", lambda self: self.loss.fill_(torch.nan))
    with pytest.raises(RuntimeError, match=r"a replay's loss was nan$"):
        captured(parts())


def test_a_step_that_cannot_be_captured(graphs, monkeypatch):
    made = parts()
    before = everything(*made)

    def capture_fails(self: FakeGraph, run: Any) -> Tensor:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(FakeGraph, "capture", capture_fails)
    with pytest.raises(RuntimeError, match=r"^capture: expected .* by RuntimeError: operation not .* is capturing$"):
        captured(made)
    after = everything(*made)
    assert same(before, [*after[: len(before) - 1], after[-1]])
    assert made[2].param_groups[0]["lr"] == 0.1
    assert made[0].stats == {}


def test_optimisers_that_cannot_be_captured(graphs):
    criterion, model, _ = parts()
    weights = list(model.parameters())

    def refused(optimizer: torch.optim.Optimizer, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            captured((criterion, model, optimizer), **options)
        assert isinstance(optimizer.param_groups[0]["lr"], float)

    refused(torch.optim.SGD(weights, lr=0.1), r"^optimizer: expected fused=True .* got SGD with neither")
    refused(
        torch.optim.SGD(weights, lr=0.1, momentum=0.9, dampening=0.1, fused=True), r"^optimizer: expected dampening=0"
    )
    refused(torch.optim.NAdam(weights, lr=0.1, capturable=True), r"^optimizer: .* the first state of NAdam")
    refused(
        torch.optim.Adam(weights, lr=0.1, capturable=True),
        r"^scaler: expected an optimizer with fused=True",
        scaler=torch.amp.GradScaler("cpu"),
    )
    rates = torch.optim.SGD(weights, lr=0.1, fused=True)
    captured((criterion, model, rates), scaler=torch.amp.GradScaler("cpu", enabled=False))


def test_bad_arguments():
    criterion, model, optimizer = parts()
    x, y = batches(1)[0]
    good: dict[str, Any] = {"criterion": criterion, "model": model, "optimizer": optimizer, "x": x, "target": y}
    for name, value, error, message in (
        ("criterion", nn.CrossEntropyLoss(), TypeError, "^criterion: expected ELLELoss, got "),
        ("model", lambda x: x, TypeError, "^model: expected Module, got "),
        ("optimizer", [], TypeError, "^optimizer: expected Optimizer, got "),
        ("x", 3, TypeError, "^x: expected Tensor, got 3"),
        ("x", x[:0], ValueError, "^x: expected "),
        ("target", y[:2], ValueError, "^target: expected "),
        ("autocast", "bf16", TypeError, "^autocast: expected dtype or NoneType, got 'bf16'"),
        ("scaler", 2.0, TypeError, "^scaler: expected GradScaler or NoneType, got 2.0"),
        ("clip_grad_norm", 0.0, ValueError, r"^clip_grad_norm: expected a finite number in \(0, inf\), got 0.0"),
        ("model", Net().eval(), ValueError, "^model: expected one in train mode"),
        ("criterion", ELLELoss(EPS).eval(), ValueError, "^criterion: expected one in train mode"),
    ):
        with pytest.raises(error, match=message):
            capture(**{**good, name: value})
    with pytest.raises(ValueError, match=r"^x: expected a batch on the model's device, meta, got a tensor of shape"):
        capture(**{**good, "model": Net().to("meta")})
    step = capture(**good)
    with pytest.raises(TypeError, match=r"^x: expected a floating-point tensor"):
        step(x.tolist(), y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^target: "):
        step(x, y[:2])
