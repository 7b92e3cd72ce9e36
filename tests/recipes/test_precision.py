"""Runs in low precision: what computes in it, against plain loops; resuming them; and what is refused or warned of."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from elle_fast._core import devices
from elle_fast._core.precision import DTYPES
from elle_fast.evaluation import measure_e_lin
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, train
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet

LOW = ["bf16", "fp16"]


def run_of(**changes):
    run = Run(replace(CONFIG, **{"augment": False, **changes}).resolved(), dataset(), Path(), Ranks(timeout=1.0))
    run.model.train()
    return run


@pytest.mark.parametrize("precision", LOW)
def test_a_step_is_that_of_torchs_autocast_and_scaler(precision):
    run = run_of(precision=precision, method="plain")
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
    assert (run._stepping.scaler is not None) == (precision == "fp16")
    for x, y in run.upcoming(4):
        run.take_step(x, y)
        optimizer.param_groups[0]["lr"] = run.course.rates(run.step)[0][0]
        run.step += 1
        optimizer.zero_grad()
        with torch.autocast("cpu", DTYPES[precision]):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for one, two in zip(run.model.parameters(), model.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)
    plain = run_of(method="plain")
    for x, y in plain.upcoming(4):
        plain.take_step(x, y)
        plain.step += 1
    assert not torch.allclose(next(plain.model.parameters()), next(model.parameters()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "method, options, of_triplets",
    [
        ("elle-a", {"precision": "bf16"}, "fp32"),
        ("gat+elle-a", {"precision": "bf16"}, "fp32"),
        ("elle-a", {"precision": "fp16", "triplet_precision": "bf16"}, "bf16"),
        ("elle-a", {"precision": "bf16", "triplet_precision": "same"}, "bf16"),
        ("elle-a", {"triplet_precision": "bf16"}, "bf16"),
        ("elle-a", {}, "fp32"),
        ("elle-2p", {"precision": "bf16"}, "bf16"),
    ],
)
def test_the_triplets_are_in_fp32_unless_asked_otherwise(method, options, of_triplets):
    run = run_of(method=method, lam=1.0, **options)
    found = []
    run.model.net[0].register_forward_hook(lambda module, given, out: found.append((len(given[0]), out.dtype)))
    for x, y in run.upcoming(1):
        run.take_step(x, y)
    rest = DTYPES[run.config.precision] or torch.float32
    *others, (rows, last) = found
    assert {dtype for _, dtype in others} == {rest}
    assert last == (DTYPES[of_triplets] or torch.float32)
    apart = run.criterion.linearity.triplet_precision is not None or method == "gat+elle-a"
    assert rows == (48 if apart or method == "elle-2p" else 64)


@pytest.mark.parametrize("precision", LOW)
def test_a_killed_run_ends_with_the_same_bits(precision, tmp_path, monkeypatch):
    config, step = replace(CONFIG, precision=precision, lam=50.0, epochs=2), training._Loop._step
    train(config, tmp_path / "whole", dataset=dataset(), console=quiet())

    def killed(loop, x, y):
        if loop.run.step == 12:
            raise KeyboardInterrupt
        return step(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "killed", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", step)
    assert 0 < checkpoint.load(tmp_path / "killed" / CHECKPOINT)["step"] < 12
    for other, named in (("fp32", "precision = 'fp32'"), *((each, f"precision = {each!r}") for each in LOW)):
        if other != precision:
            changed = replace(config, precision=other)
            with pytest.raises(ValueError, match=rf"{named} \(checkpoint: {precision!r}\)"):
                train(changed, tmp_path / "killed", resume=True, dataset=dataset(), console=quiet())
    train(config, tmp_path / "killed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert bool(checkpoint.load(tmp_path / "whole" / CHECKPOINT)["scaler"]) == (precision == "fp16")


def test_the_scale_is_part_of_a_resume(tmp_path):
    run = run_of(precision="fp16", method="plain")
    for x, y in run.upcoming(3):
        run.take_step(x, y)
        run.step += 1
    run.path = tmp_path / CHECKPOINT
    run.save()
    saved = checkpoint.load(run.path)
    assert saved["scaler"]["scale"] < 65536  # the first step's gradients are not finite
    assert saved["scaler"]["_growth_tracker"] == 2
    resumed = run_of(precision="fp16", method="plain")
    resumed.restore(saved)
    assert resumed._stepping.scaler is not None
    assert run._stepping.scaler is not None
    assert resumed._stepping.scaler.state_dict() == run._stepping.scaler.state_dict()
    with pytest.raises(ValueError, match=r"checkpoint: expected a whole checkpoint, got .*empty"):
        run_of(precision="fp16", method="plain").restore({**saved, "scaler": {}})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "half"}, "precision: expected one of 'fp32', 'fp16', 'bf16', got 'half'"),
        (
            {"triplet_precision": "half"},
            "triplet_precision: expected one of 'fp32', 'fp16', 'bf16', 'same', got 'half'",
        ),
        ({"precision": "fp16", "steps_per_batch": 2}, "steps_per_batch: expected 1 with precision 'fp16', .*got 2"),
        ({"method": "fgsm", "triplet_precision": "same"}, "triplet_precision: method 'fgsm' .*got 'same'"),
        ({"method": "elle-2p", "triplet_precision": "fp32"}, "triplet_precision: method 'elle-2p' takes .* only"),
        ({"method": "elle-2p", "triplet_precision": "same"}, "triplet_precision: method 'elle-2p' .*got 'same'"),
    ],
)
def test_bad_precisions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options).resolved()


def test_a_resolved_run_says_which_precision_the_triplets_have():
    run = replace(CONFIG, precision="bf16").resolved()
    assert run.triplet_precision == run.resolved().triplet_precision == "fp32"
    assert replace(CONFIG, precision="bf16", method="fgsm").resolved().triplet_precision is None
    assert CONFIG.resolved().triplet_precision is None


def test_the_authors_recipe_leaves_the_precision_open():
    arguments = ["--recipe", "authors", "--method", "elle-a", "--precision", "bf16", "--triplet-precision", "same"]
    run = cli.read_options("train", [*arguments, "--device", "cpu"]).run.resolved()
    assert (run.precision, run.triplet_precision, run.steps_per_batch) == ("bf16", "same", 2)


@pytest.mark.parametrize("has, warned", [({"avx512_bf16": True}, False), ({"amx_bf16": True}, False), ({}, True)])
def test_a_device_on_which_bf16_is_slow_is_said(has, warned, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **has}, raising=False)
    console = quiet()
    config = TrainConfig(model="cnn", width=2, precision="bf16", epochs=1, batch_size=64, validation=0, device="cpu")
    train(replace(config, eval_attacks="clean"), tmp_path, dataset=dataset(), console=console)
    said = "warning: precision bf16 takes longer than fp32 on this device, which has no instructions for it\n"
    assert (said in console.file.getvalue()) == warned


def test_what_torch_does_not_say_is_not_known(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.has_products(torch.device("cpu"), torch.bfloat16) is None
    assert devices.has_products(torch.device("meta"), torch.bfloat16) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_have_a_precision_of_their_own(precision, monkeypatch, tmp_path):
    """Whatever the training's: what is attacked, during and after it, and by ``elle-fast eval``."""
    seen: dict[bool, set[tuple[torch.dtype, bool]]] = {}
    e_lins: list[int] = []
    original, measured = Run.__init__, measure_e_lin

    def init(run, *args):
        original(run, *args)
        run.model.net[0].register_forward_hook(
            lambda module, given, out: seen.setdefault(run.model.training, set()).add((out.dtype, bool(e_lins)))
        )

    def measure(model, *args, **options):
        e_lins.append(1)
        found = measured(model, *args, **options)
        e_lins.clear()
        return found

    monkeypatch.setattr(Run, "__init__", init)
    monkeypatch.setattr(training, "measure_e_lin", measure)
    other = "bf16" if precision == "fp32" else "fp32"
    config = replace(CONFIG, method="fgsm", precision=other, eval_precision=precision, epochs=1)
    given = replace(dataset(), name="digits")
    result = train(config, tmp_path, dataset=given, console=quiet())
    low = torch.bfloat16
    dtypes = {"fp32": torch.float32, "bf16": low}
    assert {dtype for dtype, _ in seen[True]} == {dtypes[other]}
    assert seen[False] == {(dtypes[precision], False), (torch.float32, True)}
    assert result["config"]["eval_precision"] == precision
    options = EvalOptions(tmp_path / CHECKPOINT, config.eval_attacks, precision=precision, device="cpu")
    found = evaluate_checkpoint(options, dataset=given, console=quiet())
    assert (found["precision"], found["batch_size"]) == (precision, 256)
    assert found["accuracy"] == result["accuracy"]
    with pytest.raises(ValueError, match=r"^precision: expected one of 'fp32', 'fp16', 'bf16', got 'half'"):
        evaluate_checkpoint(replace(options, precision="half"), dataset=given, console=quiet())
    with pytest.raises(ValueError, match=r"^eval_precision: expected one of 'fp32', 'fp16', 'bf16', got 'half'"):
        replace(CONFIG, eval_precision="half").resolved()
