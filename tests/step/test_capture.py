"""elle_fast.capture: the step on the CPU, and its handling of CUDA graphs with a graph that runs on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import ELLELoss, TrainingStep, capture, methods, recompute
from elle_fast.methods.elle import PlusELLE
from elle_fast.step import capture as capturing
from elle_fast.step.capturable import check_captured
from elle_fast.testing import no_host_sync
from tests.helpers import built
from tests.step.common import EPS, OPTIONS, RATES, Net, batches, by_hand, everything, parts, same
from tests.step.recorded import RecordedGraph


def run_all(device: torch.device, runs: Any, rounds: int) -> Any:
    results = [run() for _ in range(rounds - 1) for run in runs]
    with no_host_sync():
        results += [run() for run in runs]
    return results[-1]


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(capturing, "_can_be_captured", lambda device: True)
    monkeypatch.setattr(capturing, "Graph", RecordedGraph)
    monkeypatch.setattr(capturing, "warm_up", run_all)
    monkeypatch.setattr(recompute, "_raises", lambda device: False)  # nothing is looked at
    RecordedGraph.made = []
    return RecordedGraph.made


def both(**options: Any) -> list[Any]:
    """Twice the same. Light steps without dropout: no graph repeats what their first pass drew in the second one."""
    made = [parts(**options) for _ in range(2)]
    if "skip_below" in options:
        for _, model, _ in made:
            model.get_submodule("layers.3").p = 0.0  # type: ignore[assignment]
    return made


def captured(made: tuple[ELLELoss, nn.Module, torch.optim.Optimizer], **options: Any) -> Any:
    return capture(*made, *batches(1)[0], **options)


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
    expected, found = both(**options)
    data = batches(12, short=6)
    torch.manual_seed(3)  # there are steps of both kinds, on the oldest torch too
    outputs: list[Tensor] = []
    losses = by_hand(expected, data, RATES, outputs=outputs)
    torch.manual_seed(3)
    step = captured(found)
    assert step.captured
    stats: list[dict[str, Tensor]] = []
    found_outputs: list[Any] = []
    for (x, y), rate, loss in zip(data, RATES, losses, strict=True):
        for group in found[2].param_groups:
            group["lr"] = rate  # as a schedule does that knows nothing of tensors
        assert step(x, y).item() == loss
        stats.append(found[0].stats)
        found_outputs.append(found[0].output)
    assert same(everything(*expected), everything(*found))
    # What was read stays what it was.
    assert [each["loss"].item() for each in stats] == losses
    assert same(found_outputs, outputs)
    assert sum(graph.replays for graph in graphs) == 11 + len(graphs)  # one more of each, before the first step
    if "skip_below" in options:
        counts = [found[0].stats[f"{kind}_steps"].item() for kind in ("light", "full")]
        assert min(counts) > 1
        assert [found[0].stats[f"{kind}_steps"] for kind in ("light", "full")] == [
            expected[0].stats[f"{kind}_steps"] for kind in ("light", "full")
        ]
        assert [graph.beside for graph in graphs] == [None, graphs[0]]
        assert min(graph.replays for graph in graphs) > 2
    else:
        assert len(graphs) == 1


def right(criterion: Any, target: Tensor) -> Any:
    return (criterion.output.argmax(dim=1) == target).sum()


@pytest.mark.parametrize("on", ["cpu", "graphs"])
@pytest.mark.parametrize("options", [{}, {"skip_below": 0.3}], ids=str)
def test_a_measure_is_part_of_the_step(options, on, request):
    """Of the same criterion and bits as in the eager step; what was read stays what it was; a short batch as well."""
    if on == "graphs":
        request.getfixturevalue("graphs")
    expected, found = both(**options)
    data = batches(10, short=6)
    torch.manual_seed(3)
    by_itself = TrainingStep(*expected, measure=right)
    outputs: list[Any] = []
    for batch in data:
        by_itself(*batch)
        outputs.append(by_itself.measured)
    torch.manual_seed(3)
    given: list[Any] = []

    def counted(criterion: Any, target: Tensor) -> Any:
        given.append(criterion)
        return right(criterion, target)

    step = captured(found, measure=counted)
    assert step.measured is None
    measured: list[Any] = []
    for batch in data:
        step(*batch)
        measured.append(step.measured)
    assert [int(each) for each in measured] == [int(each) for each in outputs]
    assert len({int(each) for each in measured}) > 2
    assert all(criterion is found[0] for criterion in given)
    assert same(everything(*expected), everything(*found))


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


def refused(call: Callable[[], Any], what: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^capture: .*{what}.* changed after capture, but the graph holds the old"):
        call()


def test_what_each_call_looks_at(graphs):
    made = parts()
    criterion, model, optimizer = made
    step, batch = captured(made), batches(1)[0]
    step(*batch)
    call = partial(step, *batch)
    optimizer.param_groups[0]["momentum"] = 0.8
    refused(call, "momentum of the optimizer's group 0")
    optimizer.param_groups[0]["momentum"] = 0.9
    model.eval()
    refused(call, "train or eval mode of the model")
    model.train()
    criterion.eval()
    refused(call, "criterion.training")
    criterion.train()
    criterion.linearity.backend = "reference"
    refused(call, "criterion.linearity.backend")
    criterion.linearity.backend = "auto"
    with criterion.frozen():
        refused(call, "criterion.frozen")
    assert criterion.controller is not None
    criterion.controller.gamma = 0.9
    refused(call, "criterion.controller")
    criterion.controller.gamma = 0.5
    call()
    weight = next(model.parameters())
    kept = weight.data
    weight.data = kept.clone()  # as by model.cpu() and model.cuda(), which move all
    refused(call, "a tensor of the model")
    weight.data = kept
    call()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    refused(call, "optimizer's group 1")
    del optimizer.param_groups[1]
    call()
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        refused(call, "state of the optimizer")


def test_replays_that_diverge_are_seen(graphs):
    made = parts()
    criterion, model, _ = made
    step, batch = captured(made), batches(1)[0]
    for _ in range(2):
        step(*batch)
        criterion.raise_if_diverged(after=2)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    step(*batch)
    criterion.raise_if_diverged(after=2)
    step(*batch)
    with pytest.raises(RuntimeError, match="got 2 in a row"):
        criterion.raise_if_diverged(after=2)


def test_what_only_the_full_check_sees(graphs):
    """On demand; at the first replay, before which most mistakes are made; and at every hundredth."""
    made = parts()
    _, model, optimizer = made
    batch = batches(1)[0]
    batch_norm, weight = model.get_submodule("layers.1"), list(model.parameters())[-1]
    momentum = "momentum_buffer"

    def every_change() -> Iterator[str]:
        batch_norm.eval()
        yield "train or eval mode of a module"
        batch_norm.train()
        weight.requires_grad_(False)
        yield "tensor of the model, the optimizer or the criterion"
        weight.requires_grad_(True)
        kept, weight.data = weight.data, weight.data.clone()
        yield "tensor of the model"
        weight.data = kept
        kept = optimizer.state[weight][momentum]
        optimizer.state[weight][momentum] = kept.clone()
        yield "tensor of the model, the optimizer"
        optimizer.state[weight][momentum] = kept

    step = captured(made)
    for what in every_change():
        refused(step.check, what)
        refused(partial(step, *batch), what)
    step.check()
    step(*batch)
    batch_norm.eval()
    for _ in range(99):
        step(*batch)
    refused(partial(step, *batch), "train or eval mode of a module")
    batch_norm.train()
    step(*batch)


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
    monkeypatch.setattr(RecordedGraph, "replay", lambda self: self.results.loss.fill_(torch.nan))
    with pytest.raises(RuntimeError, match=r"a replay's loss was nan$"):
        captured(parts())


def test_a_step_that_cannot_be_captured(graphs, monkeypatch):
    made = parts()
    before = everything(*made)

    def capture_fails(self: RecordedGraph, run: Any) -> Tensor:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(RecordedGraph, "capture", capture_fails)
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

    refused(torch.optim.SGD(weights, lr=0.1), r"^optimizer: expected fused=True .* got SGD without it")
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        refused(kind(weights, lr=0.1, fused=True), r"^optimizer: expected capturable=True .* got AdamW? without it")
    with_two = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}], fused=True, capturable=True)
    with_two.param_groups[1]["capturable"] = False
    refused(with_two, r"^optimizer: expected capturable=True in each group")
    refused(
        torch.optim.SGD(weights, lr=0.1, momentum=0.9, dampening=0.1, fused=True), r"^optimizer: expected dampening=0"
    )
    refused(torch.optim.NAdam(weights, lr=0.1, capturable=True), r"^optimizer: .* the first state of NAdam")
    refused(
        torch.optim.Adam(weights, lr=0.1, capturable=True, fused=False),
        r"^scaler: expected an optimizer with fused=True",
        scaler=torch.amp.GradScaler("cpu"),
    )
    rates = torch.optim.SGD(weights, lr=0.1, fused=True)
    captured((criterion, model, rates), scaler=torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_what_is_accepted_torch_can_capture(kind, monkeypatch):
    """Torch's own check at the beginning of an optimiser's step, told that a capture is on."""
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    optimizers = [kind([weight], lr=0.1, fused=True)]
    optimizers += [] if kind is torch.optim.SGD else [kind([weight], lr=0.1, fused=True, capturable=True)]
    fake = SimpleNamespace(is_capturing=lambda: True)
    for name in ("accelerator", "cuda"):  # newer torch, older torch
        module = getattr(torch, name, None)
        for what, value in (("current_accelerator", torch.device("cuda")), ("current_stream", fake)):
            if hasattr(module, what):
                monkeypatch.setattr(module, what, lambda *args, value=value, **kwargs: value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for optimizer in optimizers:
        refusals: list[Any] = [None, None]
        for i, call in enumerate((lambda each: check_captured(nn.Linear(1, 1), each, None), lambda each: each.step())):
            try:
                call(optimizer)
            except (RuntimeError, ValueError) as error:
                refusals[i] = str(error)
        assert (refusals[0] is None) == (refusals[1] is None), refusals
    assert refusals == [None, None]


def test_bad_arguments():
    criterion, model, optimizer = parts()
    x, y = batches(1)[0]
    good: dict[str, Any] = {"criterion": criterion, "model": model, "optimizer": optimizer, "x": x, "target": y}
    for name, value, error, message in (
        (
            "criterion",
            nn.CrossEntropyLoss(),
            TypeError,
            "^criterion: expected ELLELoss or the criterion of a method, got ",
        ),
        ("model", lambda x: x, TypeError, "^model: expected Module, got "),
        ("optimizer", [], TypeError, "^optimizer: expected Optimizer, got "),
        ("x", 3, TypeError, "^x: expected a floating-point tensor .*got 3"),
        ("x", x[:0], ValueError, "^x: expected "),
        ("target", y[:2], ValueError, "^target: expected "),
        ("autocast", "bf16", TypeError, "^autocast: expected dtype or None, got 'bf16'"),
        ("scaler", 2.0, TypeError, "^scaler: expected GradScaler or None, got 2.0"),
        ("measure", 2.0, TypeError, "^measure: expected None or a callable, got 2.0"),
        (
            "clip_grad_norm",
            0.0,
            ValueError,
            r"^clip_grad_norm: expected a finite number in \(0, 3.4.*\], got 0.0",
        ),
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


# ---- State that the first step makes


@pytest.mark.parametrize("name", ["uap", "cuap", "fuap"])
def test_a_state_that_the_first_step_draws(graphs, name):
    """What a capture makes it puts back as zeros, with which FUAP's own layers would never learn."""
    found, expected = [(make(name), *parts()[1:]) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^criterion: expected one that has taken a step .* got no base\.universal"):
        captured(found)
    assert found[0].base.universal.numel() == 0
    data = batches(6)
    for each in (found, expected):
        torch.manual_seed(2)
        TrainingStep(*each)(*data[0])
    step, by_itself = captured(found), TrainingStep(*expected)
    assert found[0].base.universal.any()
    torch.manual_seed(3)
    losses = [step(*each) for each in data[1:]]
    assert [graph.replays for graph in graphs] == [len(data)]
    torch.manual_seed(3)
    assert [by_itself(*each) for each in data[1:]] == losses
    assert same(everything(*found), everything(*expected))


@pytest.mark.parametrize("name", ["uap", "cuap", "fuap"])
def test_a_state_of_another_size_is_not_lost(graphs, name):
    """The warm-up would begin it anew, and zeros would be put back for what was learned."""
    found = (make(name), *parts()[1:])
    TrainingStep(*found)(*batches(1)[0])
    assert found[0].base.universal.any()
    model, x = nn.Sequential(nn.Linear(9, 6), found[1]), torch.rand(8, 9)
    before, rate = everything(*found), found[2].param_groups[0]["lr"]
    with pytest.raises(
        ValueError, match=r"^criterion: expected one that has taken a step on such a batch, .* universal"
    ):
        capture(found[0], model, found[2], x, torch.arange(8) % 3)
    assert same(before, everything(*found))
    assert found[2].param_groups[0]["lr"] is rate
    assert graphs == []
    TrainingStep(*found)(*batches(1)[0])


def test_a_model_that_waits_is_found_before_a_capture(graphs):
    """A capture that CUDA has broken off is hard to go on from."""
    criterion, model, optimizer = parts()
    before = everything(criterion, model, optimizer)
    model.register_forward_hook(lambda module, inputs, output: output * (1.0 if output.sum().item() < 1e30 else 0.0))
    with pytest.raises(
        RuntimeError, match=r"^capture: expected a step without a wait .* stopped by HostSyncError: .*item"
    ):
        captured((criterion, model, optimizer))
    assert graphs == []
    after = everything(criterion, model, optimizer)
    assert same(before, [*after[: len(before) - 1], after[-1]])


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("n-fgsm", "label_smoothing", 0.1),
        ("trades-single", "base.lam", 3.0),
        ("trades-single", "label_smoothing", 0.1),
        ("fast-bat", "base.step_size", 1.0),
        ("gradalign", "base.regularizer.eps", 0.3),
    ],
)
def test_options_of_the_loss_that_e_lin_is_added_to(graphs, name, option, value):
    """A replay would go on with the old one."""
    parent, _, attribute = option.rpartition(".")
    base: Any = methods.build(name, eps=EPS)
    criterion: Any = PlusELLE(base, EPS, 10.0) if name == "gradalign" else make(name)
    found = (criterion, *parts()[1:])
    step, (x, y) = captured(found), batches(1)[0]
    step(x, y)
    owner = found[0].get_submodule(parent)
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    with pytest.raises(RuntimeError, match=rf"^capture: criterion\.{option}\b.* changed after capture"):
        step(x, y)
    setattr(owner, attribute, before)
    step(x, y)


def make(name: str) -> Any:
    return methods.build(f"{name}+elle", eps=EPS, lam=10.0, bounds=(0.0, 1.0))


# ---- Methods

# Why those that a capture refuses cannot be captured; of the table, and some put together.
COUNTS, AWP, PER_SAMPLE = "counts its steps on the host", "AWP draws its attack's random numbers twice", "PriorGuided"
REFUSED = {
    **dict.fromkeys(["gat", "gat-fgsm", "nuat"], f"Guided {COUNTS}"),
    **dict.fromkeys([f"{base}+{added}" for base in ("gat", "gat-fgsm") for added in ("elle", "elle-a")], COUNTS),
    **dict.fromkeys(["advlc", "advlc-noise"], f"AdvLC {COUNTS}"),
    **dict.fromkeys(["pgi", "pgi-ep"], f"PriorGuided {COUNTS}"),
    "liet": f"LIET {COUNTS}",
    "pco": f"PCO {COUNTS}",
    "rs-cs": f"RandomStartSmooth {COUNTS}",
    "mep-cs": f"PriorGuidedSmooth {COUNTS}",
    "free-at": "FreeAT keeps its perturbation in another tensor after each step",
}
PUT_TOGETHER = (
    "fgsm+advlc",
    "rs-fgsm+elle-a+advlc",
    "trades-single+elle-a+advlc",
    "uap+advlc",
    "fast-bat+elle-a",
    "n-aaer+elle",
)
REFUSED_TOGETHER = {
    "fgsm+awp": AWP,
    "n-fgsm+elle-a+awp": AWP,
    "nuat+elle-a": COUNTS,
    "gat+advlc": COUNTS,
    "pgi+elle": COUNTS,
}


def of_method(name: str, **options: Any) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    _, model, optimizer = parts()
    # No graph repeats what another pass drew, as in light steps.
    model.get_submodule("layers.3").p = 0.0  # type: ignore[assignment]
    return built(name, eps=EPS, bounds=(0.0, 1.0), **options), model, optimizer


def test_which_methods_are_refused():
    found = {name: of_method(name)[0].uncapturable for name in methods.NAMES}
    assert {name for name, why in found.items() if why is not None} == REFUSED.keys()


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_TOGETHER])
def test_a_method_that_is_refused(name):
    made = of_method(name)
    why = {**REFUSED, **REFUSED_TOGETHER}[name]
    with pytest.raises(ValueError, match=rf"^criterion: expected one whose steps .* got one where .*{why}; run "):
        captured(made)
    assert why in made[0].uncapturable


LIGHT = {"skip_below": 0.9, "triplet_fraction": 0.5}
CAPTURABLE = [name for name in (*methods.NAMES, *PUT_TOGETHER) if name not in REFUSED]
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in CAPTURABLE]
CASES += [(name, LIGHT) for name in CAPTURABLE if LIGHT.keys() <= set(methods.find(name).levers)]


@pytest.mark.parametrize("name, options", CASES, ids=[name + "-light" * bool(options) for name, options in CASES])
def test_replays_of_a_method_are_its_steps(graphs, name, options):
    """A graph holds whatever the host decides, so a step that is still the same one has no such decision."""
    found, expected = of_method(name, **options), of_method(name, **options)
    data = batches(8, short=5)
    for made in (found, expected):
        torch.manual_seed(2)
        TrainingStep(*made)(*data[0])  # uap draws its state
    before = everything(*found)
    step = captured(found, measure=right)
    assert same(before, everything(*found))
    by_itself = TrainingStep(*expected, measure=right)
    results: list[tuple[list[Tensor], list[Any]]] = []
    for each, made in ((step, found), (by_itself, expected)):
        torch.manual_seed(3)
        results.append(([], []))
        for x, y in data[1:]:
            results[-1][0].append(each(x, y))
            results[-1][1].append((made[0].stats, made[0].output, each.measured))
    (losses, records), (expected_losses, expected_records) = results
    assert same(losses, expected_losses)
    for one, other in zip(records, expected_records, strict=True):
        assert one[0].keys() == other[0].keys()
        assert same([*one[0].values(), *one[1:]], [*other[0].values(), *other[1:]])
    assert same(everything(*found), everything(*expected))
    assert len({loss.item() for loss in losses}) == len(losses)
    assert sum(graph.replays for graph in graphs) == len(graphs) + 6
    assert len(graphs) == 1 + bool(options)
