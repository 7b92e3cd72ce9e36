"""Two gloo ranks: lam and gradients as if one process had the whole batch; training runs, resumed and killed."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from contextlib import closing, redirect_stderr
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from elle_fast import AdaptiveLambda, AutoLambda, ELLELoss
from elle_fast.linearity import FORWARDS
from elle_fast.methods.awp import AWP
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.train import CHECKPOINT, RESULT
from tests.helpers import Smooth, convnet, labels, random, rng

pytestmark = [
    # One of them starts the ranks, for 20 s: among the first, all are in one of pytest-xdist's processes.
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

RANKS, STEPS = 2, 60
BACKENDS = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]  # in its interpreter
CONTROLLERS = {
    "full": AdaptiveLambda(100.0),
    "window": AdaptiveLambda(100.0, window=9),
    "ramp": AdaptiveLambda(100.0, ramp=5),
    "auto": AutoLambda(),
    "relative": AdaptiveLambda(100.0, rule="relative", threshold=2e-3),
}
BAD_STEPS = {7: (0, math.nan), 20: (1, math.inf), 21: (1, math.nan)}


def e_lins() -> list[list[float]]:
    """Step by step, rank by rank; some steps are bad on one rank only."""
    source = np.random.default_rng(0)
    values = (10 ** source.uniform(-5, -2, (STEPS, RANKS))).astype(np.float32).astype(float).tolist()
    for step, (rank, value) in BAD_STEPS.items():
        values[step][rank] = value
    return values  # type: ignore[no-any-return]


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(4, 6, seed=10 * step + rank), labels(4, 3, seed=step + rank)


# ---- Every forward mode under DDP and FSDP2, against one process

WRAPS = ("ddp", "fsdp")
WHOLE_STEPS, EPS = 8, 0.1
WHOLE_MODES: dict[str, dict[str, Any]] = {
    **{mode: {"forward": mode} for mode in FORWARDS},
    "light": {"skip_below": 1.0},  # no step is with the gradient of E_lin
    "relative": {"rule": {"rule": "relative", "threshold": 1e-4, "horizon": 2}},
}


def whole_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Large inputs, at which the model is saturated, until step 4; from then on small ones, and so E_lin jumps."""
    x = random(8, 6, seed=step, dtype=torch.float64) * (20 if step < 4 else 1)
    return x, labels(8, 3, seed=step)


def smooth() -> nn.Module:
    return Smooth(6, 3, gain=2.0).double()


def wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "ddp":
        return DistributedDataParallel(model)
    for layer in model.children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer)
    fully_shard(model)
    return model


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for grad in found if grad is not None]


def whole_steps(
    model: nn.Module, rank: int, ranks: int, options: dict[str, Any], gamma: float = 0.0
) -> list[dict[str, Any]]:
    """Step by step, lam and the gradients of a rank that has its part of each batch; with AWP of size gamma."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = dict(options)
    rule: dict[str, Any] = options.pop("rule", {})
    criterion: Any = ELLELoss(EPS, AdaptiveLambda(4000.0, min_history=1, **rule), generator=rng(0), **options)
    criterion = AWP(criterion, gamma) if gamma else criterion
    found = []
    for step in range(WHOLE_STEPS):
        x, target = (part.chunk(ranks)[rank] for part in whole_batch(step))
        optimizer.zero_grad()
        criterion(model, x, target).backward()
        numbers = {
            "lam": criterion.stats["lam"].item(),
            "mean": criterion.stats.get("relative_mean", torch.ones(())).item(),
        }
        found.append({**numbers, "grads": gradients(model)})
        optimizer.step()
    return found


# ---- Every mode under DDP and FSDP2, with batch norm

MODES: dict[str, dict[str, Any]] = {
    **{mode: {"forward": mode} for mode in FORWARDS},
    "skipping": {"skip_below": 0.5, "lagged": True},
    "fraction": {"triplet_fraction": 0.5},
}


def mode_steps(rank: int, wrap: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    model = wrapped(convnet(norm=True), wrap)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = ELLELoss(0.1, AdaptiveLambda(100.0, min_history=1), generator=rng(rank), **options)
    found = []
    for step in range(5):
        optimizer.zero_grad()
        loss = criterion(model, random(4, 3, 8, 8, seed=2 * step + rank), labels(4, 4, seed=2 * step + rank))
        loss.backward()
        optimizer.step()
        found.append({name: value.item() for name, value in criterion.stats.items()})
    return found


# ---- Training runs

RUN = (
    "--data mnist --model cnn --width 2 --method n-fgsm+elle-a --lam 100 --eps 0.1 --epochs 2 --batch-size 16 --seed 3"
)
RUN += " --augment --validation 16 --eval-attacks clean,pgd-2 --log-every 3 --checkpoint-every 5 --skip-below 0.01"
RUN += " --average 0.9 --device cpu"
EPOCH = 8  # steps


def run_arguments(folder: Path) -> list[str]:
    """Options of ``elle-fast train`` on 8 batches of images in three classes, told apart by their brightness."""
    source = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", EPOCH * 16 + 16), ("test", 24)):
        arrays[f"y_{split}"] = y = np.arange(count, dtype=np.uint8) % 3
        arrays[f"x_{split}"] = (source.integers(0, 60, (count, 8, 8)) + 80 * y[:, None, None]).astype(np.uint8)
    if not (images := folder / "images.npz").exists():
        np.savez(images, **arrays)
    return [*shlex.split(RUN), "--root", str(images)]


def config_of(folder: Path) -> TrainConfig:
    config: TrainConfig = cli.read_options("train", run_arguments(folder)).run
    return config


def runs(rank: int, folder: Path) -> dict[str, Any]:
    """A whole run; one that a signal to rank 1 interrupts, and that is resumed; one without noise; errors."""
    config, step = config_of(folder), training._Loop._step
    console = Console(file=io.StringIO())
    result = training.train(config, folder / "whole", console=console)
    found: dict[str, Any] = {"result": json.loads(json.dumps(result))}  # plain types
    found["said"] = console.file.getvalue()  # type: ignore[attr-defined]

    def interrupted(loop: Any, *args: Any) -> Any:
        if loop.run.step == 12 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, *args)

    training._Loop._step = interrupted  # type: ignore[assignment, method-assign]
    found["interrupted"] = error_of(training.train, config, folder / "resumed", console=console)
    training._Loop._step = step  # type: ignore[method-assign]
    training.train(config, folder / "resumed", resume=True, console=console)
    training.train(plain(config), folder / "plain", console=console)
    training.train(quirks(config), folder / "quirks", console=console)
    found["again"] = error_of(training.train, config, folder / "whole", console=console)
    found["batch"] = error_of(training.train, replace(config, batch_size=15), folder / "bad", console=console)
    found["sync"] = error_of(training.train, replace(config, sync_batchnorm=True), folder / "bad", console=console)
    return found


def killed(rank: int, folder: Path) -> dict[str, Any]:
    """``elle-fast train``, as torchrun starts it; rank 1 is killed in the seventh step, after a checkpoint."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    # A file, as a port that is free now may not be free when it is used.
    address = f"file://{folder}/second rendezvous"
    dist.init_process_group = partial(dist.init_process_group, init_method=address, rank=rank, world_size=RANKS)
    step, began = training._Loop._step, 0.0

    def last(loop: Any, *args: Any) -> Any:
        nonlocal began
        if loop.run.step == 6:
            began = time.monotonic()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(loop, *args)

    training._Loop._step = last  # type: ignore[assignment, method-assign]
    with redirect_stderr(io.StringIO()) as said:
        status = cli.main([*train_killed(folder), "--timeout", "20"])
    return {"status": status, "said": said.getvalue(), "seconds": time.monotonic() - began}


def train_killed(folder: Path) -> list[str]:
    return ["train", *run_arguments(folder), "--out", str(folder / "killed")]


def plain(config: TrainConfig) -> TrainConfig:
    """No batch norm, no noise, and no signs, which a rounding can turn: the weights depend on the batches alone."""
    return replace(config, model="mlp", width=8, method="fgsm", eps=0.0, lam=None, skip_below=None)


def quirks(config: TrainConfig) -> TrainConfig:
    """What the ELLE authors' trainer does; the last of 7 batches has 8 images, 4 for each rank."""
    more: dict[str, Any] = {
        "drop_last": False,
        "batch_size": 20,
        "steps_per_batch": 2,
        "momentum_cycle": 0.1,
        "clean_forward": True,
    }
    return replace(plain(config), **more, decay="weights", eps_warmup=1.0)


def patience(rank: int) -> list[tuple[str, str]]:
    """What waiting ends with for rank 1, if the other takes longer than the timeout."""
    with closing(Ranks(timeout=1.0)) as ranks:
        waits = [error_of(ranks.on_main, lambda: time.sleep(1.5), patient=True)]
        # The first takes no part in the second.
        waits += [error_of(ranks.any, True)] if rank == 1 else []
    return waits


def error_of(call: Any, *args: Any, **options: Any) -> tuple[str, str]:
    try:
        call(*args, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # As tests/conftest.py and tests/recipes/conftest.py do in their own process: no waits for the disk, no pictures.
    os.fsync = lambda fd: None
    ending.plot_curves = lambda *args, **options: None  # type: ignore[attr-defined]
    # A rank that fails leaves the other waiting.
    timeout = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timeout
    )
    controllers_and_losses(rank, folder)
    more: dict[str, Any] = {"patience": patience(rank)}
    for wrap in WRAPS:
        for name, options in WHOLE_MODES.items():
            more[f"{wrap} whole {name}"] = whole_steps(wrapped(smooth(), wrap), rank, RANKS, options)
            if wrap == "ddp":
                more[f"awp whole {name}"] = whole_steps(wrapped(smooth(), wrap), rank, RANKS, options, gamma=0.05)
        for name, options in MODES.items():
            try:
                more[f"{wrap} {name}"] = mode_steps(rank, wrap, options)
            except RuntimeError:
                more[f"{wrap} {name}"] = traceback.format_exc()
            dist.barrier()
    groups = len(dist.distributed_c10d._world.pg_map)
    more["runs"] = runs(rank, Path(folder))
    more["left over"] = len(dist.distributed_c10d._world.pg_map) - groups
    torch.save(more, Path(folder) / f"more{rank}.pt")
    dist.destroy_process_group()
    torch.save(killed(rank, Path(folder)), Path(folder) / "survivor.pt")


def controllers_and_losses(rank: int, folder: str) -> None:
    controllers = {name: copy.deepcopy(controller) for name, controller in CONTROLLERS.items()}
    alone = AdaptiveLambda(100.0, process_group=[dist.new_group([r]) for r in range(RANKS)][rank])
    found: dict[str, list[Any]] = {name: [] for name in [*controllers, "alone", *BACKENDS]}
    for values in e_lins():
        e_lin = torch.tensor(values[rank])
        for name, controller in controllers.items():
            found[name].append(controller.update(e_lin).item())
        found["alone"].append(alone.update(e_lin).item())
        assert torch.equal(e_lin, torch.tensor(values[rank])) or e_lin.isnan()  # the reduction is of a copy
    found["state"] = [{n: t.item() for n, t in controllers["full"].state_dict().items()}]
    model = Smooth(6, 3, gain=8.0)
    for backend in BACKENDS:
        criterion = ELLELoss(0.1, AdaptiveLambda(4000.0, min_history=1), generator=rng(rank), backend=backend)
        for step in range(8):
            # From step 4 on the logits are ten times as large, and so E_lin jumps.
            gain = 1 if step < 4 else 10
            criterion(lambda x, gain=gain: gain * model(x), *batch(step, rank)).backward()
            found[backend].append({name: value.item() for name, value in criterion.stats.items()})
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks left what they found; they are started once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_arguments(folder)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        context = mp.spawn(  # type: ignore[attr-defined]
            worker, args=(str(folder),), nprocs=RANKS, join=False
        )
        for process in reversed(context.processes):
            process.join()
        if [process.exitcode for process in context.processes] != [0, -signal.SIGKILL]:
            context.join()  # raises what a rank did
            pytest.fail("rank 1 was not killed")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, list[Any]]]:
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def more(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"more{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_every_rank_has_the_lam_of_the_mean(found, name):
    assert found[0][name] == found[1][name]
    single = copy.deepcopy(CONTROLLERS[name])
    # The sum of two float32 numbers, halved, is exact in float64 here, so this is to the last bit.
    expected = [single.update(torch.tensor(sum(values) / 2, dtype=torch.float64)).item() for values in e_lins()]
    assert found[0][name] == expected
    assert max(expected) == 100.0 or (name == "auto" and len(set(expected)) > 20)


def test_a_bad_value_on_one_rank_is_skipped_on_both(found):
    for rank in range(RANKS):
        (state,) = found[rank]["state"]
        assert state["skipped"] == len(BAD_STEPS)
        assert state["count"] == STEPS - len(BAD_STEPS)
        means = [sum(values) / RANKS for step, values in enumerate(e_lins()) if step not in BAD_STEPS]
        # Some 60 roundings of Welford's.
        assert state["mean"] == pytest.approx(np.mean(means), rel=60 * 4 * 2.0**-53)


def test_a_process_group_of_ones_own(found):
    """Groups of one rank each: every rank has its own lam."""
    for rank in range(RANKS):
        single = AdaptiveLambda(100.0)
        assert found[rank]["alone"] == [single.update(torch.tensor(v[rank])).item() for v in e_lins()]
    assert found[0]["alone"] != found[1]["alone"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_loss_has_the_same_lam_on_every_rank(found, backend):
    first, second = (found[rank][backend] for rank in range(RANKS))
    assert [stats["lam"] for stats in first] == [stats["lam"] for stats in second]
    assert max(stats["lam"] for stats in first) == 4000.0
    # E_lin in the loss and the stats stays the rank's own: gradients are averaged elsewhere, by DDP.
    assert all(a["e_lin"] != b["e_lin"] for a, b in zip(first, second, strict=True))
    for own in (first, second):
        for stats in own:
            # Two roundings in float32.
            assert stats["loss"] == pytest.approx(stats["ce"] + stats["lam"] * stats["e_lin"], rel=1e-6)
    # The same points and weights; lam is that of the same steps, and E_lin agrees to float32's roundings.
    for own, reference in zip((first, second), (found[rank]["reference"] for rank in range(RANKS)), strict=True):
        assert [stats["lam"] for stats in own] == [stats["lam"] for stats in reference]


@pytest.mark.parametrize("name", WHOLE_MODES)
@pytest.mark.parametrize("wrap", [*WRAPS, "awp"])
def test_gradients_are_those_of_one_process_with_the_whole_batch(more, wrap, name):
    expected = whole_steps(smooth(), 0, 1, WHOLE_MODES[name], gamma=0.05 if wrap == "awp" else 0.0)
    for rank in range(RANKS):
        for own, whole in zip(more[rank][f"{wrap} whole {name}"], expected, strict=True):
            assert own["lam"] == whole["lam"]
            assert own["mean"] == pytest.approx(whole["mean"], rel=1e-9)  # of all samples, not the mean over the ranks
            assert len(own["grads"]) == len(whole["grads"]) == 4
            for grad, other in zip(own["grads"], whole["grads"], strict=True):
                # Float64 roundings; up to three digits cancel in the residual, and momentum adds up eight steps.
                torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-12)
    lams = [step["lam"] for step in expected]
    assert min(lams) == 0
    assert max(lams) == 4000.0


@pytest.mark.parametrize("name", MODES)
def test_every_mode_runs_under_ddp_and_fsdp_with_batch_norm(more, name):
    for rank in range(RANKS):
        for wrap in WRAPS:
            steps = more[rank][f"{wrap} {name}"]
            assert not isinstance(steps, str), steps
            assert all(math.isfinite(value) for step in steps for value in step.values())
            assert [step["lam"] for step in steps] == [step["lam"] for step in more[0][f"ddp {name}"]]
        # The same computation, but for the order of sums; a sign of the attack's gradient may turn on a rounding.
        for one, other in zip(more[rank][f"ddp {name}"], more[rank][f"fsdp {name}"], strict=True):
            assert one["ce"] == pytest.approx(other["ce"], rel=1e-3)
    if name == "skipping":
        last = more[0]["ddp skipping"][-1]
        assert last["full_steps"] > 0
        assert last["light_steps"] > 0
        assert last["full_steps"] + last["light_steps"] == 5


# ---- Training runs


def test_only_an_evaluation_is_waited_for_longer_than_the_timeout(more):
    (evaluated, waited) = more[1]["patience"]
    assert evaluated == ("no error", "")
    assert waited[0] == "RuntimeError"


def test_runs_leave_no_process_group_behind(more):
    assert [more[rank]["left over"] for rank in range(RANKS)] == [0, 0]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, optimiser, lam, history and every rank's generator agree to the bit; so do the logs."""
    one, two = checkpoint.load(folder / CHECKPOINT), checkpoint.load(other / CHECKPOINT)
    for part in ("model", "average", "criterion"):
        assert all(torch.equal(value, two[part][name]) for name, value in one[part].items())
    for name, state in one["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], two["optimizer"]["state"][name]["momentum_buffer"])
    generators = [[s["rng"]["cpu"] for s in (state, *state["other_ranks"])] for state in (one, two)]
    assert len(generators[0]) == len(generators[1]) == RANKS
    assert all(torch.equal(a, b) for a, b in zip(*generators, strict=True))
    assert not torch.equal(*generators[0])  # noise of its own for each rank
    assert one["step"] == two["step"] == 2 * EPOCH
    assert one["step_counts"] == two["step_counts"]
    assert rows(folder / "steps.csv") == rows(other / "steps.csv")
    for a, b in zip(one["history"]["epochs"], two["history"]["epochs"], strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_run_on_two_ranks_is_written_by_the_first_and_known_to_both(more, folder):
    first, second = (more[rank]["runs"] for rank in range(RANKS))
    assert first["result"]["accuracy"] == second["result"]["accuracy"]
    assert first["result"] == json.loads((folder / "whole" / RESULT).read_text())
    assert first["result"]["processes"] == RANKS
    assert first["said"].count("epoch 2/2") == 1
    assert second["said"] == ""
    assert len(list((folder / "whole" / "tensorboard").iterdir())) == 1
    assert first["result"]["full_steps"] + first["result"]["light_steps"] == 2 * EPOCH


@pytest.mark.parametrize("kind", [plain, quirks])
def test_two_ranks_train_as_one_process_does(kind, folder, tmp_path):
    training.train(kind(config_of(folder)), tmp_path, console=Console(file=io.StringIO()))
    one, two = checkpoint.load(tmp_path / CHECKPOINT), checkpoint.load(folder / kind.__name__ / CHECKPOINT)
    for name, value in one["model"].items():
        # Roundings of float32 over sixteen steps, of weights up to one.
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5)
    first, last = (one["history"]["steps"][place]["loss"] for place in (0, -1))
    assert last < 0.9 * first  # the weights have moved
    for group in ("steps", "epochs"):
        for alone_row, row in zip(one["history"][group], two["history"][group], strict=True):
            assert row.keys() == alone_row.keys()
            for key in row.keys() - {"seconds"}:
                assert row[key] == pytest.approx(alone_row[key], rel=1e-3, abs=1e-9), key


def test_an_interrupt_of_one_rank_stops_both_after_the_same_step_and_is_resumed(more, folder):
    for rank in range(RANKS):
        kind, message = more[rank]["runs"]["interrupted"]
        assert kind == "InterruptedRunError"
        assert "stopped after step 14 of 16" in message  # the signal came in step 13; there is no row of the log
    assert_same_run(folder / "whole", folder / "resumed")


def test_what_is_refused_is_refused_on_both_ranks(more, folder):
    for rank in range(RANKS):
        kind, message = more[rank]["runs"]["again"]
        assert kind == "FileExistsError"
        assert "holds a run" in message
        kind, message = more[rank]["runs"]["batch"]
        assert kind == "ValueError"
        assert "batch_size: expected batches that 2 processes can share equally, got 15 samples" in message
        kind, message = more[rank]["runs"]["sync"]
        assert kind == "ValueError"
        assert "sync_batchnorm: expected False on the CPU" in message
    assert not (folder / "bad").exists()


def test_a_run_of_two_ranks_is_not_resumed_by_one(folder):
    with pytest.raises(ValueError, match=r"checkpoint: expected one of 1 processes, got .* of 2"):
        training.train(config_of(folder), folder / "whole", resume=True, console=Console(file=io.StringIO()))


def test_a_killed_rank_ends_the_other_in_bounded_time_and_torchrun_resumes_the_run(folder):
    survivor = torch.load(folder / "survivor.pt")
    assert survivor["status"] == 1, survivor["said"]
    assert "elle-fast train (rank 0): rank 1 of 2 is gone; start all of them again with --resume (" in survivor["said"]
    # At most the timeout, on a busy machine.
    assert 0 < survivor["seconds"] < 20 + 20
    out = folder / "killed"
    assert checkpoint.load(out / CHECKPOINT)["step"] == 5
    assert not (out / RESULT).exists()

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "elle_fast", *train_killed(folder), "--resume"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picture ") == 1
    assert done.stderr.count("epoch 2/2") == 1
    assert_same_run(folder / "whole", out)
