import importlib.util
import json
import logging
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import LocalLinearity
from elle_fast.evaluation import (
    Chunks,
    Outcome,
    evaluate,
    masking,
    masking_check,
    measure_e_lin,
    names,
    outcomes,
    parse_attacks,
    points,
    worst_case,
)

needs_autoattack = pytest.mark.skipif(importlib.util.find_spec("pyautoattack") is None, reason="needs pyautoattack")
needs_foolbox = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs foolbox")
FOREIGN = [
    pytest.param("autoattack", marks=needs_autoattack),
    pytest.param("square-50", marks=needs_autoattack),
    pytest.param("foolbox-pgd-3-2", marks=needs_foolbox),
]


class Threshold(nn.Module):
    """Two classes, split at the pixel 0.5: PGD within eps turns exactly the samples nearer to it than eps."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.norm = nn.BatchNorm1d(2)  # untouched by an evaluation, so the identity up to its eps
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        margin = self.scale * (x.flatten(1) - 0.5)
        return self.drop(self.norm(torch.cat((-margin, margin), dim=1)))


def batched(x, y, size=256):
    """A list of batches, as a loader would yield them."""
    return list(zip(x.split(size), y.split(size), strict=True))


def pixels(values, size=256):
    """Batches of images of one pixel, of values 0 .. 255, labelled as :class:`Threshold` says."""
    values = torch.tensor(values)
    return batched(values.view(-1, 1, 1, 1) / 255, (values > 127).long(), size)


@pytest.fixture
def model():
    model = Threshold()
    model.train()
    model.drop.eval()  # modes need not agree with the parent's
    return model


def test_accuracy_of_a_model_whose_margin_is_known(model):
    batches = pixels([0, 60, 100, 120, 126, 129, 135, 160, 200, 255], size=3)
    found = evaluate(model, batches, eps=20 / 255)
    assert found["clean"]["accuracy"] == 1.0
    # Within 20/255 of the threshold 127.5/255: 120, 126, 129 and 135.
    assert found["fgsm"]["accuracy"] == pytest.approx(0.6)
    assert found["pgd-20"]["accuracy"] == pytest.approx(0.6)
    assert found["pgd-20"]["samples"] == 10


def test_attacked_pixels_stay_in_the_image_range():
    seen = []

    class Spy(Threshold):
        def forward(self, x):
            seen.append((x.min().item(), x.max().item()))
            return super().forward(x)

    evaluate(Spy(), pixels([0, 3, 250, 255]), parse_attacks("fgsm,pgd-3"), eps=0.5)
    assert min(low for low, _ in seen) >= 0.0
    assert max(high for _, high in seen) <= 1.0


def test_restarts_report_the_worst_case_so_far():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    for parameter in model.parameters():
        parameter.data *= 4  # rough enough that starts differ
    x = torch.randint(0, 256, (200, 1, 8, 8)) / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    found = evaluate(model, [(x, y)], "pgd-3-6", eps=0.03)["pgd-3-6"]
    assert len(found["per_restart"]) == 6
    assert found["per_restart"] == sorted(found["per_restart"], reverse=True)
    assert found["per_restart"][-1] < found["per_restart"][0]
    assert found["accuracy"] == found["per_restart"][-1]


def test_same_seed_same_result_and_torchs_generator_is_not_moved(model):
    batches = pixels(range(100, 156))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(model, batches, "pgd-1-2", eps=10 / 255, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert evaluate(model, batches, "pgd-1-2", eps=10 / 255, seed=3) == first


def test_nothing_is_left_on_the_model(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    batches = pixels([10, 130, 250])
    evaluate(model, batches, "clean,fgsm,pgd-2", eps=0.1)
    measure_e_lin(model, batches, eps=0.1)
    assert model.training
    assert model.norm.training
    assert not model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_are_restored_when_the_model_fails(model):
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, pixels([1, 2]), "clean", eps=0.1)
    assert model.training


def test_e_lin_is_zero_for_a_linear_loss_and_weighs_samples_equally():
    class Linear(nn.Module):
        """Logits (0, -big) make the loss of class 1 linear in the pixel, to rounding."""

        def forward(self, x):
            z = 50 + 10 * x.flatten(1)
            return torch.cat((torch.zeros_like(z), -z), dim=1)

    x, y = torch.full((5, 1, 1, 1), 128 / 255), torch.ones(5, dtype=torch.int64)
    # Losses near 55 are rounded to 2**-19, and the residual adds three of them.
    assert measure_e_lin(Linear(), [(x, y)], eps=0.1) <= (4 * 2**-18) ** 2
    # A batch of 4 and one of 1: the mean of their means would weigh the last sample as much as the other four.
    found = measure_e_lin(Threshold(), pixels(range(100, 105), size=4), eps=0.3)
    generator = torch.Generator().manual_seed(0)
    regularizer = LocalLinearity(0.3, bounds=(0, 1), generator=generator)
    model = Threshold().eval()
    with torch.no_grad():
        each = [regularizer(model, x, y).item() for x, y in pixels(range(100, 105), size=4)]
    assert found == pytest.approx((4 * each[0] + each[1]) / 5, rel=1e-12)
    assert found != pytest.approx(sum(each) / 2, rel=1e-3)


def test_logits_that_are_not_finite_are_wrong():
    class Broken(Threshold):
        def forward(self, x):
            return super().forward(x) * torch.nan

    found = evaluate(Broken(), pixels([0, 10, 20]), parse_attacks("clean,pgd-2"), eps=0.1)
    for each in (found["clean"], found["pgd-2"]):
        assert each["accuracy"] == 0.0
        assert each["notes"] == {"logits that are not finite count as wrong": 1}


@pytest.mark.parametrize(
    "text",
    [
        *("", "pgd", "pgd-0", "pgd-10-0", "PGD-10", "clean,,fgsm", "pgd-10-2-3", "pgd-010", "pgd-", "-20", "20"),
        *(
            "auto-attack",
            "autoattack-5",
            "clean-1",
            "noise",
            "noise-3-2",
            "square-0",
            "square-5-2",
            "foolbox",
            "pgd 20",
        ),
    ],
)
def test_unknown_attacks(text):
    with pytest.raises(ValueError, match="attacks: expected names among"):
        parse_attacks(text)


def test_what_a_name_means(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda package: package)
    text = "clean, fgsm,pgd-20,pgd-50-10,noise-7,square,square-9,autoattack,foolbox-pgd,foolbox-pgd-3,foolbox-pgd-3-2"
    assert [(each.kind, each.steps, each.restarts) for each in parse_attacks(text)] == [
        *(("clean", 1, 1), ("fgsm", 1, 1), ("pgd", 20, 1), ("pgd", 50, 10), ("noise", 1, 7), ("square", 5000, 1)),
        *(("square", 9, 1), ("autoattack", 1, 1), ("foolbox-pgd", 20, 1), ("foolbox-pgd", 3, 1), ("foolbox-pgd", 3, 2)),
    ]
    with pytest.raises(ValueError, match=r"attacks: expected each name once, got 'pgd-5' twice"):
        parse_attacks("pgd-5,clean, pgd-5")


@pytest.mark.parametrize(
    "name, package", [("autoattack", "pyautoattack"), ("square", "pyautoattack"), ("foolbox-pgd", "foolbox")]
)
def test_a_missing_package_is_named_with_the_way_to_get_it(name, package, monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"'{name}' needs the package {package}: pip install 'elle-fast\[eval\]'"):
        parse_attacks(f"clean,{name}")


def test_the_packages_are_imported_where_they_are_used():
    script = "import sys, elle_fast.evaluation as r; r.parse_attacks('pgd-3'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "elle_fast.evaluation.points"} <= set(done.stdout.split())
    others = {"pyautoattack", "foolbox", "eagerpy", "scipy", "sklearn", "elle_fast.data", "elle_fast.recipes"}
    assert not others & set(done.stdout.split())


def test_progress_counts_every_sample_of_every_attack(model):
    done: list[int] = []
    evaluate(model, pixels(range(10), size=4), "clean,pgd-2", eps=0.1, advance=done.append)
    assert done == [4, 4, 4, 4, 2, 2]


class Linear(nn.Module):
    """Logits ``W x + b``: how far a sample is from being turned has a closed form."""

    def __init__(self, classes, pixels, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        if classes == 2:
            weight = torch.randn(1, pixels, generator=generator) * torch.tensor([[-1.0], [1.0]])
        else:
            weight = torch.randn(classes, pixels, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(-0.5 * weight.sum(1))
        self.scale = scale

    def forward(self, x):
        return self.scale * (x.flatten(1) @ self.weight.T + self.bias)

    def radius(self, x, y):
        """The smallest eps that turns each sample: ``min_j (z_y - z_j) / ||w_y - w_j||_1``, float64 [N]; j is not y.

        True while no pixel of the ball leaves [0, 1].
        """
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        z = x.double().flatten(1) @ weight.T + bias
        apart = (weight[y][:, None] - weight[None]).abs().sum(2)
        radii = (z.gather(1, y[:, None]) - z) / apart
        return radii.scatter(1, y[:, None], torch.inf).min(1).values


EPS = 6 / 255


def around(model, n=60, size=3):
    """Images with pixels in 64 .. 192, labelled as the model says, but for every seventh; none near a change at EPS."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(64, 193, (4 * n, 1, size, size), generator=generator) / 255
    with torch.no_grad():
        y = model(x).argmax(1)
    # FAB oversteps the boundary by 5 % and counts only inside the ball. Pixels, sums and eps are rounded to 1e-6.
    clear = ((model.radius(x, y) - EPS).abs() > 0.06 * EPS).nonzero().flatten()[:n]
    assert len(clear) == n
    x, y = x[clear], y[clear]
    y[::7] = (y[::7] + 1) % len(model.bias)
    return x, y


@pytest.mark.parametrize(
    "name",
    [
        *("fgsm", "pgd-10"),
        pytest.param("foolbox-pgd-10", marks=needs_foolbox),
        pytest.param("autoattack", marks=needs_autoattack),
    ],
)
def test_on_a_linear_binary_model_each_attack_finds_the_closed_form_for_each_sample(name):
    model = Linear(2, 9)
    x, y = around(model)
    expected = model.radius(x, y) > EPS
    assert 0.2 < expected.double().mean() < 0.8
    found = outcomes(model, [(x, y)], name, eps=EPS)[name]
    assert torch.equal(found.robust[-1], expected)
    assert any("APGD-T is left out" in note for note in found.notes) == (name == "autoattack")


@needs_autoattack
def test_autoattack_finds_the_closed_form_of_a_linear_model_with_five_classes():
    model = Linear(5, 9)
    x, y = around(model, n=40)
    expected = model.radius(x, y) > EPS
    assert 0.2 < expected.double().mean() < 0.8
    found = outcomes(model, [(x, y)], "clean,noise-5,autoattack", eps=EPS)
    assert torch.equal(found["autoattack"].robust[-1], expected)
    # The three are nested, so the worst case is the strongest.
    assert worst_case(found)["accuracy"] == found["autoattack"].summary()["accuracy"]
    assert found["clean"].robust.sum() >= found["noise-5"].robust[-1].sum() > expected.sum()


def test_the_worst_case_is_that_of_each_sample():
    model, attacks = Threshold(), parse_attacks("clean,fgsm")
    found = outcomes(model, pixels([0, 100, 200]), attacks, eps=0.01)
    found["clean"].robust[0] = torch.tensor([True, False, True])
    found["fgsm"].robust[0] = torch.tensor([False, True, True])
    assert worst_case(found) == {"accuracy": 1 / 3, "samples": 3, "attacks": ["clean", "fgsm"]}


def test_a_start_attacks_those_that_withstood_the_earlier_ones(model):
    sizes = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = evaluate(model, pixels([120, 126, 129, 255]), "pgd-1-3", eps=20 / 255)
    hook.remove()
    assert found["pgd-1-3"]["per_restart"][-1] == 0.25
    assert sizes[:2] == [4, 4]
    assert sizes[-2:] == [1, 1]


class Normed(nn.Module):
    """With a dropout and a batch norm whose state is not its first one, and logits that need the gradient's chain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(16, 4)
        self.body(torch.rand(8, 1, 4, 4))

    def forward(self, x):
        return self.head(self.body(x))


def few_queries(monkeypatch):
    """50 queries of AutoAttack's Square in place of 5,000, which take seconds."""
    from pyautoattack.square import SquareAttack

    def run(attack, x, y):
        attack.n_queries = 50
        return original(attack, x, y)

    original = SquareAttack.attack_single_run
    monkeypatch.setattr(SquareAttack, "attack_single_run", run)


@pytest.mark.parametrize("name", ["pgd-3-2", "noise-2", *FOREIGN])
def test_no_attack_leaves_a_trace(name, capsys, monkeypatch):
    if name == "autoattack":
        few_queries(monkeypatch)
    model = Normed().train()
    model.body[4].eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 255
    with torch.no_grad():
        batches = [(x, model.eval()(x).argmax(1))]
    model.train()
    model.body[4].eval()

    def generators():
        numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002
        return (
            torch.get_rng_state().tolist(),
            str([each.tolist() if isinstance(each, np.ndarray) else each for each in numpy_state]),
            random.getstate(),
        )

    def trace(*arguments):
        return None

    before, tracing = generators(), sys.gettrace()
    sys.settrace(trace)
    try:
        first = evaluate(model, batches, name, eps=0.05, seed=4)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracing)
    assert generators() == before
    assert capsys.readouterr().out == ""
    assert [module.training for module in model.body] == [True, True, True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(parameter.grad is None for parameter in model.body.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # Nor does it depend on what the generators are at.
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert evaluate(model, batches, name, eps=0.05, seed=4) == first


@pytest.mark.parametrize("name", ["noise-2", pytest.param("foolbox-pgd-1-2", marks=needs_foolbox)])
def test_each_start_and_each_batch_has_noise_of_its_own(name, monkeypatch):
    monkeypatch.setattr(Threshold, "forward", lambda self, x: x.flatten(1) @ torch.tensor([[0.0, 1e-6]]) + self.scale)
    seen = []
    model = Threshold()
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    batches = batched(torch.full((4, 1, 1, 1), 128 / 255), torch.ones(4, dtype=torch.int64), 2)
    monkeypatch.setitem(points.FOREIGN, "foolbox-pgd", foolbox_start)
    assert evaluate(model, batches, name, eps=0.1)[name]["accuracy"] == 1
    assert len(seen) == 4  # two batches from two starts, all samples withstood the first
    assert len(torch.cat(seen).unique()) == 8


def foolbox_start(model, x, y, eps, attack, seed):
    return (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)


@pytest.mark.parametrize("name", ["noise-1", pytest.param("foolbox-pgd-1", marks=needs_foolbox)])
def test_another_seed_draws_another_start(name):
    model = Linear(2, 9)
    x, y = around(model)
    by_seed = [outcomes(model, [(x, y)], name, eps=2 * EPS, seed=s)[name].robust for s in range(4)]
    assert any(not torch.equal(by_seed[0], other) for other in by_seed[1:])


def test_a_model_whose_buffers_change_is_an_error_and_they_are_restored(model):
    class Counting(Threshold):
        def forward(self, x):
            self.norm.get_buffer("running_mean").add_(1)
            return super().forward(x)

    counting = Counting()
    with pytest.raises(RuntimeError, match=r"model: expected buffers that .* got changes of norm\.running_mean;"):
        evaluate(counting, pixels([1, 2]), "clean", eps=0.1)
    assert not counting.norm.get_buffer("running_mean").any()
    # A model that has diverged is not one that changes.
    model.norm.get_buffer("running_mean").fill_(torch.nan)
    assert evaluate(model, pixels([1, 2]), "clean", eps=0.1)["clean"]["accuracy"] == 0


def just_outside(x, eps):
    """The first float32 numbers beyond what rounding explains."""
    return x + (eps + (0.5 + 2 * eps) * 2**-24 + 2**-24)


@pytest.mark.parametrize(
    "cheat, message",
    [
        (lambda model, x, eps: just_outside(x, eps), r"expected points within eps = 0.1 of the images, got one at 0.1"),
        (lambda model, x, eps: x - 1.5 * eps, r"expected points within eps = 0.1"),
        (lambda model, x, eps: (x - eps) * 0 - 2**-30, r"expected pixels in \[0.0, 1.0\], got some from -9.3"),
        (lambda model, x, eps: x * 0 + 1 + 2**-23, r"expected pixels in \[0.0, 1.0\], got some from 1.0"),
        (lambda model, x, eps: x * torch.nan, r"expected pixels in"),
        (
            lambda model, x, eps: x[:1],
            r"expected points torch.float32 \[2, 1, 1, 1\], got torch.float32 \[1, 1, 1, 1\]",
        ),
        (lambda model, x, eps: x.double(), r"expected points torch.float32 .*, got torch.float64"),
        (lambda model, x, eps: model.train() and x, r"expected a model in eval mode after it"),
    ],
)
def test_an_attack_that_cheats_is_an_error_not_a_number(cheat, message, model, monkeypatch):
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, eps, attack, generator: cheat(model, x, eps))
    with pytest.raises(RuntimeError, match="attack 'fgsm': " + message):
        evaluate(model, pixels([102, 153]), "fgsm", eps=0.1)


def test_rounding_is_no_cheating(monkeypatch):
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, eps, attack, generator: (x + eps).clamp(0, 1))
    monkeypatch.setitem(points.OWN, "pgd", lambda model, x, y, eps, attack, generator: (x - eps).clamp(0, 1))
    for eps in (0.0, 1 / 3, 8 / 255, 1e-3, 0.9):
        evaluate(Threshold(), pixels(range(256)), parse_attacks("fgsm,pgd-1"), eps=eps)


class Killed(Chunks):
    """The evaluation ends when it has saved so many times; the file is whole, as it is renamed into its place."""

    left = 1000

    def save(self):
        super().save()
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("calls", range(1, 7))
def test_killed_and_resumed_is_the_same_and_nothing_is_done_twice(calls, tmp_path):
    model = Linear(2, 9)
    x, y = around(model, n=50)
    batches, attacks = batched(x, y, 25), parse_attacks("clean,pgd-1-2,noise-3")
    options: dict[str, Any] = {"eps": 3 * EPS, "seed": 2}
    whole = evaluate(model, batches, attacks, **options)
    assert 0 < whole["pgd-1-2"]["accuracy"] < whole["noise-3"]["accuracy"] < 1
    path = tmp_path / "a.json.partial"
    first = Killed(path, {"checkpoint": "abc"})
    first.left = calls
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, batches, attacks, **options, chunks=first)
    second = Killed(path, {"checkpoint": "abc"})
    done: list[int] = []
    assert evaluate(model, batches, attacks, **options, chunks=second, advance=done.append) == whole
    assert 1000 - second.left == 6 - calls
    assert done == [25] * 6
    second.forget()
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.2},
        {"seed": 1},
        {"batch_size": 2},
        {"pixels": [9, 120, 251]},
        {"checkpoint": "other"},
        {"name": "pgd-3"},
    ],
)
def test_a_changed_setting_reuses_nothing(change, model, tmp_path):
    setting = {"eps": 0.1, "seed": 0, "batch_size": 3, "pixels": [9, 120, 250], "checkpoint": "one", "name": "pgd-2"}

    def run(setting):
        chunks = Chunks(tmp_path / "partial", {"checkpoint": setting["checkpoint"]})
        seen = []
        hook = model.register_forward_pre_hook(lambda module, args: seen.append(1))
        batches = pixels(setting["pixels"], setting["batch_size"])
        result = evaluate(model, batches, setting["name"], eps=setting["eps"], seed=setting["seed"], chunks=chunks)
        hook.remove()
        return result[setting["name"]], len(seen)

    result, passes = run(setting)
    assert passes == 3
    assert run(setting) == (result, 0)
    changed, passes = run({**setting, **change})
    assert passes >= 3
    # Neither has taken the other's place.
    assert run(setting) == (result, 0)
    assert run({**setting, **change}) == (changed, 0)


def test_forgetting_leaves_what_others_did(model, tmp_path):
    path = tmp_path / "partial"
    for checkpoint in ("one", "two"):
        evaluate(model, pixels([1]), "clean", eps=0.1, chunks=Chunks(path, {"checkpoint": checkpoint}))
    Chunks(path, {"checkpoint": "one"}).forget()
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["settings"]["checkpoint"] == "two"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2, "entries": []}', '{"format": 1, "entries": [3]}'])
def test_a_file_that_holds_no_chunks_is_refused(text, tmp_path):
    path = tmp_path / "a.json.partial"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"partial result: expected chunks in format 1, got '.*a\.json\.partial'"):
        Chunks(path, {})
    assert path.read_text() == text


@needs_autoattack
@pytest.mark.parametrize("kind", ["honest", "scaled", "quantised"])
def test_masked_gradients_are_suspicious_and_honest_ones_are_not(kind):
    model = Linear(2, 16, scale=1e4 if kind == "scaled" else 1.0)
    x, y = around(model, n=120, size=4)
    if kind == "quantised":
        model.register_forward_hook(lambda module, args, z: z.mul(100).round() / 100)
    found = masking_check(model, batched(x, y, 60), eps=EPS)
    square = found["attacks"]["square-1000"]
    assert found["samples"] == 120
    assert found["verdict"] == ("ok" if kind == "honest" else "suspicious")
    assert square["suspicious"] == (kind != "honest")
    assert (square["turned_alone"] > 10) == (kind != "honest")
    closed_form = (model.radius(x, y) > EPS).double().mean().item()
    white_box = found["white_box"]["accuracy"]
    assert white_box == closed_form if kind == "honest" else white_box > closed_form + 0.1


def marks(both, white_box_only, other_only, neither):
    rows = [[1, 1]] * both + [[1, 0]] * white_box_only + [[0, 1]] * other_only + [[0, 0]] * neither
    return tuple(torch.tensor(rows, dtype=torch.bool).T)


def test_pairs_decide_on_attacks_without_gradients():
    # Nine samples turned by Square alone: 2^-9 = 0.002 by chance; of three attacks, below 0.01 / 3 is suspicious.
    found = masking._compare("square-1000", *marks(50, 9, 0, 41))
    assert found["p_value"] == pytest.approx(2.0**-9)
    assert (found["turned_alone"], found["turned_by_white_box_alone"]) == (9, 0)
    # Three of twenty the other way: sum over k <= 3 of C(20, k) / 2^20.
    found = masking._compare("noise-100", *marks(50, 17, 3, 30))
    assert found["p_value"] == pytest.approx((1 + 20 + 190 + 1140) / 2**20)
    assert masking._compare("noise-100", *marks(50, 0, 0, 50))["p_value"] == 1.0
    assert masking._compare("noise-100", *marks(50, 0, 30, 20))["p_value"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["pgd-200", "autoattack"])
def test_stronger_attacks_may_gain_what_is_within_the_noise_of_the_accuracies(name):
    assert masking._compare(name, *marks(50, 10, 0, 40))["p_value"] > 0.05  # 60 % to 50 %, of 100
    assert masking._compare(name, *marks(500, 100, 0, 400))["p_value"] < 1e-4  # the same of 1,000
    # Two of two against none of two: one of the C(4, 2) ways to place two robust samples.
    assert masking._compare(name, *marks(0, 2, 0, 0))["p_value"] == pytest.approx(1 / 6)


@needs_autoattack
@pytest.mark.parametrize("turned, suspicious", [(9, True), (8, False), (0, False)])
def test_the_level_is_shared_by_the_attacks_that_are_looked_at(turned, suspicious, model, monkeypatch):
    def fixed(model, batches, attacks, **options):
        white_box = torch.ones(1, 20, dtype=torch.bool)
        square = white_box.clone()
        square[0, :turned] = False
        return {name: Outcome(square if "square" in name else white_box, []) for name in attacks.split(",")}

    monkeypatch.setattr(masking, "outcomes", fixed)
    # 2^-8 = 0.0039, 2^-9 = 0.0020, and 0.01 / 3 lies between them.
    found = masking_check(model, pixels(range(20)), eps=0.1)
    assert [each["suspicious"] for each in found["attacks"].values()] == [False, suspicious, False]
    assert found["verdict"] == ("suspicious" if suspicious else "ok")


@needs_autoattack
@pytest.mark.parametrize("standing, verdict", [(0, "ok"), (1, "undecided"), (8, "undecided"), (9, "ok")])
def test_nothing_is_said_to_be_ok_that_could_not_have_been_suspicious(standing, verdict, model):
    """2^-8 is above the level of 0.01 / 3, 2^-9 below; Fisher's test of 9 of 9 samples is far below: 1 / C(18, 9)."""
    near, far = [126] * (12 - standing), [0] * standing  # turned by every attack but the weakest, and by none
    found = masking_check(model, pixels(near + far), eps=10 / 255)
    assert found["white_box"]["accuracy"] == standing / 12
    assert found["verdict"] == verdict


@needs_autoattack
def test_autoattack_is_compared_sample_by_sample(model, monkeypatch):
    monkeypatch.setattr(masking, "ATTACKS", ("pgd-20", "pgd-20-2", "square-5", "noise-2"))
    batches = pixels([120, *[0] * 9, *[255] * 10], size=7)
    withstood = torch.tensor([False] + [True] * 19)
    found = masking_check(model, batches, eps=10 / 255, autoattack=withstood)
    assert (found["samples"], found["verdict"]) == (20, "ok")
    row = found["attacks"]["autoattack"]
    assert (row["turned_alone"], row["turned_by_white_box_alone"], row["accuracy"]) == (0, 0, 0.95)
    row = masking_check(model, batches, eps=10 / 255, autoattack=withstood.flip(0))["attacks"]["autoattack"]
    assert (row["turned_alone"], row["turned_by_white_box_alone"], row["suspicious"]) == (1, 1, False)
    row = masking_check(model, batches, eps=10 / 255, autoattack=withstood & False)["attacks"]["autoattack"]
    assert (row["turned_alone"], row["accuracy"], row["suspicious"]) == (19, 0, True)
    with pytest.raises(ValueError, match=r"autoattack: expected bool \[20\], got a tensor of shape \[19\]"):
        masking_check(model, batches, eps=10 / 255, autoattack=withstood[1:])


def test_what_an_attack_of_another_package_prints_and_logs_is_not_on_the_standard_output(model, monkeypatch, capsys):
    logger = logging.getLogger("auto-attack")

    def noisy(model, x, y, eps, attack, seed):
        print("progress")
        logger.info("nothing of note")
        logger.warning(f"there are {len(x)} points with zero gradient!")
        return x

    monkeypatch.setitem(points.FOREIGN, "noise", noisy)
    monkeypatch.delitem(points.OWN, "noise")
    found = evaluate(model, pixels(range(5), size=3), "noise-2", eps=0.1)["noise-2"]
    assert found["notes"] == {"there are N points with zero gradient!": 4}
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "progress\n" * 4)
    assert logger.propagate
    assert not logger.handlers


# What is passed as model, batches and attacks


def test_a_shuffled_loader_is_gone_through_once_and_samples_stay_together():
    model = Linear(2, 9)
    x, y = around(model, n=50)
    loader = DataLoader(TensorDataset(x, y), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1))
    order = torch.cat([labels for _, labels in loader])
    loader.generator = torch.Generator().manual_seed(1)
    found = outcomes(model, loader, "clean,fgsm,noise-2", eps=2 * EPS)
    expected = outcomes(model, [(x, y)], "clean,fgsm", eps=2 * EPS)
    with torch.no_grad():
        right = model(x).argmax(1) == y
    # A sample that is wrong without an attack withstands none, in whichever order: so that all attacks saw the same.
    assert not torch.equal(order, y)
    assert not (found["fgsm"].robust[-1] & ~found["clean"].robust[-1]).any()
    assert found["clean"].robust.sum() == right.sum() < 50
    assert found["fgsm"].robust.sum() == expected["fgsm"].robust.sum() < right.sum()
    batches = batched(x, y, 20)
    again = outcomes(model, iter(batches), "clean,noise-2", eps=2 * EPS)  # an iterator serves, too
    listed = outcomes(model, batches, parse_attacks("clean,noise-2"), eps=2 * EPS)
    assert all(torch.equal(again[name].robust, listed[name].robust) for name in listed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_another_shape_and_dtype(dtype):
    model = Linear(3, 5).to(dtype)
    x = torch.rand(20, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    found = evaluate(model, [(x, y)], "clean,fgsm,pgd-5-2,noise-2", eps=0.3)
    assert found["clean"]["accuracy"] == 1 > found["fgsm"]["accuracy"] >= found["pgd-5-2"]["accuracy"]
    assert measure_e_lin(model, [(x, y)], eps=0.3) > 0  # the loss is not linear


X, Y = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batches, error, message",
    [
        (7, TypeError, r"expected an iterable of pairs \(x, y\), got 7 \(int\)"),
        ([X], TypeError, r"expected pairs \(x, y\) of tensors, got a tensor of shape"),
        ([(X, Y, Y)], TypeError, r"expected pairs \(x, y\) of tensors, got 3 items"),
        ([(X, [0, 1])], TypeError, r"expected pairs \(x, y\) of tensors, got 2 items"),
        ([(X.byte(), Y)], ValueError, r"expected x floating \[B, \.\.\.\] with B >= 1, got .*torch.uint8"),
        ([(X[:0], Y[:0])], ValueError, r"expected x floating \[B, \.\.\.\] with B >= 1, got .*\[0, 1, 1, 1\]"),
        ([(X, Y[:1])], ValueError, r"expected y int64 \[2\] on cpu, got .*\[1\]"),
        ([(X, Y.float())], ValueError, r"expected y int64 \[2\] on cpu, got .*torch.float32"),
        ([(X, Y.to("meta"))], ValueError, r"expected y int64 \[2\] on cpu, got .*meta"),
        ([(X.to("meta"), Y.to("meta"))], ValueError, "expected tensors on the model's device, cpu, got meta"),
        ([(X, Y), (X + 0.6, Y)], ValueError, r"expected x in \[0.0, 1.0\], got values from 1.1"),
        ([(X * torch.nan, Y)], ValueError, r"expected x in \[0.0, 1.0\], got values from nan"),
        ([], ValueError, "expected at least one, got none"),
    ],
)
def test_other_batches_are_refused(batches, error, message, model):
    with pytest.raises(error, match="batches: " + message):
        evaluate(model, batches, "clean", eps=0.1)
    with pytest.raises(error, match="batches: " + message):
        measure_e_lin(model, batches, eps=0.1)
    assert model.training


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": lambda x: x}, TypeError, r"model: expected a torch\.nn\.Module, got .*function"),
        ({"model": nn.Identity()}, ValueError, r"model\(x\): expected a floating-point tensor of shape \[2, C\], got"),
        ({"attacks": 3}, TypeError, r"attacks: expected names with commas between them, got 3"),
        ({"attacks": [3]}, TypeError, r"attacks: expected names among .* got 3"),
        ({"attacks": []}, ValueError, r"attacks: expected names among .* got none"),
        ({"eps": -0.1}, ValueError, "eps: expected a finite number"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0"),
    ],
)
def test_other_models_attacks_and_settings_are_refused(changes, error, message, model):
    options: dict[str, Any] = {"model": model, "batches": [(X, Y)], "attacks": "clean", "eps": 0.1, **changes}
    with pytest.raises(error, match=message):
        evaluate(**options)
