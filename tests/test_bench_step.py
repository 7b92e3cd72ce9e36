"""bench_step.py on tiny sizes: what it counts is right, and what it writes is whole; no time is looked at."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_step, step_counters, step_report
from benchmarks.step_methods import METHODS, AuthorsList, Setting, Step, Trainer, elle_a

# One of each kind of row.
CHOSEN = ["authors", "elle-a", "elle-a-checkpoint", "elle-a-skip-light", "elle-a-skip-full", "gradalign"]
ROWS = ["fgsm", *CHOSEN]
# Model passes (PAPER section 7): FGSM's 2 of the attack and 3 at its point; each further point 3, without a graph 1,
# recomputed 4; a quarter of the batch a quarter; PGD's 2 a step.
UNITS = {
    "plain": 3.0,
    "fgsm": 5.0,
    "n-fgsm": 5.0,
    "authors": 16.0,
    "elle-a": 14.0,
    "elle-a-split": 14.0,
    "elle-a-checkpoint": 18.0,
    "elle-a-lagged": 14.0,
    "elle-a-skip-light": 8.0,
    "elle-a-skip-full": 14.0,
    "elle-a-quarter": 7.25,
    "elle-a-all-light": 5.75,
    "elle-a-all-full": 7.25,
    "elle-2p": 11.0,
    "pgd-10": 23.0,
}
DOUBLE_BACKWARD = {"gradalign", "cure", "llr"}


def trainer(dtype: str = "fp32", channels_last: bool = False) -> Trainer:
    return Trainer(Setting("cnn", 2, 4, dtype, torch.device("cpu"), channels_last))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files and what was printed."""
    out = tmp_path_factory.mktemp("bench_step") / "bench_step.json"
    arguments = ["--smoke", "--width", "2", "--batch", "4", "--batches", "2", "--methods", ",".join(CHOSEN)]
    assert bench_step.main([*arguments, "--out", str(out)]) == 0
    return out


def content_of(out: Any) -> Any:
    return json.loads(out.read_text())


# ---- The whole run


def test_the_file_says_what_was_measured_and_on_what(smoke):
    content = content_of(smoke)
    assert {"machine", "versions", "commit", "command", "about", "setting", "load_before", "seconds"} <= content.keys()
    assert content["smoke"]
    assert "no time in it is a measurement" in content["note"]
    assert content["command"].startswith("python benchmarks/bench_step.py --smoke")
    assert content["command"].endswith("--out bench_step.json")
    assert str(smoke.parent) not in smoke.read_text()
    assert content["setting"] == {
        "model": "cnn",
        "width": 2,
        "batch": 4,
        "dtype": "fp32",
        "channels_last": False,
        "rounds": 2,
        "device": "cpu",
    }
    assert smoke.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_every_number(smoke):
    content = content_of(smoke)
    assert list(content["methods"]) == ROWS
    for name, row in content["methods"].items():
        assert row["about"] == METHODS[name].about
        assert row["ms"]["q1"] <= row["ms"]["median"] <= row["ms"]["q3"]
        assert row["ms"]["rounds"] == 2
        assert row["launches"] is None
        assert row["operators"] > 50
        assert row["flop_units"] < row["units"]
    assert {row["ratio"] for name, row in content["methods"].items() if name == "fgsm"} == {1.0}
    assert list(content["batches"]) == ["2", "4"]
    swept = ["fgsm", "authors", "elle-a", "gradalign"]
    assert all(list(rows) == swept for rows in content["batches"].values())
    assert list(content["history"]) == ["1", "100"]
    assert all(set(sides) == {"AdaptiveLambda", "authors"} for sides in content["history"].values())
    assert content["mixes"].keys() == {"elle-a-skip"}


def test_syncs_and_memory_of_a_step(smoke):
    rows = content_of(smoke)["methods"]
    syncs = {name: row["host_syncs"] for name, row in rows.items() if name != "elle-a-checkpoint"}
    # Of the authors' step: E_lin, the loss, its first term, and two counts of correct predictions.
    expected = {"fgsm": 0, "authors": 5, "elle-a": 0, "elle-a-skip-light": 1, "elle-a-skip-full": 1, "gradalign": 0}
    assert syncs == expected
    peaks = {name: row["peak_ratio"] for name, row in rows.items()}
    assert peaks["elle-a"] > peaks["elle-a-skip-light"] > peaks["elle-a-checkpoint"]
    assert peaks["authors"] > 2


def test_the_tables_hold_every_row(smoke):
    content = content_of(smoke)
    text = step_report.tables(content)
    lines = text.splitlines()
    assert lines[0].startswith("cnn, batch 4, fp32, ")
    assert lines[2].startswith("| method | ms | quartiles | x FGSM | units |")
    for name in ROWS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == (2 if name in step_report.SWEPT else 1)
    (line,) = (line for line in lines if line.startswith("| elle-a |") and line.endswith("| 0 |"))
    assert "| 14.00 |" in line
    assert "elle-a-skip: light " in text
    assert "units of elle-a: 14.0, target 14: met" in lines
    assert "lam's state after the most steps over the fewest: None, target 1: not measured" in lines
    assert "host syncs with skip_below: 1, target 1: met" in lines
    assert lines[-1] == content["note"]


# ---- What is counted


@pytest.mark.parametrize("name", METHODS)
def test_model_passes(name):
    tiny = trainer()
    step = METHODS[name].make(tiny)
    losses = [step.call() for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    once, paper, real = (step_counters.OpCounter(tiny.device) for _ in range(3))
    with torch.no_grad(), once:
        tiny.model(tiny.x)
    with step_counters.differentiable_inputs(tiny.model), paper:
        step.call()
    with real:
        step.call()
    step.check()
    units = paper.flops / once.flops
    if name in DOUBLE_BACKWARD:
        # More than a step without it: FGSM's 5, and at the second point a forward and a data gradient.
        assert units > 7
        return
    assert units == UNITS[name]
    # Without the first layer's data gradient in each backward pass of the weights but the authors' attack's.
    layer = tiny.model.get_submodule("conv1")
    first = step_counters.OpCounter(tiny.device)
    with torch.no_grad(), first:
        layer(tiny.x)
    points = {"plain": 1, "fgsm": 1, "authors": 4, "elle-a": 4, "elle-a-skip-light": 1, "elle-2p": 3}
    if name in points:
        assert paper.flops - real.flops == points[name] * first.flops


def test_peak_memory_is_that_of_tensors_alive_together():
    tiny = trainer()
    megabyte = 1 << 18

    def call() -> None:
        one = torch.empty(megabyte)
        two = torch.empty(megabyte)
        del one
        three = torch.empty(megabyte // 2)
        del two, three

    tiny.step(lambda model, x, y: model(x).sum())
    held = sum(each.nbytes for each in (*tiny.model.parameters(), *tiny.model.buffers(), tiny.x, tiny.y))
    held += sum(each.nbytes for each in tiny.model.parameters())  # momentum
    assert step_counters.counts(call, tiny)["peak_bytes"] == held + 2 * 4 * megabyte


def test_host_syncs_are_seen():
    x = torch.rand(4)
    calls = (x.sum().item, lambda: bool(x.any()), x.nonzero, lambda: x[x > 0.5], lambda: torch.equal(x, x))
    for call in calls:
        counter = step_counters.OpCounter(x.device)
        with counter:
            call()
        assert counter.host_syncs == 1
    with counter:
        x[torch.tensor([1])] + x.to(torch.float64).sum()
    assert counter.host_syncs == 1


@pytest.mark.parametrize("dtype,channels_last", [("bf16", True), ("fp16", False)])
def test_dtype_and_memory_format_reach_the_model(dtype, channels_last):
    tiny = trainer(dtype=dtype, channels_last=channels_last)
    seen: list[tuple[torch.dtype, bool]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        contiguous = args[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((output.dtype, contiguous))

    tiny.model.get_submodule("conv1").register_forward_hook(look)
    for name in ("authors", "elle-a"):
        assert METHODS[name].make(tiny).call().isfinite()
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert len(seen) == 4 + 2
    assert set(seen) == {(wanted, channels_last)}


def test_a_step_changes_no_weight():
    tiny = trainer()
    before = copy.deepcopy(dict(tiny.model.named_parameters()))
    METHODS["elle-a"].make(tiny).call()
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.named_parameters())


# ---- What must not pass


def test_a_full_step_that_was_a_light_one_is_an_error():
    step = elle_a(skip_below=1.0)(trainer())  # lam_max is light too
    step.call()
    with pytest.raises(AssertionError, match="expected full_steps only"):
        step.check()


def test_a_loss_that_is_not_finite_is_an_error(monkeypatch):
    broken = Step(lambda: torch.tensor(float("nan")), lambda: None)
    monkeypatch.setitem(METHODS, "plain", type(METHODS["plain"])("broken", lambda trainer: broken))
    with pytest.raises(AssertionError, match="plain: expected a finite loss"):
        bench_step.steps(trainer(), ["plain", "fgsm"], 2, counted=False)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--methods", "elle-a,pgd-20"], "expected some of plain, fgsm"),
        (["--rounds", "1"], "expected an integer >= 2, got '1'"),
        (["--batches", "32,none"], "expected an integer >= 1, got 'none'"),
        (["--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_step.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


# ---- Arithmetic


def test_the_authors_list_detects_with_its_lag():
    rule = AuthorsList(0)
    seen = []
    for e_lin in (1.0, 1.0, 1.0, 1.5, 1.0):
        rule.update(torch.tensor(e_lin))
        seen.append(rule.lam)
    assert seen[2] == pytest.approx(4000 * 0.99**3)
    assert seen[3] == 4000
    assert rule.history == [1.0, 1.0, 1.0, 1.5, 1.0]
    assert rule.logged == pytest.approx((1.1, 0.2))


def test_the_mix_of_steps_has_the_price():
    share = step_report.full_share(1.1, 2.6, 1.25)
    assert share is not None
    assert share == pytest.approx(0.1)
    assert (1 - share) * 1.1 + share * 2.6 == pytest.approx(1.25)
    assert step_report.full_share(1.3, 2.6, 1.25) is None
    assert step_report.full_share(1.1, 1.2, 1.25) == 1
    rows = {"elle-a-skip-light": {"ratio": 1.3}, "elle-a-skip-full": {"ratio": 2.6}}
    found = step_report.mixes(rows)
    assert found == {
        "elle-a-skip": {
            "light_ratio": 1.3,
            "full_ratio": 2.6,
            "full_share_at_price": {"1.25": None, "1.4": pytest.approx(0.077)},
        }
    }


def test_targets_are_judged():
    rows: Any = {"elle-a": {"units": 14.5, "host_syncs": 1}, "authors": {"units": 15.9}}
    rows["elle-a-checkpoint"] = {"peak_ratio": 1.21}
    history = {str(length): {"AdaptiveLambda": {"median_us": us}} for length, us in ((1, 20.0), (100_000, 22.0))}
    judged = step_report.targets(rows, history, smoke=False)
    assert [row["met"] for row in judged] == [False, False, False, False, False, None]
    rows = {"elle-a": {"units": 14.0, "host_syncs": 0}, "authors": {"units": 16.4}}
    rows |= {"elle-a-checkpoint": {"peak_ratio": 1.2}, "elle-a-skip-light": {"host_syncs": 1}}
    history["100000"]["AdaptiveLambda"]["median_us"] = 20.8
    assert all(row["met"] for row in step_report.targets(rows, history, smoke=False))
