"""bench_train.py on tiny sizes: it trains what its rows say, and writes all it should; no time is looked at."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.step import bench_train, train_memory, train_parts, train_tables
from benchmarks.step.train_rows import KINDS, LAM, NETS, ROWS, TINY, Net, Place, Recipe
from elle_fast import ELLELoss
from elle_fast.linearity import LocalLinearity
from elle_fast.presets import FAST
from elle_fast.recipes import cli

NET = Net("cnn", 2, 8, 4, 3)
EAGER = [name for name, row in ROWS.items() if not row.compiled]


@pytest.fixture
def place() -> Iterator[Place]:
    with Place(torch.device("cpu")) as place:
        yield place


def recipe_of(name: str, place: Place) -> Recipe:
    recipe = ROWS[name].make(NET, place).recipe
    assert recipe is not None
    return recipe


# ---- The trainings


@pytest.mark.parametrize("name", EAGER)
def test_an_epoch_of_each_row_has_a_step_on_every_batch_and_moves_the_weights(name: str, place: Place) -> None:
    training = ROWS[name].make(NET, place)
    before = copy.deepcopy(training.model.state_dict())
    steps: list[int] = []
    training.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    training.epoch()
    training.epoch()
    assert len(steps) == 2 * NET.batches * (2 if name == "authors" else 1)
    assert all(value.isfinite().all() for value in training.model.state_dict().values())
    assert any(not torch.equal(value, before[key]) for key, value in training.model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in EAGER if ROWS[name].kinds])
def test_a_held_kind_of_steps_is_all_there_is(name: str, place: Place) -> None:
    recipe = recipe_of(name, place)
    for kind in (*KINDS, *KINDS):  # one after the other, from its first step on
        before = {each: recipe.run.step_counts().get(f"{each}_steps", 0) for each in KINDS}
        recipe.hold(kind)
        recipe.epoch()
        taken = {each: recipe.run.step_counts()[f"{each}_steps"] - before[each] for each in KINDS}
        assert taken == {each: NET.batches if each == kind else 0 for each in KINDS}
        lam = recipe.run.criterion.stats["lam"].item()
        assert lam == 0.0 if kind == "light" else lam == pytest.approx(LAM * 0.99**NET.batches)


def test_the_rows_are_runs_of_the_command_line(place: Place) -> None:
    asked = "--data cifar10 --method elle-a --fast --model cnn --width 2 --batch-size 4 --validation 0 --device cpu"
    run = cli.read_options("train", asked.split()).run.resolved()
    own = recipe_of("fast", place).run.config
    different = {name for name, value in vars(run).items() if getattr(own, name) != value}
    assert different == {"epochs", "learning_rate", "checkpoint_every"}
    bf16 = recipe_of("fast bf16", place).run.config
    assert {name for name, value in vars(bf16).items() if getattr(own, name) != value} >= {"precision"}
    assert (bf16.precision, bf16.triplet_precision) == ("bf16", "fp32")
    assert recipe_of("fast bf16 same", place).run.config.triplet_precision == "same"
    assert (own.skip_below, own.triplet_fraction) == (FAST["skip_below"], FAST["triplet_fraction"])
    assert recipe_of("elle-a", place).run.config.skip_below is None


def test_each_row_of_the_forms_has_its_base() -> None:
    for name in ROWS:
        assert train_tables.base(name) in ROWS
    assert train_tables.base("fast bf16 compiled") == "fgsm bf16 compiled"
    assert ROWS["fast bf16 compiled"].compiled
    assert train_tables.base("fast bf16 same") == "fgsm bf16"
    assert train_tables.base("elle-a") == "fgsm"


def test_the_time_of_an_epoch_is_within_steps_outside_and_after(place: Place) -> None:
    recipe = recipe_of("fgsm", place)
    recipe.epoch()
    inside, after = recipe.in_steps, recipe.after_steps
    assert after > 0
    recipe.epoch()
    assert inside < recipe.in_steps
    assert after < recipe.after_steps
    assert not recipe.run.path.exists()  # no checkpoint


# ---- Where time goes


def test_labels_change_nothing_and_are_gone_afterwards(place: Place) -> None:
    plain, labelled = recipe_of("fast", place), recipe_of("fast", place)
    torch.manual_seed(5)
    plain.epoch()
    before = (LocalLinearity.pack, torch.Tensor.backward, ELLELoss.forward)
    torch.manual_seed(5)
    with train_parts.labelled(labelled):
        labelled.epoch()
    assert before == (LocalLinearity.pack, torch.Tensor.backward, ELLELoss.forward)
    for one, other in zip(plain.run.model.parameters(), labelled.run.model.parameters(), strict=True):
        assert torch.equal(one, other)


def event(name: str, begin: float, end: float) -> Any:
    device = SimpleNamespace(name="CPU")
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=begin, end=end))


def test_a_span_does_not_count_the_spans_inside_it() -> None:
    events = [
        event("part: host", 0, 100),
        event("part: loss", 10, 60),
        event("aten::conv", 12, 19),
        event("part: attack", 10, 30),
        event("part: packing", 30, 35),
        event("part: data", 60, 65),
        event("part: loss", 70, 80),
        event("part: attack", 72, 79),
        event("part: the end of an epoch", 80, 95),
    ]
    expected = {"host": 20, "loss": 28, "attack": 27, "packing": 5, "data": 5, "the end of an epoch": 15}
    assert train_parts.spans(events[::-1]) == expected
    assert sum(expected.values()) == 100


# ---- Memory


def test_the_highest_memory_since_the_last_look() -> None:
    before = train_memory._resident()
    if before is None:
        pytest.skip("this system does not tell")
    block = torch.ones(20_000_000)
    del block
    highest = train_memory._highest()
    assert highest is not None
    assert 75e6 < highest - before < 150e6
    again = train_memory._resident()
    assert again is not None
    highest = train_memory._highest()
    assert highest is not None
    assert highest - again < 40e6


# ---- The program


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("bench_train") / "x.json"
    words = ["--quick", "--nets=preact", "--rows=authors,plain,fgsm,fast", "--parts=times,profile", f"--out={out}"]
    assert bench_train.main(words) == 0
    assert out.with_suffix(".svg").stat().st_size > 10_000
    return json.loads(out.read_text())


def test_what_is_written_is_whole(content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net = content["nets"]["preact"]
    assert list(net["rows"]) == ["authors", "plain", "fgsm", "fast"]
    for name, row in net["rows"].items():
        for timed in [row[kind] for kind in KINDS] if name == "fast" else [row]:
            assert timed["ms"]["rounds"] == 2
            assert 0 < timed["ms"]["q1"] <= timed["ms"]["median"] <= timed["ms"]["q3"]
            assert timed["images_per_second"] == pytest.approx(4e3 / timed["ms"]["median"], rel=2e-3)
            if name in ("fgsm", "fast"):
                assert 0 < timed["host_ms"] < timed["ms"]["median"]
    assert list(net["profile"]) == ["fast"]
    parts = net["profile"]["fast"]["parts"]
    assert list(parts) == list(train_parts.PARTS)
    assert all(value > 0 for value in parts.values())
    assert len(net["profile"]["fast"]["operators"]) == 10
    assert "layouts" not in net
    assert [row["met"] for row in content["targets"]] == [None] * 8
    assert {"machine", "versions", "commit", "command", "seconds", "about"} <= content.keys()
    assert content["command"].startswith("python -m benchmarks.step.bench_train --quick")
    table = train_tables.tables(content)
    assert "| fast, light steps |" in table
    assert content["note"] in table
    assert "at 16/255, while these rows are at 8/255" in table


def test_each_row_has_a_process_of_its_own_for_its_memory(tmp_path: Path) -> None:
    words = ["--quick", "--nets=preact", "--rows=fast", "--parts=memory", f"--out={tmp_path / 'x.json'}"]
    assert bench_train.main(words) == 0
    row = json.loads((tmp_path / "x.json").read_text())["nets"]["preact"]["rows"]["fast"]
    assert row["peak_bytes"] is None or 0 < row["peak_bytes"] < 50e6


@pytest.mark.parametrize(
    "words, said",
    [
        (["--nets", "preact,vgg"], "expected some of preact, preactresnet18, resnet50, got 'vgg'"),
        (["--rows", "slow"], "expected some of authors, plain"),
        (["--parts", "time"], "expected some of times, memory, layouts, profile, got 'time'"),
        (["--rounds", "1"], "expected an integer >= 2, got '1'"),
        (["--full-share", "1.5"], "expected a number in [0, 1], got 1.5"),
    ],
)
def test_bad_options(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        bench_train.main(words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_cudnn_chooses_its_algorithms_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(bench_train, "measure", lambda *_: seen.append(torch.backends.cudnn.benchmark))
    bench_train.main(["--quick"])
    assert seen == [True]
    assert not torch.backends.cudnn.benchmark


def test_the_nets_of_a_quick_run_are_the_same_networks() -> None:
    assert {name: net.model for name, net in TINY.items()} == {name: net.model for name, net in NETS.items()}


# ---- Arithmetic


def made(large: dict[str, float], *, amx: bool = False, small: dict[str, Any] | None = None) -> dict[str, Any]:
    rows: dict[str, Any] = {name: {"ms": {"median": ms}} for name, ms in large.items()}
    return {
        "quick": False,
        "setting": {"full_share": 0.75, "amx_bf16": amx, "device": "cpu"},
        "nets": {"preactresnet18": {"rows": rows}, "preact": {"rows": small or {}}},
    }


def test_a_mix_of_steps_takes_the_mean_of_their_times() -> None:
    row = {"light": {"ms": {"median": 100.0}}, "full": {"ms": {"median": 120.0}}}
    assert train_tables.milliseconds(row, 0.75) == pytest.approx(115)
    assert train_tables.milliseconds({"ms": {"median": 7.0}}, 0.75) == 7
    assert train_tables.milliseconds({"about": "not timed"}, 0.75) is None
    assert train_tables.milliseconds(None, 0.75) is None


def test_targets_are_judged() -> None:
    times = {
        "authors": 300.0,
        "fast bf16": 101.0,
        "fast bf16 same": 100.0,
        "fgsm bf16": 84.0,
        "fast": 120.0,
        "fgsm": 101.0,
    }
    small = {"elle-a": {"ms": {"median": 105.0}, "host_ms": 5.0}}
    kinds = {"light": {"ms": {"median": 106.0}, "host_ms": 6.0}, "full": {"ms": {"median": 104.0}, "host_ms": 4.0}}
    found = train_tables.targets(made(times, small={**small, "fast": kinds}))
    assert [row["measured"] for row in found] == [2.97, None, 1.188, 1.202, 1.19, None, 0.05, 0.06]
    assert [row["met"] for row in found] == [False, None, True, False, True, None, True, False]
    compiled = train_tables.targets(made({**times, "fast bf16 compiled": 99.0, "fgsm bf16 compiled": 90.0}))
    assert [row["met"] for row in compiled] == [False, True, True, False, True, True, None, None]
    assert [row["what"].partition(",")[0] for row in compiled[:2]] == ["fast bf16", "fast bf16 compiled"]
    assert [row["wanted"] for row in train_tables.targets(made(times, amx=True))][:3] == [7.0, 7.0, 1.2]
    assert train_tables.targets({**made(times), "quick": True})[0]["met"] is None


def test_a_picture_without_a_profile(tmp_path: Path) -> None:
    net = {**vars(NETS["preact"]), "rows": {"authors": {"ms": {"median": 2.0}}, "fgsm": {"ms": {"median": 1.0}}}}
    content = {"setting": {"full_share": 0.5}, "nets": {"preact": net}}
    content |= {"machine": {"processor": "one", "torch_threads": 1}, "versions": {"torch": "2"}}
    train_tables.plot(content, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 5_000
