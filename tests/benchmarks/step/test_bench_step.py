"""bench_step.py on tiny sizes: what it counts is right, and what it writes is whole; no time is looked at."""

from __future__ import annotations

import copy
import json
import shlex
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.paper.settings import SETTINGS
from benchmarks.step import bench_step, counters, step_tables
from benchmarks.step.authors import AuthorsList
from benchmarks.step.compared import METHODS, Method, Setting, Step, Trainer, elle_a, ordinary
from elle_fast import methods
from elle_fast.presets import FAST
from elle_fast.testing import OpCounter, differentiable_inputs

# One of each kind of row.
CHOSEN = ["gradalign", "authors", "elle-a", "elle-a-checkpoint", "elle-a-skip-light", "elle-a-skip-full"]
ROWS = ["fgsm", *CHOSEN]
# Model passes (PAPER section 7): FGSM's 2 of the attack and 3 at its point; each further point 3, without a graph 1,
# recomputed 4; a quarter of the batch a quarter; PGD's 2 a step.
# For all methods of the recipes their own table's number, which their tests count in another way.
UNITS = {
    **{name: methods.TABLE[name].units for name in METHODS if name in methods.NAMES},
    "plain": 3.0,
    "authors": 16.0,
    "elle-a": 14.0,
    "elle-a-split": 14.0,
    "elle-a-checkpoint": 18.0,
    "elle-a-lagged": 14.0,
    "elle-a-skip-light": 8.0,
    "elle-a-skip-full": 14.0,
    "elle-a-quarter": 7.25,
    "elle-a-eighth": 6.125,
    "elle-a-fast-light": 5.375,
    "elle-a-fast-full": 6.125,
}
# Those with double backpropagation, and their forward passes: one for each point at which the loss is taken.
FORWARDS = {"gradalign": 3, "cure": 3, "cure-fgsm": 2, "llr": 4, "fast-bat": 3}


def trainer(dtype: str = "fp32", channels_last: bool = False, batch: int = 4) -> Trainer:
    return Trainer(Setting("cnn", 2, batch, dtype, torch.device("cpu"), channels_last))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files and what was printed."""
    out = tmp_path_factory.mktemp("bench_step") / "bench_step.json"
    benchmark = torch.backends.cudnn.benchmark
    assert bench_step.main(["--smoke", "--method", ",".join(CHOSEN), f"--out={out}"]) == 0
    assert torch.backends.cudnn.benchmark == benchmark
    return out


def content_of(out: Any) -> Any:
    return json.loads(out.read_text())


# ---- The whole run


def test_the_file_says_what_was_measured_and_on_what(smoke):
    content = content_of(smoke)
    assert {"machine", "versions", "commit", "command", "about", "setting", "load_before", "seconds"} <= content.keys()
    assert content["smoke"]
    assert "no number in it is a measurement" in content["note"]
    assert content["command"].startswith("python -m benchmarks.step.bench_step --smoke --model=cnn --width=2 ")
    assert content["command"].endswith(" --out=bench_step.json")
    again = vars(bench_step._parser().parse_args(shlex.split(content["command"])[3:]))
    assert again["methods"] == tuple(CHOSEN)
    assert {name: again[name] for name in ("batch", "rounds", "batches", "history")} == {
        "batch": 4,
        "rounds": 2,
        "batches": (2,),
        "history": (1, 100),
    }
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
    assert smoke.with_suffix(".svg").read_bytes().startswith(b"<?xml")


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
        assert row["forward_ms"] > 0 < row["backward_ms"]
    assert {row["ratio"] for name, row in content["methods"].items() if name == "fgsm"} == {1.0}
    assert list(content["batches"]) == ["2", "4"]
    swept = ["fgsm", "gradalign", "authors", "elle-a"]
    assert all(list(rows) == swept for rows in content["batches"].values())
    assert list(content["history"]) == ["1", "100"]
    assert all(set(sides) == {"AdaptiveLambda", "authors"} for sides in content["history"].values())
    assert content["mixes"].keys() == {"elle-a-skip"}


def test_a_step_is_split_into_its_loss_and_its_backward_pass(monkeypatch):
    monkeypatch.setattr(bench_step, "BASE", "slow")
    clock = [0.0]

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            clock[0] += 0.03
            return value.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            clock[0] += 0.06
            return grad

    def criterion(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = Slow.apply(model(x).sum())
        return loss

    monkeypatch.setattr(Trainer, "_mark", lambda self: clock[0])
    monkeypatch.setitem(METHODS, "slow", Method("by its own clock", ordinary(lambda: criterion)))
    row = bench_step.steps(trainer(), ["slow"], 3, counted=False)["slow"]
    assert (row["forward_ms"], row["backward_ms"]) == (30, 60)


def test_syncs_and_memory_of_a_step(smoke):
    rows = content_of(smoke)["methods"]
    syncs = {name: row["host_syncs"] for name, row in rows.items() if name != "elle-a-checkpoint"}
    # Of the authors' step: the loss, E_lin, and two counts of correct predictions.
    expected = {"fgsm": 0, "authors": 4, "elle-a": 0, "elle-a-skip-light": 1, "elle-a-skip-full": 1, "gradalign": 0}
    assert syncs == expected
    peaks = {name: row["peak_ratio"] for name, row in rows.items()}
    assert peaks["elle-a"] > peaks["elle-a-skip-light"] > peaks["elle-a-checkpoint"]
    assert peaks["authors"] > 2


def test_the_tables_hold_every_row(smoke):
    content = content_of(smoke)
    text = step_tables.tables(content)
    lines = text.splitlines()
    assert lines[0].startswith("cnn, batch 4, fp32, ")
    assert lines[2].startswith("| method | ms | quartiles | loss | backward | x FGSM | units |")
    for name in ROWS:
        assert sum(line.startswith(f"| {name} |") for line in lines) == (2 if name in step_tables.SWEPT else 1)
    (line,) = (line for line in lines if line.startswith("| elle-a |") and line.endswith("| 0 |"))
    assert "| 14.00 |" in line
    assert "elle-a-skip: light " in text
    assert "units of elle-a: 14.0, target 14: met" in lines
    assert "lam's state after the most steps over the fewest: None, target 1: not measured" in lines
    assert "host syncs with skip_below: 1, target 1: met" in lines
    assert lines[-1] == content["note"]


# ---- What is counted


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.on_cuda])
def test_model_passes(name):
    tiny = trainer(batch=8)  # an eighth of which is a sample
    step = METHODS[name].make(tiny)
    losses = [step.call() for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    once, paper, real = (OpCounter(tiny.device) for _ in range(3))
    with torch.no_grad(), once:
        tiny.model(tiny.x)
    with differentiable_inputs(tiny.model), paper:
        step.call()
    samples: list[int] = []
    tiny.model.register_forward_hook(lambda module, args, output: samples.append(len(args[0])))
    with real:
        step.call()
    step.check()
    units = paper.flops / once.flops
    if name in FORWARDS:
        assert samples == FORWARDS[name] * [8]
        # More than a step without it: FGSM's 5, and at another point a forward pass and a data gradient.
        assert units > 7
        return
    # The nuclear norm has a product of its own, of two logits by classes; FUAP has two layers of its own, as large as
    # so small a model's.
    own = {"nuat": 0.01, "fuap": 0.6}
    assert units == pytest.approx(UNITS[name], abs=own.get(name, 0), rel=0)
    # Without the first layer's data gradient in each backward pass of the weights but the authors' at x and x_adv.
    layer = tiny.model.get_submodule("0")
    first = OpCounter(tiny.device)
    with torch.no_grad(), first:
        layer(tiny.x)
    points = {"plain": 1, "fgsm": 1, "authors": 3, "elle-a": 4, "elle-a-skip-light": 1, "elle-2p": 3}
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

    tiny.step(lambda model, x, y: model(x).sum())()
    held = sum(each.nbytes for each in (*tiny.model.parameters(), *tiny.model.buffers(), tiny.x, tiny.y))
    held += sum(each.nbytes for each in tiny.model.parameters())  # momentum
    assert counters.counts(call, tiny)["peak_bytes"] == held + 2 * 4 * megabyte


@pytest.mark.gpu
def test_peak_memory_on_a_gpu_is_above_what_others_hold():
    held = torch.empty(1 << 22, device="cuda")
    tiny = Trainer(Setting("cnn", 2, 4, "fp32", torch.device("cuda"), channels_last=False))
    assert counters._peak_cuda(lambda: torch.empty(1 << 20, device="cuda"), tiny) == 4 << 20
    del held


@pytest.mark.parametrize("dtype,channels_last", [("bf16", True), ("fp16", False)])
def test_dtype_and_memory_format_reach_the_model(dtype, channels_last):
    tiny = trainer(dtype=dtype, channels_last=channels_last)
    seen: list[tuple[torch.dtype, bool]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        contiguous = args[0].is_contiguous(memory_format=torch.channels_last)
        seen.append((output.dtype, contiguous))

    tiny.model.get_submodule("0").register_forward_hook(look)
    for name in ("authors", "elle-a"):
        assert METHODS[name].make(tiny).call().isfinite()
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert len(seen) == 4 + 2
    assert set(seen) == {(wanted, channels_last)}


def test_the_authors_step_in_float32_has_no_tf32():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        tiny, seen = trainer("bf16"), set()

        def look(value: torch.Tensor) -> None:
            seen.add((matmul.allow_tf32, cudnn.allow_tf32, value.dtype))

        def forward(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            look(output)
            if output.requires_grad:
                output.register_hook(look)

        tiny.model.get_submodule("0").register_forward_hook(forward)
        assert METHODS["authors-fp32"].make(tiny).call().isfinite()
        assert seen == {(False, False, torch.float32)}
        assert matmul.allow_tf32
        assert cudnn.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


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


def stub(monkeypatch: pytest.MonkeyPatch, name: str, call: Any, on_cuda: bool = False) -> None:
    method = Method("a stub", lambda trainer: Step(lambda: call(trainer), lambda: None), on_cuda)
    monkeypatch.setitem(METHODS, name, method)


def test_a_loss_or_a_weight_that_stops_being_finite_is_an_error(monkeypatch):
    taken: list[float] = []

    def loss(tiny: Trainer) -> torch.Tensor:
        taken.append(1.0)
        return torch.tensor(float("nan") if len(taken) > 2 else 1.0)

    def weight(tiny: Trainer) -> torch.Tensor:
        next(tiny.model.parameters()).data.fill_(float("inf"))
        return torch.tensor(1.0)

    stub(monkeypatch, "fgsm", lambda tiny: torch.tensor(1.0))
    stub(monkeypatch, "plain", loss)
    with pytest.raises(AssertionError, match="plain: expected a finite loss in the last round"):
        bench_step.steps(trainer(), ["plain", "fgsm"], 2, counted=False)
    stub(monkeypatch, "plain", weight)
    with pytest.raises(AssertionError, match="expected finite weights after the rounds"):
        bench_step.steps(trainer(), ["plain", "fgsm"], 2, counted=False)


def test_a_graph_is_made_after_everything_is_counted(monkeypatch):
    order: list[str] = []

    def one(tiny: Trainer) -> torch.Tensor:
        order.append("step of a graph")
        return torch.tensor(1.0)

    def counts(call: Any, tiny: Trainer) -> dict[str, Any]:
        order.append("counted")
        return {"peak_bytes": 1}

    stub(monkeypatch, "plain", one, on_cuda=True)
    stub(monkeypatch, "fgsm", lambda tiny: torch.tensor(1.0))
    monkeypatch.setattr(counters, "counts", counts)
    rows = bench_step.steps(trainer(), ["plain", "fgsm"], 2, counted=True)
    assert order[:2] == ["counted", "step of a graph"]
    assert order.count("counted") == 1
    assert "peak_ratio" not in rows["plain"]


def test_the_methods_that_need_a_gpu_are_left_out_aloud(monkeypatch, tmp_path, capsys):
    names = ("fgsm", "authors", "authors-fp32", "passes-captured")
    monkeypatch.setattr(bench_step, "METHODS", {name: METHODS[name] for name in names})
    out = tmp_path / "out.json"
    assert bench_step.main(["--smoke", "--out", str(out)]) == 0
    assert list(content_of(out)["methods"]) == ["fgsm", "authors"]
    assert "left out on cpu: authors-fp32, passes-captured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--methods", "elle-a,pgd-20"], "expected some of plain, fgsm"),
        (["--methods", "elle-a-captured"], "methods: expected some that run on cpu, got elle-a-captured"),
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


def test_the_fast_rows_are_a_combination_that_is_trained():
    assert {"method": "elle-a", **FAST} in SETTINGS["cifar10-jpeg-levers"].variants.values()


def test_the_authors_list_detects_with_its_lag():
    rule = AuthorsList(4000.0)
    rule.lam = 4000.0
    seen = []
    for e_lin in (1.0, 1.0, 1.0, 1.5, 1.0):
        rule.update(torch.tensor(e_lin))
        seen.append(rule.lam)
    assert seen[2] == pytest.approx(4000 * 0.99**3)
    assert seen[3] == 4000
    assert rule.history == [1.0, 1.0, 1.0, 1.5, 1.0]
    assert rule.logged == pytest.approx((1.1, 0.2))


def test_the_mix_of_steps_has_the_price():
    share = step_tables.full_share(1.1, 2.6, 1.25)
    assert share is not None
    assert share == pytest.approx(0.1)
    assert (1 - share) * 1.1 + share * 2.6 == pytest.approx(1.25)
    assert step_tables.full_share(1.3, 2.6, 1.25) is None
    assert step_tables.full_share(1.1, 1.2, 1.25) == 1
    rows = {"elle-a-skip-light": {"ratio": 1.3}, "elle-a-skip-full": {"ratio": 2.6}}
    found = step_tables.mixes(rows)
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
    judged = step_tables.targets(rows, history, smoke=False)
    assert [row["met"] for row in judged] == [False, False, False, False, False, None, None, None, None, None]
    rows = {"elle-a": {"units": 14.0, "host_syncs": 0}, "authors": {"units": 16.4}}
    rows |= {"elle-a-checkpoint": {"peak_ratio": 1.2}, "elle-a-skip-light": {"host_syncs": 1}}
    history["100000"]["AdaptiveLambda"]["median_us"] = 20.8
    for name, ms in (("authors", 2.0), ("authors-fp32", 4.0), ("elle-a-captured", 1.0), ("passes-captured", 0.96)):
        rows.setdefault(name, {})["ms"] = {"median": ms}
    rows |= {"elle-a-fast-full": {"ms": {"median": 0.59}}, "gradalign": {"ms": {"median": 1.0}}}
    assert all(row["met"] for row in step_tables.targets(rows, history, smoke=False))
    rows["elle-a-captured"]["ms"]["median"] = 1.02
    assert [row["met"] for row in step_tables.targets(rows, history, smoke=False)][-3:] == [False, False, False]
    rows["gradalign"]["ms"]["median"] = 0.98
    assert [row["met"] for row in step_tables.targets(rows, history, smoke=False)][-4:] == [False] * 4


def test_captured_steps_run_eagerly_on_the_cpu():
    tiny = trainer()
    for light in (False, True):
        step = elle_a(light=light, captured=True, skip_below=0.5)(tiny)
        assert step.call().isfinite()
        step.call()
        step.check()
