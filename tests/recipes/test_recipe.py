"""The recipes: what they set, what they refuse, and the ELLE authors' trainer against a plain loop."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from elle_fast import methods
from elle_fast.data import Dataset, Split
from elle_fast.recipes import cli, recipe
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.course import Course
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.phases import Plan, of_run
from elle_fast.recipes.run import Run

LAM, RATE = 20.0, 0.02


def images(count=24):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    split = Split((noise + 60 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)
    return Dataset(name="bright", train=split, test=split, classes=("a", "b", "c"), augment=True)


class Recorded(nn.Module):
    """Keeps the points of every forward pass."""

    def __init__(self, model):
        super().__init__()
        self.points: list[torch.Tensor] = []
        model.register_forward_pre_hook(lambda module, given: self.points.append(given[0].detach().clone()))

    def of_a_step(self):
        points, self.points = self.points, []
        return points


class AuthorsLoop:
    """The ELLE authors' CIFAR trainer, from its facts, in plain torch; noise is taken from outside."""

    def __init__(self, model, config, steps):
        self.model, self.config = model, config
        self.optimizer = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=5e-4, momentum=0.9)
        up = steps * (2 / 5 if config.data == "svhn" else 1 / 2)
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(
            self.optimizer, base_lr=0, max_lr=RATE, step_size_up=up, step_size_down=steps - up
        )
        self.history: list[float] = []
        self.lam = 0.0

    def step(self, x, y, eps, start, x_a, x_b, alpha):
        model, points = self.model, start.clone().requires_grad_()
        self.optimizer.zero_grad()
        F.cross_entropy(model(points), y).backward()
        x_adv = (points + eps * points.grad.sign()).detach()
        model.zero_grad()
        loss = F.cross_entropy(model(x_adv), y)
        weight = alpha.view(-1, 1, 1, 1)
        triplet = torch.cat([x_a, x_b, (1 - weight) * x_a + weight * x_b])
        l_a, l_b, l_c = F.cross_entropy(model(triplet), y.repeat(3), reduction="none").chunk(3)
        e_lin = F.mse_loss(l_c, (1 - alpha) * l_a + alpha * l_b)
        (loss + self.lam * e_lin).backward()
        model(x)
        values = torch.tensor(self.history, dtype=torch.float64)
        if len(values) > 2 and e_lin > values.mean() + 2 * values.std(unbiased=False):
            self.lam = LAM
        else:
            self.lam *= 0.99
        self.history.append(e_lin.item())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.step()


def authors_run(data, method, **changes):
    asked = TrainConfig(data=data, method=method, eps=0.2, lam=LAM, seed=1, device="cpu")
    preset = recipe.options("authors", asked) | {"model": "preact", "epochs": 15, "batch_size": 16}
    config = replace(asked, **{**preset, "learning_rate": RATE, "width": 2, "augment": False, **changes})
    return Run(replace(config, validation=0).resolved(), images(), Path(), Ranks(timeout=1.0))


def largest_error(run, steps):
    """Of weights, buffers and lam after any of the steps, relative to the authors' loop's; and that loop's lams."""
    torch.set_num_threads(1)
    run.model.double()
    run.optimizer.load_state_dict(run.optimizer.state_dict())  # which casts the momentum
    plain = AuthorsLoop(copy.deepcopy(run.model).train(), run.config, 30)
    if run.config.data != "svhn":  # where eps grows, E_lin jumps by itself
        plain.lam = LAM
        run.criterion.controller.lam.fill_(LAM)
    run.model.train()
    recorded, errors, lams = Recorded(run.model), [], []
    for x, y in run.upcoming(steps):
        x, eps = x.double(), 0.2 * (min(run.step // 2 / 5, 1) if run.config.data == "svhn" else 1)
        run.take_step(x, y)
        run.step += 1
        passes = recorded.of_a_step()
        if [len(points) for points in passes] != [len(x), len(x), 3 * len(x), len(x)]:
            return torch.inf, []
        start, _, triplet, clean = passes
        assert torch.equal(clean, x)
        x_a, x_b, x_c = triplet.chunk(3)
        for points, radius in ((start, eps * (2 if "n-fgsm" in run.config.method else 0)), (x_a, eps), (x_b, eps)):
            assert 0.9 * radius <= (points - x).abs().max() <= radius + 1e-12
        # alpha from the pixel in which x_a and x_b are furthest apart; none with eps 0.
        far = (x_b - x_a).flatten(1).abs().argmax(dim=1, keepdim=True)
        a, b, c = (each.flatten(1).gather(1, far)[:, 0] for each in (x_a, x_b, x_c))
        alpha = ((c - a) / (b - a)).nan_to_num()
        assert 0 <= alpha.min() <= alpha.max() <= 1
        plain.step(x, y, eps, start, x_a, x_b, alpha)
        lams.append(plain.lam)
        found, expected = run.model.state_dict(), plain.model.state_dict()
        for name, value in found.items():
            if value.is_floating_point():
                errors.append(((value - expected[name]).norm() / (expected[name].norm() + 0.01)).item())
        errors.append(abs(run.criterion.controller.lam.item() - plain.lam) / LAM)
    return max(errors), lams


@pytest.mark.parametrize("method", ["elle-a", "n-fgsm+elle-a"])
@pytest.mark.parametrize("data", ["cifar10", "svhn"])
def test_the_authors_trainer_is_a_plain_loop_of_its_facts(method, data):
    run = authors_run(data, method)
    assert run.steps == 30  # of 24 images, 16 to a batch: the last one is kept
    assert run.shape["mean"] is None
    before = copy.deepcopy(run.model.state_dict())
    error, lams = largest_error(run, 14)
    assert error < 1e-5
    assert max(lams) > 0.5 * LAM  # the regulariser has had a say
    assert (LAM in lams[:6]) == (data == "svhn")  # and so has the detector
    assert max((value - before[name]).abs().max() for name, value in run.model.state_dict().items()) > 0.01


@pytest.mark.parametrize(
    "change",
    [
        *({"steps_per_batch": 1}, {"steps_per_batch": 3}, {"clean_forward": False}, {"lagged": False}),
        *({"forward": "packed"}, {"clamp": "all"}, {"momentum_cycle": 0.0}, {"weight_decay": 0.0}, {"peak": 0.45}),
        *({"eps_per": "step"}, {"eps_warmup": 4.0}),
    ],
    ids=str,
)
def test_each_quirk_of_theirs_is_seen(change):
    try:
        error, _ = largest_error(authors_run("svhn", "elle-a", **change), 14)
    except AssertionError:  # of the radius
        assert "eps" in str(change)
    else:
        assert error > 1e-3


def test_the_options_of_a_recipe_fit_together_for_every_method_and_data_set():
    for name in ("paper", "fastat", "authors"):  # imagenet is not of these data sets
        for method in [*methods.NAMES, "nuat+elle-a", "elle-a+advlc"]:
            for data in ("digits", "cifar10", "svhn"):
                asked = TrainConfig(data=data, method=method, device="cpu")
                run = replace(asked, **recipe.options(name, asked))
                recipe.check(name, run, recipe.options(name, asked))
                resolved = run.resolved()
                assert resolved.method == method
                assert resolved.eps_warmup == (0 if data != "svhn" or name == "fastat" else 5)


def test_the_paper_has_the_defaults_of_elle_fast_train():
    asked = TrainConfig(data="cifar10", method="elle-a", momentum=0.5, schedule="constant", device="cpu")
    run = replace(asked, **recipe.options("paper", asked)).resolved()
    expected = TrainConfig(data="cifar10", method="elle-a", model="preactresnet18", device="cpu").resolved()
    assert run == replace(expected, eval_attacks="clean,pgd-20,pgd-50-10")
    assert (run.schedule, run.epochs, run.learning_rate, run.lam, run.label_smoothing) == ("short", 30, 0.2, 4_000, 0)


def test_fastat_has_the_numbers_of_its_public_code():
    """Rates and momenta of OneCycleLR over 100 epochs, as their loop moves it."""
    asked = TrainConfig(data="cifar10", method="elle-a", device="cpu")
    run = replace(asked, **recipe.options("fastat", asked)).resolved()
    assert (run.epochs, run.batch_size, run.weight_decay, run.label_smoothing) == (100, 128, 5e-4, 0.4)
    assert (run.average, run.validation, run.patience) == (0.9995, 1_000, None)
    assert (run.normalize, run.drop_last, run.clamp, run.forward, run.lam) == (False, False, "attack", "split", 4_000)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)
    course = Course(run, Plan(of_run(run), lambda batch_size: 383))
    for epoch in range(100):
        group = optimizer.param_groups[0]
        assert course.rates(383 * epoch + epoch)[0] == pytest.approx((group["lr"], group["momentum"]))
        optimizer.step()
        if epoch < 99:
            scheduler.step()
    assert recipe.options("fastat", replace(asked, method="free-at"))["epochs"] == 200
    for data, smoothing in (("cifar10", 0.6), ("cifar100", 0.8)):
        liet = replace(asked, method="liet", data=data)
        assert replace(liet, **recipe.options("fastat", liet)).resolved().label_smoothing == smoothing
    assert recipe.options("fastat", replace(asked, method="nuat"))["clamp"] is None


def test_the_authors_lam_for_elle_is_that_of_their_scripts():
    found = {}
    for levels in (2, 8, 10, 16, 20, 22, 26):
        asked = TrainConfig(data="cifar10", method="elle", eps=levels / 255, device="cpu")
        found[levels] = replace(asked, **recipe.options("authors", asked)).resolved().lam
    assert found == {2: 1e3, 8: 1e3, 10: 5e3, 16: 5e3, 20: 5e3, 22: 1e4, 26: 1e4}


def options_of(*arguments):
    return cli.read_options("train", [*arguments, "--device", "cpu"]).run


def test_options_beside_a_recipe_win_and_the_recipe_wins_over_a_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("momentum: 0.5\nseed: 3\nmethod: fgsm\nschedule: long\n")
    run = options_of("--recipe", "fastat", "--config", str(file), "--momentum-cycle", "0", "--method", "elle-a")
    assert (run.momentum, run.momentum_cycle, run.seed, run.schedule) == (0.95, 0.0, 3, "onecycle")
    assert run.clamp == "attack"  # by the method beside it, not the file's
    fast = options_of("--recipe", "fastat", "--fast", "--method", "elle-a")
    assert (fast.skip_below, fast.triplet_fraction, fast.label_smoothing) == (0.01, 0.125, 0.4)


def test_a_printed_recipe_is_the_run(tmp_path, capsys):
    for name in recipe.NAMES:
        arguments = ["--recipe", name, "--data", "svhn", "--method", "elle-a", "--eps", "4/255"]
        assert cli.main(["train", *arguments, "--print-config"]) == 0
        file = tmp_path / f"{name}.yaml"
        file.write_text(capsys.readouterr().out)
        assert asdict(options_of("--config", str(file)).resolved()) == asdict(options_of(*arguments).resolved())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--normalize"], "normalize: contradicts --recipe authors, which has False (got True)"),
        (["--no-lagged"], "lagged: contradicts --recipe authors, which has True (got False)"),
        (["--fast"], "skip_below: contradicts --recipe authors, which has its default (got 0.01)"),
        (["--schedule", "long"], "schedule: contradicts --recipe authors, which has 'short' (got 'long')"),
        (["--label-smoothing", "0.1"], "label_smoothing: contradicts --recipe authors, which has 0.0 (got 0.1)"),
        (["--penalty", "smooth_l1"], "penalty: contradicts --recipe authors, which has 'squared' (got 'smooth_l1')"),
        (["--norm", "l2"], "norm: contradicts --recipe authors, which has 'linf' (got 'l2')"),
        (["--validation", "30"], "validation: contradicts --recipe authors, which has 180 (got 30)"),
        (["--no-augment"], "augment: contradicts --recipe authors, which has its default (got False)"),
        (["--sync-batchnorm"], "sync_batchnorm: contradicts --recipe authors, which has False (got True)"),
        (["--data", "svhn", "--eps-warmup", "4"], "eps_warmup: contradicts --recipe authors, which has 5.0 (got 4.0)"),
        (["--average", "0.999"], "average: contradicts --recipe authors, which has its default (got 0.999)"),
        (["--steps-per-batch", "1"], "steps_per_batch: contradicts --recipe authors, which has 2 (got 1)"),
        (["--eps-warmup", "3"], "eps_warmup: contradicts --recipe authors, which has 0.0 (got 3.0)"),
    ],
)
def test_what_contradicts_the_authors_is_an_error_that_names_it(arguments, message, capsys):
    assert cli.main(["train", "--recipe", "authors", "--method", "elle-a", *arguments, "--print-config"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"elle-fast train: {message}; to change")
    assert said.out == ""


def test_what_their_trainer_leaves_open_may_be_given():
    arguments = [
        "--epochs",
        "3",
        "--batch-size",
        "64",
        "--model",
        "cnn",
        "--momentum",
        "0.9",
        "--lam",
        "5",
        "--no-normalize",
    ]
    run = options_of("--recipe", "authors", "--method", "elle-a", *arguments)
    assert (run.epochs, run.batch_size, run.model, run.lam, run.steps_per_batch) == (3, 64, "cnn", 5.0, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "svhn", "--eps-warmup", "5"],
        ["--data", "svhn", "--epochs", "6", "--eps-warmup", "2"],
        ["--data", "digits", "--validation", "180"],
        ["--data", "cifar10", "--eps-per", "step"],
    ],
)
def test_what_the_authors_have_by_default_may_be_given(arguments):
    authors = ["--recipe", "authors", "--method", "elle-a"]
    assert options_of(*authors, *arguments).resolved() == options_of(*authors, *arguments[:-2]).resolved()


def test_an_unknown_recipe(capsys):
    assert cli.main(["train", "--recipe", "elle"]) == 2
    assert "recipe: expected one of 'paper', 'fastat', 'authors', 'imagenet', got 'elle'" in capsys.readouterr().err
