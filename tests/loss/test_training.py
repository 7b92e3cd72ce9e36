"""ELLELoss in the company that training loops keep."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, LocalLinearity
from elle_fast.functional import draw_seed, random_start
from elle_fast.testing import call_counter, no_host_sync
from tests.helpers import convnet, grads_of, rng, shown
from tests.loss.cases import BATCH, CLASSES, EPS, FEATURES, bent, close, cross_entropy, data

ATTACKS = ["fgsm", "rs-fgsm", "n-fgsm", "zero-grad", "none"]
STEPS: list[dict[str, Any]] = [
    *({"attack": attack, "adaptive": adaptive} for attack, adaptive in itertools.product(ATTACKS, (False, True))),
    {"adaptive": True, "lagged": True},
    {"lam": AdaptiveLambda(4000.0, window=4)},
    {"lam": AdaptiveLambda(4000.0, ramp=3)},
    {"points": "elle-2p", "penalty": "abs"},
    {"points": "five-point"},
    {"alpha": "argmax"},
    {"norm": "l2"},
    {"of": "logits", "forward": "split", "triplets": 2, "triplet_fraction": 0.3},
    {"bounds": (0.0, 1.0), "mean": [0.5] * 3, "std": [0.2] * 3},
    {"loss_fn": cross_entropy, "adaptive": True},
    {"label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", STEPS, ids=shown)
def test_no_step_waits_for_the_device(options):
    model, criterion = convnet(), ELLELoss(EPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data((4, 3, 8, 8), dtype=torch.float32)
    if "mean" in options:
        criterion(model, x, y)  # the constants are copied once
    with no_host_sync():
        for _ in range(2):
            loss = criterion(model, x, y)
            loss.backward()
            optimizer.step()
            dict(criterion.stats)


@pytest.mark.parametrize("options", STEPS, ids=shown)
def test_stats(options):
    model, (x, y) = convnet(), data((4, 3, 8, 8), dtype=torch.float32)
    criterion = ELLELoss(EPS, **options)
    if criterion.controller is not None:
        criterion.controller.lam.fill_(7.0)  # decays from step to step
    assert criterion.stats == {}
    loss = criterion(model, x, y)
    keys = ["loss", "ce", "e_lin", "lam"] + (["skipped"] if criterion.adaptive else [])
    stats = criterion.stats
    assert list(stats) == keys
    assert all(v.dim() == 0 and not v.requires_grad and v.device == x.device for v in stats.values())
    assert stats["loss"].item() == loss.item()
    before = {name: value.item() for name, value in stats.items()}
    criterion(model, (x + 0.1).clamp(max=1), y)
    assert {name: value.item() for name, value in stats.items()} == before


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attack_touches_no_gradient(attack):
    model, (x, y) = convnet(), data((4, 3, 8, 8), dtype=torch.float32)
    ELLELoss(EPS, attack=attack)(model, x, y)
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad


def test_gradient_accumulation():
    model, other = bent(), bent()
    together, apart = (ELLELoss(EPS, AdaptiveLambda(50.0, min_history=1), generator=rng(2)) for _ in range(2))
    batches = [data(seed=s) for s in (1, 2, 3, 4)]
    sum(together(model, x, y) for x, y in batches).backward()
    for x, y in batches:
        apart(other, x, y).backward()
    assert apart.controller is not None
    assert apart.controller.lam > 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        close(one.grad, two.grad, rtol=1e-9, atol=1e-11)


def test_two_criteria_do_not_disturb_each_other():
    model, (x, y) = bent(), data()
    alone = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    expected = [alone(model, *data(seed=s)).item() for s in range(6)]
    first = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    second = ELLELoss(2 * EPS, AdaptiveLambda(9.0, min_history=1), generator=rng(7))
    found = []
    for s in range(6):
        second(model, x, y)
        found.append(first(model, *data(seed=s)).item())
        second(model, 2 * x, y)
    assert found == expected


def test_seeds():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([criterion(model, x, y).item(), criterion(model, x, y).item()])
    assert results[0] == results[1]
    assert results[0] != results[2]
    assert results[0][0] != results[0][1]
    before = torch.get_rng_state()
    owned = [ELLELoss(EPS, generator=rng(seed))(model, x, y).item() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert owned[0] == owned[1] != owned[2]
    # A saved state of torch's generator continues the noise.
    state = torch.get_rng_state()
    again = criterion(model, x, y).item()
    torch.set_rng_state(state)
    assert criterion(model, x, y).item() == again


def test_a_resume_is_exact():
    model = bent()
    criterion = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=rng(2))
    for s in range(5):
        criterion(model, *data(seed=s))
    source = rng(0)
    assert criterion.linearity.generator is not None
    source.set_state(criterion.linearity.generator.get_state())
    resumed = ELLELoss(EPS, AdaptiveLambda(3.0, min_history=1), generator=source)
    resumed.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for s in range(5, 12):
        assert torch.equal(resumed(model, *data(seed=s)), criterion(model, *data(seed=s)))
        assert torch.equal(resumed.stats["lam"], criterion.stats["lam"])
    assert criterion.stats["lam"] > 0
    assert ELLELoss(EPS).state_dict() == {}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("stepped", [False, True])
def test_copies(adaptive, stepped):
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS, adaptive=adaptive, mean=[0.5] * FEATURES, std=[2.0] * FEATURES)
    if stepped:
        criterion(model, x, y)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        results = []
        for one in (copy.deepcopy(criterion), twin):
            torch.manual_seed(5)
            results.append(one(model, x, y).item())
        assert results[0] == results[1]
        assert repr(twin) == repr(criterion)
    regulariser = pickle.loads(pickle.dumps(LocalLinearity(EPS)))
    assert regulariser(model, x, y) >= 0


def test_model_in_train_mode_with_batch_norm_and_dropout():
    model, (x, y) = convnet(dropout=True), data((4, 3, 8, 8), dtype=torch.float32)
    running = model[1].running_mean.clone()  # type: ignore[index]
    ELLELoss(EPS)(model, x, y).backward()
    assert model.training
    assert not torch.equal(running, model[1].running_mean)  # type: ignore[index]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_model_in_eval_mode_is_left_alone():
    model, (x, y) = convnet(dropout=True).eval(), data((4, 3, 8, 8), dtype=torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses = [ELLELoss(EPS, generator=rng(1))(model, x, y) for _ in range(2)]
    assert not model.training
    assert torch.equal(*losses)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("adaptive", [False, True])
def test_autocast(adaptive):
    model, (x, y) = convnet(), data((8, 3, 8, 8), dtype=torch.float32)
    criterion = ELLELoss(EPS, adaptive=adaptive)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model, x, y)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # As good as bfloat16 logits allow: 10 layers' worth of roundings of 2^-9 on logits below 3.
    plain = ELLELoss(EPS, lam=0.0, generator=rng(1))
    cast = ELLELoss(EPS, lam=0.0, generator=rng(1))
    plain(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        cast(model, x, y)
    assert abs(plain.stats["ce"].item() - cast.stats["ce"].item()) < 10 * 3 * 2.0**-9


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("options", [{}, {"lagged": True}, {"loss_fn": cross_entropy}], ids=shown)
def test_a_nan_of_the_model_leaves_the_history_clean(options, window):
    model: Any = bent()
    criterion = ELLELoss(EPS, AdaptiveLambda(5.0, min_history=1, window=window), **options)
    controller = criterion.controller
    assert isinstance(controller, AdaptiveLambda)
    for s in range(4):
        criterion(model, *data(seed=s))
    before = {name: t.clone() for name, t in controller.state_dict().items()}
    loss = criterion(lambda p: model(p) * math.nan, *data(seed=4))
    assert loss.isnan()
    assert criterion.stats["skipped"].item() == 1
    assert all(torch.equal(t, before[n]) for n, t in controller.state_dict().items() if n != "skipped")
    loss = criterion(model, *data(seed=5))
    assert loss.isfinite()
    assert controller.count.item() == 5
    assert criterion.stats["skipped"].item() == 1


def test_local_linearity_equals_stats_of_the_whole_loss():
    model, (x, y) = bent(), data()
    choices: list[dict[str, Any]] = [{}, {"triplets": 3}, {"alpha": "half"}, {"norm": "l2"}, {"of": "logits"}]
    x = x.clamp(0.2, 0.8)
    for options in [*choices, {"bounds": (0.2, 0.8)}]:
        criterion = ELLELoss(EPS, generator=rng(6), **options)
        alone = LocalLinearity(EPS, generator=rng(6), **options)
        criterion(model, x, y)
        counted, rows = call_counter(model)
        e_lin = alone(counted, x, y)
        close(e_lin, criterion.stats["e_lin"], rtol=1e-8)
        assert rows == [3 * BATCH * options.get("triplets", 1)]
        assert all(g.abs().sum() > 0 for g in grads_of(e_lin, model)[:2])


def test_a_linear_model_needs_no_regulariser():
    model, (x, y) = nn.Linear(FEATURES, CLASSES).double(), data()
    # Logits below 2, some 20 roundings each, three of them with weights below 1; four classes.
    assert LocalLinearity(EPS, of="logits")(model, x, y).item() < 4 * (20 * 2 * 3 * 2.0**-53) ** 2


def test_eps_zero_is_plain_training():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(0.0, lam=100.0)
    close(criterion(model, x, y), F.cross_entropy(model(x), y))
    # Equal points in one matrix product may differ by their roundings; and (1 - alpha) x + alpha x by one.
    assert criterion.stats["e_lin"].item() < 1e-24


def test_the_random_start_of_the_attack_is_drawn_once():
    """The gradient is taken where the step begins."""
    model, (x, y) = bent(), data()
    seen: list[Tensor] = []

    def watched(p: Tensor) -> Any:
        seen.append(p.detach().clone())
        return model(p)

    ELLELoss(EPS, attack="n-fgsm", step_size=0.0, generator=rng(3))(watched, x, y)
    assert torch.equal(seen[0], seen[1][:BATCH])
    assert torch.equal(seen[0], random_start(x, EPS, seed=draw_seed(x.device, rng(3)), start=2.0))


def test_training_lowers_what_it_is_asked_to_lower():
    """Forty steps on a clean batch fit it; with the regulariser they leave E_lin far lower."""
    found = {}
    for lam in (0.0, 1000.0):
        model, (x, y) = bent(), data((16, FEATURES))
        criterion = ELLELoss(3 * EPS, lam=lam, attack="none", generator=rng(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        steps = []
        for _ in range(40):
            optimizer.zero_grad()
            criterion(model, x, y).backward()
            optimizer.step()
            steps.append({name: value.item() for name, value in criterion.stats.items()})
        found[lam] = steps
    assert found[0.0][-1]["ce"] < found[0.0][0]["ce"]
    assert found[1000.0][-1]["e_lin"] < found[0.0][-1]["e_lin"] / 10


def test_eval_mode_leaves_lam_and_history_alone():
    for lagged in (False, True):
        criterion = ELLELoss(0.1, adaptive=True, lagged=lagged)
        model, x, y = nn.Linear(6, 5), torch.rand(4, 6), torch.tensor([0, 1, 2, 3])
        criterion(model, x, y)
        before = {name: value.clone() for name, value in criterion.state_dict().items()}
        criterion.eval()
        criterion(model, x, y)
        assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_criterion_can_be_pickled_and_copied_with_every_protocol(protocol):
    criterion = ELLELoss(0.1, adaptive=True, memory_format=torch.channels_last, mean=(0.5,), std=(0.5,))
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 3])
    criterion(model, x, y)
    for again in (lambda: pickle.loads(pickle.dumps(criterion, protocol)), lambda: copy.deepcopy(criterion)):
        other = again()
        torch.manual_seed(0)
        expected = criterion(model, x, y)
        torch.manual_seed(0)
        assert torch.equal(other(model, x, y), expected)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in criterion.state_dict().items())
