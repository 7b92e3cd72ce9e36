"""The figures and tables of the comparison, from summaries that no training made."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import figures, grid
from benchmarks.paper.metrics import FORM, FORMS
from benchmarks.paper.settings import SETTINGS
from benchmarks.paper.tables import agreement, strong_table, table
from elle_fast import methods
from elle_fast.recipes.plot import styles

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def fake(setting="cifar10-small", epochs=8):
    """A summary of all cells of a setting: FGSM collapses at half time, lam of ELLE-A jumps in every third epoch."""
    runs: list[dict[str, Any]] = []
    for place, (name, config) in enumerate(SETTINGS[setting].cells(None)):
        collapses = name == "fgsm" and config.eps > 10 / 255
        pgd = 0.35 - 1.2 * config.eps - 0.01 * (place % 7) - 0.005 * config.seed
        rows = []
        for epoch in range(1, epochs + 1):
            fallen = collapses and epoch > epochs / 2
            row: dict[str, Any] = {
                "epoch": epoch,
                "step": 36 * epoch,
                "train_adv": 0.6 if fallen else 0.1 + 0.01 * epoch,
            }
            row |= {"val_clean": 0.2 + 0.02 * epoch, "val_pgd": 0.001 if fallen else pgd * epoch / epochs}
            row |= {"val_e_lin": 3e-2 if fallen else 1e-5 * (1 + place % 5), "collapsed": fallen}
            row |= {"misalignment": 0.8 if fallen else 0.02 * (1 + place % 5), "seconds": 4.0 + place % 11}
            if setting == "cifar10-ablations":
                row |= {FORM + form: row["val_e_lin"] * (1 + each) for each, form in enumerate(FORMS)}
            rows.append(row)
        adaptive = bool(methods.find(config.method).levers)
        steps = [{"step": step, "lam": 4e3 * math.exp(-(step % 100) / 20)} for step in range(10, 36 * epochs, 10)]
        run: dict[str, Any] = {
            "variant": name,
            "method": config.method,
            "seed": config.seed,
            "config": {"eps": config.eps},
        }
        run |= {"accuracy": {"clean": {"accuracy": 0.4}, "pgd-20": {"accuracy": 0.001 if collapses else pgd}}}
        run |= {"train_adv": rows[-1]["train_adv"], "collapsed": collapses, "training_seconds": 40.0 + place % 11}
        run |= {"full_share": None, "epochs": rows, "steps": steps if adaptive else [], "strong": None}
        if SETTINGS[setting].is_strong(name, config):
            found = {attack: {"accuracy": 0.0 if collapses else 0.9 * pgd} for attack in ("pgd-50-10", "autoattack")}
            run["strong"] = {"accuracy": found, "worst_case": {"accuracy": 0.8 * pgd, "samples": 200}}
            run["strong"]["masking"] = {"verdict": "ok"}
        runs.append(run)
    return {"setting": setting, "note": "no training made this", "eps": list(SETTINGS[setting].eps), "runs": runs}


def axes_of(figure):
    assert figure is not None
    return figure.axes


@pytest.mark.parametrize(
    "setting,names",
    [
        ("cifar10-small", ["-eps8", "-eps16", "-eps26", "-robust", "-time", "-lam"]),
        ("cifar10-ablations", ["-eps8", "-eps16", "-eps26", "-robust", "-time", "-lam", "-forms"]),
    ],
)
def test_every_figure_that_there_are_numbers_for(tmp_path, setting, names):
    drawn = figures.draw(fake(setting, epochs=2), tmp_path / "x.json")
    assert [path.name for path in drawn] == [f"x{name}.svg" for name in names]
    assert all(path.read_bytes().startswith(b"<?xml") for path in drawn)


def test_accuracy_against_eps_marks_each_collapse_and_leaves_single_cells_out():
    (axes,) = axes_of(figures.accuracy_against_eps(fake(epochs=2)))
    lines = {line.get_label(): line for line in axes.lines}
    assert {"fgsm", "n-fgsm+elle-a"} <= lines.keys()
    assert "pgd-at" not in lines
    assert lines["fgsm"].get_xdata() == pytest.approx([8, 16, 26])
    crosses = [
        point for line in axes.lines if line.get_color() == "red" for point in zip(*line.get_data(), strict=True)
    ]
    # Three seeds of FGSM at each of the two large eps.
    assert sorted(crosses) == [pytest.approx((eps, 0.1)) for eps in (16, 16, 16, 26, 26, 26)]


def test_time_against_accuracy_is_filled_for_autoattack_alone():
    summary = fake(epochs=2)
    (axes,) = axes_of(figures.time_against_accuracy(summary))
    assert "16/255" in axes.figure.get_suptitle()
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == set(SETTINGS["cifar10-small"].names)
    full = {name for name, line in lines.items() if line.get_fillstyle() == "full"}
    assert full == {"fgsm", "n-fgsm", "gradalign", "elle", "elle-a", "n-fgsm+elle-a", "pgd-at"}
    run = next(run for run in summary["runs"] if run["variant"] == "pgd-at")
    ((seconds, accuracy),) = lines["pgd-at"].get_xydata()
    assert seconds == run["epochs"][0]["seconds"]
    assert accuracy == pytest.approx(100 * run["strong"]["accuracy"]["autoattack"]["accuracy"])
    assert lines["fgsm"].get_markeredgecolor() == "red"


def test_lam_of_the_adaptive_variants_alone():
    panels = axes_of(figures.lam_over_time(fake(epochs=2)))
    assert [axes.get_title() for axes in panels] == ["eps 8/255", "eps 16/255", "eps 26/255"]
    assert [line.get_label() for line in panels[0].lines] == ["elle-a", "n-fgsm+elle-a"]
    # Not those that have a single eps.
    assert [len(axes.lines) for axes in panels] == [2, 2, 2]


def test_forms_of_e_lin_only_where_they_were_measured():
    assert figures.forms_of_e_lin(fake(epochs=2)) is None
    panels = axes_of(figures.forms_of_e_lin(fake("cifar10-ablations", epochs=2)))
    assert [line.get_label() for line in panels[0].lines] == list(FORMS)
    assert [len(axes.patches) for axes in panels] == [0, 1, 1]  # an epoch in which FGSM is collapsed


@pytest.mark.parametrize("name", ["digits", "cifar10-jpeg-small"])
def test_committed_results_are_read_and_drawn_again(tmp_path, capsys, name):
    out = tmp_path / "again.json"
    assert grid.main(["--redraw", str(RESULTS / f"{name}.json"), "--out", str(out)]) == 0
    runs = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    variants = dict.fromkeys(run["method"] for run in runs)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(variants)
    assert {path.name for path in tmp_path.iterdir()} == {"again.svg", "again-time.svg"}


def test_epochs_of_earlier_runs_that_watched_test_images_are_shown_as_those_of_today(monkeypatch, tmp_path):
    (tmp_path / "x.json").write_text((RESULTS / "cifar10-jpeg-small.json").read_text())
    made, shown = json.loads((tmp_path / "x.json").read_text()), []
    assert "test_pgd" in made["runs"][0]["epochs"][0]
    monkeypatch.setattr(grid, "draw", lambda summary, out: shown.append(summary))
    assert grid.main(["--redraw", str(tmp_path / "x.json")]) == 0
    for run, of_today in zip(made["runs"], shown[0]["runs"], strict=True):
        for row, renamed in zip(run["epochs"], of_today["epochs"], strict=True):
            assert renamed["val_pgd"] == row["test_pgd"]
            assert renamed["val_e_lin"] == row["test_e_lin"]
            assert renamed["train_adv"] == row["train_adv"]
            assert not any(name.startswith("test_") for name in renamed)
    assert json.loads((tmp_path / "x.json").read_text()) == made


def test_tables_of_times_over_gradalign_and_of_stronger_attacks():
    summary = fake(epochs=1)
    lines = table(summary).splitlines()
    assert lines[0].endswith("| time | time over gradalign |")
    times = {(run["variant"], run["config"]["eps"], run["seed"]): run["training_seconds"] for run in summary["runs"]}
    row = next(line for line in lines if line.startswith("| 16/255 | elle-a fast |"))
    first = {name: seconds for (name, eps, seed), seconds in times.items() if (eps, seed) == (16 / 255, 0)}
    wanted = [first["elle-a fast"] / first[base] for base in ("fgsm", "gradalign")]
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == [f"{ratio:.2f}x" for ratio in wanted]
    strong = str(strong_table(summary)).splitlines()
    assert len(strong) == 2 + 15
    assert strong[0] == "| eps | variant | seed | samples | pgd-50-10 | autoattack | worst case | gradient masking |"
    assert strong[2].startswith("| 8/255 | fgsm | 0 | 200 |")
    assert strong_table({"runs": [{**run, "strong": None} for run in summary["runs"]]}) is None


def test_every_method_has_a_style_of_its_own():
    found = styles(methods.NAMES)
    assert all(style["color"] for style in found.values())
    looks = {tuple(style.values()) for style in found.values()}
    assert len(looks) == len(methods.NAMES)
    one, other = styles(["elle-a lam 1000", "elle-a lam 4000"]).values()
    assert one["color"] == other["color"]
    assert one["linestyle"] != other["linestyle"]
    colours = [style["color"] for style in styles(["fgsm", "skip", "eighth", "fast"]).values()]
    assert len(set(colours)) == 4


def test_times_of_steps_that_were_taken_in_turns(tmp_path, capsys):
    ms = {"fgsm": 100.0, "gradalign": 400.0, "elle-a": 300.0, "elle-a-fast-full": 120.0}
    methods_of = {name: {"ms": {"median": value}} for name, value in ms.items()}
    timed = {"setting": {"batch": 128}, "machine": {}, "commit": "c", "command": "x", "methods": methods_of}
    (tmp_path / "steps.json").write_text(json.dumps(timed))
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps(fake(epochs=2)))
    assert grid.main(["--redraw", str(summary), "--step-times", str(tmp_path / "steps.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| step time | step time over gradalign |")
    (fast,) = (line for line in lines if line.startswith("| 16/255 | elle-a fast |"))
    assert fast.endswith("| 1.20x | 0.30x |")
    (other,) = (line for line in lines if line.startswith("| 16/255 | gat |"))
    assert other.endswith("| - | - |")
    # For good: the file itself has them now.
    kept = json.loads(summary.read_text())
    assert kept["step_times"]["ms"] == ms
    assert kept["step_times"]["commit"] == "c"
    (axes,) = axes_of(figures.time_against_accuracy(kept))
    assert "milliseconds of a step" in axes.get_xlabel()
    places = {line.get_label(): line.get_xdata()[0] for line in axes.lines}
    assert places == {"fgsm": 100, "gradalign": 400, "elle-a": 300, "elle-a fast": 120}
    (tmp_path / "steps.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_times: expected a JSON file of bench_step\.py, got"):
        grid.main(["--redraw", str(summary), "--step-times", str(tmp_path / "steps.json")])


def test_how_e_lin_follows_the_misalignment():
    summary = fake(epochs=4)
    text = str(agreement(summary))
    # FGSM: both are one number before the collapse and another after it, at two of three eps; nine runs of four epochs.
    assert "fgsm: " in text
    assert "(36 epochs)" in text
    assert "3.0e-02 in 12 collapsed epochs" in text
    for run in summary["runs"]:
        for row in run["epochs"]:
            row["misalignment"] = 2 * row["val_e_lin"]
    assert "all runs: 1.00" in str(agreement(summary))
    for run in summary["runs"]:
        for row in run["epochs"]:
            row["collapsed"] = False
    assert agreement(summary) is None
