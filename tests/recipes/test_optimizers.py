"""The optimisers of a run: what decays, how they are steered, and which states they refuse."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from elle_fast.recipes import checkpoint, models, optimizers
from elle_fast.recipes.train import CHECKPOINT, train
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet


def model():
    torch.manual_seed(0)
    return models.build("preact", width=2, in_shape=(1, 8, 8), classes=3, mean=None, std=None).double()


def build(name, own, **options):
    return optimizers.build(name, own, **{"momentum": 0.9, "weight_decay": 0.1, "decay": "all", **options})


def step(own, optimizer, rate=0.1, momentum=0.9):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
    F.cross_entropy(own(x), torch.arange(6) % 3).backward()
    optimizers.steer(optimizer, rate, momentum)
    optimizer.step()


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_norms_and_biases_do_not_decay_on_request(name):
    """Against the same step without any decay: the first step's own part is the same."""
    found = {}
    for decay, amount in (("all", 0.0), ("all", 0.1), ("weights", 0.1)):
        own = model()
        for parameter in own.parameters():
            parameter.data += 0.5  # biases and shifts begin with 0, which would not decay either
        before = copy.deepcopy(own.state_dict())
        step(own, build(name, own, decay=decay, weight_decay=amount))
        found[decay, amount] = dict(own.named_parameters())
    norms = [key for key, value in before.items() if value.dim() == 1 and key in found["all", 0.0]]
    assert len(norms) > 4
    assert any(key.endswith("bias") for key in norms)
    for key, plain in found["all", 0.0].items():
        decayed = plain - 0.1 * 0.1 * before[key]
        assert torch.allclose(found["all", 0.1][key], decayed, rtol=1e-12, atol=1e-14)
        assert torch.allclose(found["weights", 0.1][key], plain if key in norms else decayed, rtol=1e-12, atol=1e-14)


def test_a_model_of_weights_alone_has_one_group():
    own = nn.Linear(3, 2, bias=False)
    assert [group["weight_decay"] for group in build("sgd", own, decay="weights").param_groups] == [0.1]


def test_adamw_is_torchs_with_the_momentum_as_its_first_beta():
    own, other = model(), model()
    mine = build("adamw", own)
    torchs = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.1, betas=(0.8, 0.999))
    for rate, beta in ((0.1, 0.8), (0.05, 0.85)):
        torchs.param_groups[0].update(lr=rate, betas=(beta, 0.999))
        step(own, mine, rate, beta)
        other.zero_grad()
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(6, 1, 8, 8, generator=generator, dtype=torch.float64)
        F.cross_entropy(other(x), torch.arange(6) % 3).backward()
        torchs.step()
    for one, two in zip(own.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-13, atol=1e-15)  # fused sums have another order


def test_a_state_that_was_saved_on_a_gpu_continues_on_the_cpu():
    """There AdamW is capturable, which is no option of the run."""
    own = model()
    optimizer = build("adamw", own)
    step(own, optimizer)
    state = copy.deepcopy(optimizers.saved(optimizer))
    assert not state["param_groups"][0]["capturable"]
    state["param_groups"][0]["capturable"] = True
    restored = build("adamw", model())
    optimizers.restore(restored, state, begun=True, cycled=False)
    assert restored.param_groups[0]["capturable"] is False


def test_adamw_on_cuda_can_be_captured(monkeypatch):
    made = []

    def adamw(groups, **options):
        made.append(options)
        return SimpleNamespace()

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    weight = SimpleNamespace(requires_grad=True, dim=lambda: 2)
    for device in ("cuda", "cpu"):
        weight.device = torch.device(device)
        build("adamw", SimpleNamespace(named_parameters=lambda: [("weight", weight)]))
    assert [each["capturable"] for each in made] == [True, False]
    assert all(each["fused"] for each in made)


@pytest.mark.parametrize("decay", optimizers.DECAYS)
def test_fused_sgd_of_a_model_in_channels_last_is_torchs(decay):
    own, other = (model().to(memory_format=torch.channels_last) for _ in range(2))
    mine, torchs = build("sgd", own, decay=decay), build("sgd", other, decay=decay)
    for group in torchs.param_groups:
        assert group["fused"]
        group.update(fused=False, foreach=False)
    torchs.state.clear()
    for rate, momentum in ((0.1, 0.9), (0.05, 0.8), (0.2, 0.9)):
        step(own, mine, rate, momentum)
        step(other, torchs, rate, momentum)
    for one, two in zip(own.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_a_first_step_that_a_scaler_leaves_out_leaves_no_trace(name):
    """Fused SGD of torch would go on with a momentum that nobody has written."""
    own, other = model(), model()
    mine, plain = build(name, own), build(name, other)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    garbage = [torch.full_like(each, 7.0) for each in own.parameters() for _ in range(20)]
    del garbage
    for finite in (False, True, True):
        mine.zero_grad()
        step(other, plain) if finite else None
        for one, two in zip(own.parameters(), other.parameters(), strict=True):
            one.grad = torch.full_like(one, torch.inf) if not finite else two.grad * scaler.get_scale()
        optimizers.steer(mine, 0.1, 0.9)
        scaler.scale(torch.zeros(()))
        scaler.step(mine)
        scaler.update()
    for one, two in zip(own.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_a_state_goes_on_where_the_optimiser_is_not_fused_and_back(name):
    """As on a device that has no such kernel."""
    own, other = model(), model()
    mine, unfused = build(name, own), build(name, other)
    for group in unfused.param_groups:
        group["fused"] = None
    step(own, mine)
    step(other, unfused)
    for _ in range(2):
        optimizers.restore(unfused, copy.deepcopy(mine.state_dict()), begun=True, cycled=False)
        other.load_state_dict(own.state_dict())
        step(other, unfused)
        optimizers.restore(mine, copy.deepcopy(unfused.state_dict()), begun=True, cycled=False)
        own.load_state_dict(other.state_dict())
        step(own, mine)
    assert [group["fused"] for group in (*mine.param_groups, *unfused.param_groups)] == [True, None]
    assert all(value.isfinite().all() for value in own.parameters())


CHANGES = {
    "none": lambda state: state["state"].clear(),
    "of another shape": lambda state: state["state"][1].update({list(state["state"][1])[-1]: torch.zeros(7)}),
    "no tensor": lambda state: state["state"][1].update({list(state["state"][1])[-1]: 5}),
    "one more": lambda state: state["state"][1].update(another=torch.zeros(3)),
    "one less": lambda state: state["state"][1].popitem(),
    "weight decay": lambda state: state["param_groups"][-1].update(weight_decay=0.3),
    "another group": lambda state: state["param_groups"].append({"params": []}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("decay", optimizers.DECAYS)
@pytest.mark.parametrize("name", optimizers.NAMES)
def test_a_state_that_this_optimiser_could_not_have_had_is_refused(name, decay, change):
    own = model()
    optimizer = build(name, own, decay=decay)
    step(own, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizers.restore(build(name, model(), decay=decay), copy.deepcopy(state), begun=True, cycled=False)
    CHANGES[change](state)
    with pytest.raises(ValueError, match=r"optimizer|param"):
        optimizers.restore(build(name, model(), decay=decay), state, begun=True, cycled=False)


@pytest.mark.parametrize("name", optimizers.NAMES)
def test_the_other_optimisers_state_and_one_before_its_time_are_refused(name):
    own = model()
    optimizer = build(name, own)
    step(own, optimizer)
    other = next(each for each in optimizers.NAMES if each != name)
    for begun, kind in ((True, other), *[(False, name)] * (name == "adamw")):  # SGD's is there from the beginning
        with pytest.raises(ValueError, match="optimizer: expected"):
            optimizers.restore(build(kind, model()), copy.deepcopy(optimizer.state_dict()), begun=begun, cycled=False)


def test_momentum_that_does_not_cycle_has_to_be_that_of_the_run():
    own = model()
    optimizer = build("sgd", own)
    step(own, optimizer, momentum=0.85)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"expected the options of this run, got other \['momentum'\]"):
        optimizers.restore(build("sgd", model()), copy.deepcopy(state), begun=True, cycled=False)
    restored = build("sgd", model())
    optimizers.restore(restored, state, begun=True, cycled=True)
    assert restored.param_groups[0]["momentum"] == 0.9


OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "decay": "weights", "schedule": "cosine", "warmup": 0.5},
    "quirks": {
        **{"momentum_cycle": 0.1, "eps_warmup": 1.7, "steps_per_batch": 2, "clean_forward": True},
        **{"drop_last": False, "batch_size": 20},
    },
    "onecycle": {"schedule": "onecycle", "optimizer": "adamw", "momentum_cycle": 0.1, "rate_per": "epoch"},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_resumed_run_ends_with_the_same_bits(options, tmp_path, monkeypatch):
    from elle_fast.recipes import result as ending
    from elle_fast.recipes import train as training

    monkeypatch.setattr(ending, "plot_curves", lambda *args, **more: None)
    config = replace(CONFIG, **OPTIONS[options])
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    original = training._Loop._step

    def stopped(loop, x, y):
        if loop.run.step == 12:
            raise KeyboardInterrupt
        return original(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", original)
    assert 0 < checkpoint.load(tmp_path / "resumed" / CHECKPOINT)["step"] < 12
    train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
