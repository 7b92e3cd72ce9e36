"""ELLEModule and RobustValidation in a real Trainer, against the plain loop; Fabric; both in two processes."""

from __future__ import annotations

import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elle_fast import ELLELoss, attacks, methods
from elle_fast.integrations.lightning import ELLEModule, RobustValidation, gradients
from elle_fast.testing import no_host_sync
from tests.helpers import built, random
from tests.integrations import cases
from tests.integrations.cases import EPS, MEAN, STD, B, Noted, criterion, loader, net, plain, same, sgd, state

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log.. but the `self.trainer`"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def trainer(**options: Any) -> Any:
    return lightning.Trainer(**{**QUIET, "max_epochs": 1, **options})


def fitted(
    loss: Any, batches: int = 4, *, val: bool = False, module: Any = None, **options: Any
) -> tuple[Any, Any, list[Tensor]]:
    """The module, its trainer, and the losses of its steps."""
    module = module or ELLEModule(net(), loss, sgd)
    run, noted = trainer(**options), Noted(module.criterion)
    torch.manual_seed(1)
    run.fit(module, loader(batches), loader(1) if val else None)
    return module, run, noted.losses


@pytest.mark.parametrize(
    "parts, options, autocast",
    [(1, {}, None), (2, {"accumulate_grad_batches": 2}, None), (1, {"precision": "bf16-mixed"}, torch.bfloat16)],
    ids=["plain", "accumulated", "bf16-mixed"],
)
def test_the_losses_are_the_plain_loops(parts, options, autocast):
    module, run, losses = fitted(criterion(), **options)
    model, loss = net(), criterion()
    torch.manual_seed(1)
    assert same(losses, plain(model, loss, loader(4), parts=parts, autocast=autocast))
    assert same(state(module.model), state(model))
    assert same(state(module.criterion), state(loss))
    assert {"train_loss", "train_ce", "train_e_lin", "train_lam"} <= run.logged_metrics.keys()
    assert run.logged_metrics["train_loss"] == losses[-1]


def fp16(loss: Any, scale: float) -> tuple[Any, list[Tensor], Any]:
    """In float16 with a GradScaler, which Lightning takes on the CPU from a plugin alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    module, _, losses = fitted(loss, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return module, losses, scaler


@pytest.mark.parametrize("scale", [1024.0, 2.0**40], ids=["steps", "skips"])
def test_16_mixed_with_a_scaler_is_the_plain_loop(scale):
    """A scale that overflows skips steps, and the model stays as it is."""
    module, losses, _ = fp16(criterion(), scale)
    model, loss = net(), criterion()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=scale)
    before, expected = [weight.detach().clone() for weight in model.parameters()], []
    torch.manual_seed(1)
    for x, y in loader(4):
        with torch.autocast("cpu", torch.float16):
            found = loss(model, x, y)
        expected.append(found.detach().clone())
        scaler.scale(found).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert same(losses, expected)
    assert same(state(module.model), state(model))
    assert same(state(module.criterion), state(loss))
    assert same(before, model.parameters()) == (scale > 1e6)


def test_16_mixed_by_name_is_bf16_on_the_cpu():
    with pytest.warns(UserWarning, match=r"AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        _, run, losses = fitted(criterion(), precision="16-mixed")
    assert run.precision == "bf16-mixed"
    assert same(losses, fitted(criterion(), precision="bf16-mixed")[2])
    with pytest.warns(UserWarning, match=r"Using `precision='bf16-mixed'` instead"):
        lightning.Fabric(accelerator="cpu", devices=1, precision="16-mixed")


@pytest.mark.parametrize("kind", ["pair", "dictionary"])
def test_batches_of_other_forms(kind):
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(*cases.data(2).tensors, strict=True)]
    check, module = RobustValidation(EPS, steps=2), ELLEModule(net(), criterion(), sgd)
    batches: Any = DataLoader(rows, B, generator=torch.Generator()) if kind == "dictionary" else loader(2)  # type: ignore[arg-type]
    run = trainer(callbacks=[check])
    torch.manual_seed(1)
    run.fit(module, batches, batches)
    expected = _validated()
    assert {name: float(run.callback_metrics[name]) for name in expected} == expected


@cache
def _validated() -> dict[str, float]:
    module, run = ELLEModule(net(), criterion(), sgd), trainer(callbacks=[RobustValidation(EPS, steps=2)])
    torch.manual_seed(1)
    run.fit(module, loader(2), loader(2))
    return {name: float(run.callback_metrics[name]) for name in ("val_acc", "val_pgd_acc", "train_loss")}


@pytest.mark.parametrize(
    "batch, got",
    [
        ({"image": 1, "label": 2}, "got one with image, label; say"),
        ({}, "got one with nothing; say"),
        (torch.zeros(2), "got a Tensor; say"),
        ((1, 2, 3), "got a tuple of 3; say"),
    ],
)
def test_batches_that_are_not_understood(batch, got):
    said = r"^batch: expected \(x, target\), or a dictionary with pixel_values and labels, " + got
    with pytest.raises(TypeError, match=said):
        ELLEModule(net(), criterion()).parts(batch)
    check = RobustValidation(EPS)
    with pytest.raises(TypeError, match=said + r" what they are: parts=lambda batch"):
        check.on_validation_batch_end(trainer(), Own(), None, batch, 0)


def test_another_method():
    _, _, losses = fitted(methods.build("n-fgsm+advlc", eps=EPS, lam=1.0))
    torch.manual_seed(1)
    model = net()
    torch.manual_seed(1)
    assert same(losses, plain(model, methods.build("n-fgsm+advlc", eps=EPS, lam=1.0), loader(4)))


def test_a_normalized_loader():
    """x is put back, so the points are those of the pixels, up to the roundings of there and back."""
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    loss = criterion(mean=MEAN, std=STD, bounds=(0.0, 1.0))
    module, x = ELLEModule(net(), loss, sgd, normalized=True), random(B, 1, 6, 6, seed=5)
    back, target = module.parts(((x - mean) / std, torch.zeros(B)))
    torch.testing.assert_close(back, x, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    assert not target.any()
    module.eval()
    # The points that the model sees: (back - mean) / std.
    torch.testing.assert_close(module(x), module.model((x - mean) / std), rtol=1e-5, atol=1e-5)


def test_validation_under_attack_though_gradients_are_forbidden():
    check = RobustValidation(EPS, steps=3)
    module, run, losses = fitted(criterion(), 4, val=True, callbacks=[check])
    metrics = run.callback_metrics
    assert same(losses, fitted(criterion(), 4)[2])  # validation draws nothing and changes nothing
    x, y = next(iter(loader(1)))
    module.eval()
    x_adv = attacks.pgd(module, x, y, EPS, steps=3, generator=torch.Generator().manual_seed(0))
    assert metrics["val_acc"] == (module(x).argmax(1) == y).float().mean()
    assert metrics["val_pgd_acc"] == (module(x_adv).argmax(1) == y).float().mean()
    assert run.validate(module, loader(2), verbose=False)[0].keys() == {"val_acc", "val_pgd_acc"}
    assert (
        "val_pgd_acc" in trainer(callbacks=[RobustValidation(EPS, batches=1)]).test(Own(), loader(1), verbose=False)[0]
    )


class Own(lightning.LightningModule):  # type: ignore[misc]
    """A user's own module, with its own batches, whose model is not called ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = net(), criterion()

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self.net, *batch)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.criterion(self.net, *batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return sgd(self.net.parameters())


def test_a_criterion_in_validation_says_what_forbids_its_gradient():
    with pytest.raises(RuntimeError, match=r"^torch.inference_mode: expected to be outside"):
        trainer().validate(Own(), loader(1), verbose=False)
    assert trainer(inference_mode=False).validate(Own(), loader(1), verbose=False)
    model, x, y = net(), random(B, 1, 6, 6, seed=1), torch.zeros(B, dtype=torch.int64)
    with torch.inference_mode(), gradients():
        assert criterion()(model, x, y).requires_grad


def test_lam_and_its_history_are_in_a_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"

    def run(seed: int, ckpt: Path | None) -> Any:
        module = ELLEModule(net(seed), criterion(), sgd)
        averaged = lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.9)
        fit = trainer(max_epochs=2, callbacks=[_Epochs(path), averaged])
        fit.fit(module, loader(4), ckpt_path=ckpt, weights_only=True)
        return module

    whole = run(0, None)
    assert int(torch.load(path)["criterion"]["controller.count"]) == 4
    resumed = run(9, path)
    assert same(state(whole), state(resumed))
    assert int(resumed.criterion.controller.count) == 8
    assert same(state(whole.criterion), state(resumed.criterion))
    assert resumed.criterion.controller.lam > 0
    assert not [name for name in resumed.state_dict() if "criterion" in name]
    with pytest.raises(ValueError, match=r"^checkpoint: .* without the key 'criterion'"):
        resumed.on_load_checkpoint({"state_dict": {}})


class _Epochs(lightning.Callback):  # type: ignore[misc]
    """Lightning's checkpoints do not hold torch's random state, so each epoch has a seed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(100 + trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_no_step_waits_for_the_device():
    module, x, y = ELLEModule(net(), criterion(), sgd), random(B, 1, 6, 6, seed=1), torch.zeros(B, dtype=torch.int64)
    module.trainer = trainer()
    setattr(module, "log_dict", lambda *args, **kwargs: None)  # noqa: B010
    module.training_step((x, y), 0)
    with no_host_sync():
        module.training_step((x, y), 1).backward()


def test_of_the_calls_of_lbfgs_the_first_counts():
    module = ELLEModule(net(), criterion(), partial(torch.optim.LBFGS, lr=0.01, max_iter=3))
    losses = fitted(None, module=module)[2]
    assert len(losses) == 12
    assert int(module.criterion.controller.count) == 4  # type: ignore[union-attr, arg-type]
    fitted(None, 1, module=module)  # another fit, from the place at which one of one batch would have ended
    fitted(None, 1, module=module)
    assert int(module.criterion.controller.count) == 6  # type: ignore[union-attr, arg-type]


def test_an_optimizer_of_torchs_by_its_class():
    module = ELLEModule(net(), criterion(), torch.optim.Adam)
    assert isinstance(module.configure_optimizers(), torch.optim.Adam)


@pytest.mark.parametrize(
    "make, error, said",
    [
        (lambda: ELLEModule(net, criterion()), TypeError, r"^model: expected a torch.nn.Module, got "),  # type: ignore[arg-type]
        (
            lambda: ELLEModule(net(), nn.CrossEntropyLoss()),  # type: ignore[arg-type]
            TypeError,
            r"^criterion: expected ELLELoss .*which call the model themselves, got CrossEntropyLoss",
        ),
        (lambda: ELLEModule(net(), built("pgi", eps=EPS)), ValueError, r"^criterion: expected one without a memory"),
        (lambda: ELLEModule(net(), criterion(), normalized=True), ValueError, r"^normalized: .*mean and std.*ELLELoss"),
        (lambda: ELLEModule(net(), built("fgsm", eps=EPS), normalized=True), ValueError, r"^normalized: .*Adversarial"),
        (lambda: ELLEModule(net(), criterion(), normalized=1), TypeError, r"^normalized: expected True or False"),  # type: ignore[arg-type]
        (lambda: ELLEModule(net(), criterion()).configure_optimizers(), TypeError, r"^optimizer: expected a function"),
        (lambda: ELLEModule(net(), criterion(), 3), TypeError, r"^optimizer: expected None or a function"),  # type: ignore[arg-type]
        (lambda: RobustValidation(-1.0), ValueError, r"^eps: expected"),
        (lambda: RobustValidation(EPS, batches=0), ValueError, r"^batches: expected"),
        (
            lambda: RobustValidation(EPS, epochs=3),
            TypeError,
            r"^RobustValidation: expected options .* got epochs",
        ),
    ],
)
def test_what_cannot_train(make, error, said):
    with pytest.raises(error, match=said):
        make()


RANKS = r"""
import sys, warnings
from pathlib import Path
import torch
from tests.optional import import_torchvision
import_torchvision()
import lightning
from tests.integrations import cases, test_lightning as here

def ddp():
    module = here.ELLEModule(cases.net(), cases.criterion(), cases.sgd)
    noted = cases.Noted(module.criterion)
    torch.manual_seed(1)
    run = lightning.Trainer(**{**here.QUIET, "devices": 2, "strategy": "ddp_fork", "max_steps": 3})
    run.callbacks.append(here.Kept(noted, Path(sys.argv[1])))
    run.fit(module, cases.loader(6))

def fabric(fabric):
    here.fabric_step(fabric, Path(sys.argv[1]) / f"fabric-{fabric.global_rank}.pt")

torch.set_num_threads(1)
ddp()
lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", precision="bf16-mixed").launch(fabric)
"""


class Kept(lightning.Callback):  # type: ignore[misc]
    """What each process has seen and made, in a file."""

    def __init__(self, noted: Noted, folder: Path) -> None:
        self.noted, self.folder = noted, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save([self.noted.lams, state(pl_module.model)], self.folder / f"ddp-{trainer.global_rank}.pt")


def smooth() -> nn.Module:
    """Without batch norm, whose statistics are each rank's own, and without dropout, whose masks are."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, cases.CLASSES))


def fabric_step(fabric: Any, path: Path) -> None:
    """One step on this rank's half of a batch; the gradients go into a file."""
    model = smooth()
    wrapped = fabric.setup(model)
    loss_of = ELLELoss(EPS, 10.0)
    x, y = cases.data(1).tensors
    part = B // fabric.world_size
    mine = slice(part * fabric.global_rank, part * (fabric.global_rank + 1))
    torch.manual_seed(1)
    loss = loss_of(wrapped, x[mine], y[mine])
    fabric.backward(loss)
    torch.save([parameter.grad for parameter in model.parameters()], path)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, "-c", RANKS, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_have_the_same_lam_and_weights(ranks):
    (lams, weights), (others, other_weights) = (torch.load(ranks / f"ddp-{rank}.pt") for rank in range(2))
    assert len(lams) == 3
    assert same(lams, others)
    assert max(lams) > 0
    weights, other_weights = ([w for w in each if w.is_floating_point()] for each in (weights, other_weights))
    assert same([weights[0], weights[-1]], [other_weights[0], other_weights[-1]])  # batch norm's are each rank's own


@pytest.mark.slow
def test_fabrics_gradients_in_two_processes_are_those_of_one(ranks, tmp_path):
    fabric_step(lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"), tmp_path / "bf16.pt")
    fabric_step(lightning.Fabric(accelerator="cpu", devices=1), tmp_path / "fp32.pt")
    rounded, exact = torch.load(tmp_path / "bf16.pt"), torch.load(tmp_path / "fp32.pt")
    two = [torch.load(ranks / f"fabric-{rank}.pt") for rank in range(2)]
    assert same(*two)
    for mine, one, true in zip(two[0], rounded, exact, strict=True):
        # Both round in bf16, in sums of other order: they are as far from each other as from the exact ones at most.
        assert (mine - one).norm() <= (one - true).norm()
        assert one.norm() > 0
