import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import cells as grid_cells
from benchmarks.paper import grid, metrics, settings
from benchmarks.paper.cells import Cell
from benchmarks.paper.settings import SETTINGS
from benchmarks.paper.tables import models_table, table
from elle_fast import data, methods
from elle_fast._core.files import write_json
from elle_fast.recipes import models
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.regularizers import GradAlign

TINY = settings.Setting(
    config=TrainConfig(width=2, eps=0.1, epochs=1, limit=80, validation=16, test_limit=16, batch_size=32),
    variants={"fgsm": {"method": "fgsm"}, "light": {"method": "elle-a", "skip_below": 1.0}},
    seeds=(0,),
    note="a note that belongs to every table",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SETTINGS, "digits", TINY)


def run(folder, *more):
    out = folder / "out.json"
    status = grid.main(["--setting", "digits", "--out", str(out), "--work", str(folder / "work"), *more])
    assert status == 0
    return out


def test_a_seed_and_an_eps_are_gone_through_before_the_next():
    cells = replace(TINY, seeds=(0, 1), eps=(0.1, 0.2)).cells("root")
    assert [(name, config.method, config.eps, config.seed) for name, config in cells[:5]] == [
        ("fgsm", "fgsm", 0.1, 0),
        ("light", "elle-a", 0.1, 0),
        ("fgsm", "fgsm", 0.2, 0),
        ("light", "elle-a", 0.2, 0),
        ("fgsm", "fgsm", 0.1, 1),
    ]
    assert len(cells) == 8
    assert {config.root for _, config in cells} == {"root"}


def test_others_run_once_at_the_eps_of_the_configuration():
    setting = replace(TINY, seeds=(0, 1), eps=(0.1, 0.2), others={"other": {"method": "n-fgsm"}}, strong=("fgsm",))
    setting = replace(setting, strong_once=("light",))
    cells = setting.cells(None, "cuda")
    assert len(cells) == 9
    assert [(config.eps, config.seed, config.device) for name, config in cells if name == "other"] == [(0.1, 0, "cuda")]
    strong = [(name, config.eps, config.seed) for name, config in cells if setting.is_strong(name, config)]
    assert strong == [("fgsm", 0.1, 0), ("light", 0.1, 0), ("fgsm", 0.2, 0)]
    setting = replace(setting, strong_every_seed=True)
    seeds = [config.seed for name, config in cells if setting.is_strong(name, config) and config.eps == 0.2]
    assert seeds == [0, 1]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "digits"])
def test_the_cells_of_every_setting_have_folders_of_their_own_and_fair_shares(name):
    cells = SETTINGS[name].cells(None)
    for _, config in cells:
        config.resolved()
    assert len({SETTINGS[name].cell(Path(), None, *cell).folder for cell in cells}) == len(cells)
    dealt = settings.shares(cells, 3)
    assert sorted(str(cell) for share in dealt for cell in share) == sorted(map(str, cells))
    loads = [sum(methods.find(config.method).units for _, config in share) for share in dealt]
    # Each cell goes to the least loaded share, so that no two are further apart than the dearest one.
    assert max(loads) - min(loads) <= max(methods.find(config.method).units for _, config in cells)


def test_small_and_smoke_have_every_method():
    for name in ("cifar10-small", "digits-smoke", "cifar10-paper"):
        assert {config.method for _, config in SETTINGS[name].cells(None)} == set(methods.NAMES)
    eps = {round(255 * config.eps) for _, config in SETTINGS["cifar10-paper"].cells(None)}
    assert eps == set(range(2, 27, 2))


def test_a_setting_by_data_set_and_scale():
    assert settings.find(None, "smoke") == "digits-smoke"
    assert settings.find("cifar10", "paper") == "cifar10-paper"
    with pytest.raises(ValueError, match=r"dataset: expected one of 'cifar10', 'mnist' at scale 'small', got 'svhn'"):
        settings.find("svhn", "small")


def test_shards_share_the_cells_and_each_writes_what_is_there(tmp_path, capsys, monkeypatch):
    out = run(tmp_path, "--shard", "0/2")
    assert "1 of 2 cells are still to be done" in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 1
    assert [cell["variant"] for cell in summary["runs"]] == ["fgsm"]

    # While this shard reads its cells, the other one does its own, and writes the file.
    read, others = Cell.read, [["--shard", "1/2"]]

    def slow(cell):
        if others:
            run(tmp_path, *others.pop())
            assert json.loads(out.read_text())["missing"] == 0
        return read(cell)

    monkeypatch.setattr(Cell, "read", slow)
    run(tmp_path, "--shard", "0/2")
    assert not others
    assert "still to be done" not in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 0
    assert [(cell["variant"], cell["method"], cell["seed"], cell["full_share"]) for cell in summary["runs"]] == [
        ("fgsm", "fgsm", 0, None),
        ("light", "elle-a", 0, 0.0),
    ]
    assert summary["note"] == TINY.note
    assert summary["command"] == "python -m benchmarks.paper.grid --setting=digits --out=out.json"
    assert all({"machine", "versions", "commit", "accuracy", "epochs"} <= cell.keys() for cell in summary["runs"])
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".svg").read_bytes().startswith(b"<?xml")

    # What is done is not done again.
    monkeypatch.setattr(grid_cells, "train", lambda *args, **options: pytest.fail("trained again"))
    out.unlink()
    run(tmp_path)
    assert json.loads(out.read_text()) == summary


def test_a_cell_that_was_cut_off_is_resumed(tmp_path, monkeypatch):
    asked = []
    original = training.train

    def train(config, folder, **options):
        asked.append(options["resume"])
        return original(config, folder, **options)

    monkeypatch.setattr(grid_cells, "train", train)
    run(tmp_path, "--shard", "0/2")
    (tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json").unlink()
    run(tmp_path, "--shard", "0/2")
    assert asked == [False, True]


def test_an_eps_of_its_own_and_its_picture(tmp_path, monkeypatch):
    fgsm = {"fgsm": TINY.variants["fgsm"]}
    monkeypatch.setitem(SETTINGS, "digits", replace(TINY, eps=(8 / 255, 16 / 255), variants=fgsm))
    summary = json.loads(run(tmp_path).read_text())
    assert [round(255 * cell["config"]["eps"]) for cell in summary["runs"]] == [8, 16]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["out-eps16.svg", "out-eps8.svg", "out-robust.svg"]


def test_the_table_has_mean_and_range_over_the_seeds():
    def cell(variant, seed, pgd, collapsed, seconds, share=None):
        accuracy = {"clean": {"accuracy": 0.5}, "pgd-20": {"accuracy": pgd}}
        numbers = {"train_adv": 0.25, "collapsed": collapsed, "training_seconds": seconds, "full_share": share}
        return {"variant": variant, "seed": seed, "accuracy": accuracy, "config": {"eps": 8 / 255}, **numbers}

    runs = [cell("fgsm", 0, 0.01, True, 10.0), cell("fgsm", 1, 0.03, False, 20.0), cell("x", 0, 0.2, False, 25.0, 0.4)]
    lines = table({"setting": "digits", "runs": runs}).splitlines()
    assert lines[0] == (
        "| eps | variant | train, own attack | test clean | test pgd-20 | collapsed | full steps | time |"
    )
    assert lines[2] == (
        "| 8/255 | fgsm | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 2.0 (1.0 to 3.0) | 1 of 2 | - | 1.00x |"
    )
    assert lines[3] == "| 8/255 | x | 25.0 | 50.0 | 20.0 | 0 of 1 | 40 % | 2.50x |"
    assert len(lines) == 4
    # No time without a run of the setting's first variant at the same eps and with the same seed.
    runs = [cell("x", 0, 0.2, False, 25.0), cell("light", 1, 0.2, False, 50.0), cell("fgsm", 1, 0.01, True, 20.0)]
    lines = table({"setting": "digits", "runs": runs}).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["-", "2.50x", "1.00x"]
    # Files of before do not tell who never was robust.
    runs = [cell("fgsm", seed, 0.0, seed == 0, 10.0) | {"never_robust": seed == 1 or None} for seed in range(3)]
    assert "| 1 of 3, 1 never robust |" in table({"setting": "digits", "runs": runs})


def test_a_row_is_written_as_soon_as_its_run_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "digits", replace(TINY, strong=("fgsm",), strong_attacks="clean", strong_samples=4))
    written: list[Any] = []

    def write(path, summary):
        written.append([(run["variant"], run["strong"] is not None) for run in summary["runs"]])
        write_json(path, summary)

    monkeypatch.setattr(grid, "write_json", write)
    run(tmp_path)
    # The stronger attacks on a run come before the next training.
    fgsm, both = [("fgsm", True)], [("fgsm", True), ("light", False)]
    assert written == [[("fgsm", False)], fgsm, both, both]


def test_of_two_shards_the_last_to_write_has_seen_both(tmp_path, monkeypatch):
    """While one writes what it has read, the other one finishes a cell and writes it; the first must not undo that."""
    others = [["--shard", "1/2"]]

    def slow(path, summary):
        if others:
            run(tmp_path, *others.pop())
            assert len(json.loads(path.read_text())["runs"]) == 2
        write_json(path, summary)

    monkeypatch.setattr(grid, "write_json", slow)
    summary = json.loads(run(tmp_path, "--shard", "0/2").read_text())
    assert [cell["variant"] for cell in summary["runs"]] == ["fgsm", "light"]


def test_a_later_session_without_the_folder_goes_on_from_the_file(tmp_path, monkeypatch):
    out = run(tmp_path, "--variants", "fgsm")
    kept = json.loads(out.read_text())["runs"]
    (tmp_path / "work").rename(tmp_path / "lost")
    trained, original = [], training.train

    def train(config, folder, **options):
        trained.append(config.method)
        return original(config, folder, **options)

    monkeypatch.setattr(grid_cells, "train", train)
    summary = json.loads(run(tmp_path, "--keep").read_text())
    assert trained == ["elle-a"]
    assert summary["runs"][0] == kept[0]
    assert ([cell["variant"] for cell in summary["runs"]], summary["missing"]) == (["fgsm", "light"], 0)
    # Without it the two rows would be lost.
    (tmp_path / "work").rename(tmp_path / "lost again")
    with pytest.raises(ValueError, match=r"out: expected a file of at most the 1 runs .* with 2; .*--keep"):
        run(tmp_path, "--variants", "fgsm")
    # What another commit made is taken if that is asked for; other settings never are.
    shutil.rmtree(tmp_path / "work")
    changed(out, runs=[{**cell, "commit": "0123456789ab"} for cell in summary["runs"]])
    with pytest.raises(ValueError, match=r"of another: commit = '0123456789ab' \(now: "):
        run(tmp_path, "--keep")
    again = json.loads(run(tmp_path, "--keep", "--any-commit").read_text())
    assert {cell["commit"] for cell in again["runs"]} == {"0123456789ab"}
    changed(out, runs=[{**cell, "config": {**cell["config"], "epochs": 9}} for cell in summary["runs"]])
    with pytest.raises(ValueError, match=r"of another: .*epochs = 9 \(now: 1\)"):
        run(tmp_path, "--keep", "--any-commit")
    out.unlink()
    with pytest.raises(FileNotFoundError, match="keep: expected --out to be the file of earlier runs, got"):
        run(tmp_path, "--keep")


def test_a_kept_run_without_its_stronger_attacks_is_trained_again(tmp_path, monkeypatch):
    setting = replace(TINY, strong=("fgsm", "light"), strong_attacks="clean", strong_samples=4)
    monkeypatch.setitem(SETTINGS, "digits", setting)
    out = run(tmp_path)
    whole = json.loads(out.read_text())["runs"]
    assert all(each["strong"]["accuracy"] for each in whole)
    shutil.rmtree(tmp_path / "work")
    changed(out, runs=[{**each, "strong": None} if each["variant"] == "light" else each for each in whole])
    trained, original = [], training.train

    def stopped(config, folder, **options):
        original(config, folder, **options)
        (folder / "result.json").unlink()
        raise training.InterruptedRunError("stopped")

    def train(config, folder, **options):
        trained.append(config.method)
        return original(config, folder, **options)

    monkeypatch.setattr(grid_cells, "train", stopped)
    command = ["--setting", "digits", "--out", str(out), "--work", str(tmp_path / "work"), "--keep"]
    assert grid.main(command) == 130
    # Until it is done again, its row stays.
    summary = json.loads(run(tmp_path, "--keep", "--variants", "fgsm").read_text())
    assert ([each["strong"] is None for each in summary["runs"]], summary["missing_strong"]) == ([False, True], 1)
    monkeypatch.setattr(grid_cells, "train", train)
    summary = json.loads(run(tmp_path, "--keep").read_text())
    assert trained == ["elle-a"]
    assert (summary["missing"], summary["missing_strong"]) == (0, 0)
    fgsm, light = summary["runs"]
    assert fgsm == whole[0]
    assert {**light, "training_seconds": 0, "epochs": 0} == {**whole[1], "training_seconds": 0, "epochs": 0}
    run(tmp_path, "--keep")
    assert trained == ["elle-a"]


def test_the_other_weights_of_chosen_variants_are_attacked_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid_cells, "_MODELS_ATTACK", "pgd-2-2")
    setting = replace(TINY, config=replace(TINY.config, average=0.9, epochs=2), strong=("fgsm", "light"))
    setting = replace(setting, strong_models=("light",), strong_attacks="noise-2", strong_samples=8)
    monkeypatch.setitem(SETTINGS, "digits", setting)
    fgsm, light = json.loads(run(tmp_path).read_text())["runs"]
    names = ["last", "best", "averaged", "best averaged"]
    assert list(fgsm["models"]) == list(light["models"]) == names
    assert "models" not in fgsm["strong"]
    attacks = {name: list(found) for name, found in light["strong"]["models"].items()}
    assert attacks == {name: ["pgd-2-2"] for name in names[1:]}
    folder = tmp_path / "work" / "digits" / "light-eps25.5-seed0"
    for name, file in (("best", "best"), ("averaged", "averaged"), ("best averaged", "best_averaged")):
        made = json.loads((folder / f"strong_{file}.json").read_text())
        assert made["checkpoint"].endswith(f"{file}.pt")
        assert made["accuracy"] == light["strong"]["models"][name]
    lines = str(models_table({"runs": [fgsm, light]})).splitlines()
    assert lines[0] == "| eps | variant | seed | last | best | averaged | best averaged |"
    of_average = [*light["models"]["averaged"]["accuracy"].values(), light["strong"]["models"]["averaged"]["pgd-2-2"]]
    percent = [100 * found["accuracy"] for found in of_average]
    assert "clean {:.1f}  fgsm {:.1f}  pgd-20 {:.1f}  pgd-2-2 {:.1f} (epoch 2)".format(*percent) in lines[3]
    assert lines[3].split("|")[6] != lines[2].split("|")[6]
    assert models_table({"runs": [{"variant": "old"}]}) is None
    # One that is missing is made, the others are not made again.
    (folder / "strong_averaged.json").unlink()
    attacked = []

    def evaluate(options, **given):
        attacked.append(options.checkpoint.name)
        return evaluate_checkpoint(options, **given)

    monkeypatch.setattr(grid_cells, "evaluate_checkpoint", evaluate)
    run(tmp_path)
    assert attacked == ["averaged.pt"]


def test_medium_has_what_was_changed_or_is_new_and_what_to_compare_it_with():
    setting = SETTINGS["cifar10-medium"]
    cells = {name: config.resolved() for name, config in setting.cells(None)}
    assert [*cells][:5] == ["fgsm", "n-fgsm", "elle-a fast", "n-fgsm+elle-a fast", "n-fgsm+elle-a fast at 8"]
    assert len({*cells}) == len(setting.cells(None))
    known = {config.method for config in cells.values()} | {*settings._UNCHANGED}
    # Of a method with E_lin on top, ELLE-A is trained.
    assert known.issuperset(name for name in methods.NAMES if not name.endswith("+elle"))
    assert {"nuat+elle-a", "liet+elle-a", "n-fgsm+awp"} < known
    assert {name for name, config in cells.items() if config.eps == 8 / 255} == {
        "n-fgsm+elle-a fast at 8",
        "n-fgsm+elle-a fast at 8 smoothed",
    }
    assert all(config.eps in (8 / 255, 16 / 255) for config in cells.values())
    for config in cells.values():
        assert (config.limit, config.validation, config.epochs, config.batch_size) == (None, 1024, 15, 128)
        assert (config.augment, config.average, config.schedule, config.test_limit) == (True, 0.999, "short", 1000)
    assert all(setting.is_strong(*cell) for cell in setting.cells(None))
    assert settings.find("cifar10", "medium") == "cifar10-medium"


def test_variants_chosen_by_name(tmp_path, capsys):
    summary = json.loads(run(tmp_path, "--variants", "light").read_text())
    assert [cell["variant"] for cell in summary["runs"]] == ["light"]
    assert summary["missing"] == 1
    with pytest.raises(ValueError, match=r"variants: expected one of 'fgsm', 'light', got 'dark'"):
        run(tmp_path, "--variants", "light,dark")
    with pytest.raises(ValueError, match=r"eps: expected some of \[0.1\], got 0.5"):
        run(tmp_path, "--eps", "1/2")
    with pytest.raises(ValueError, match=r"seeds: expected some of \[0\], got 3"):
        run(tmp_path, "--seeds", "0,3")


def test_bad_options_are_said_at_once(tmp_path, capsys):
    for given, said in (
        (["--setting", "digits"], "expected --out, and one of --setting and --scale"),
        (["--setting", "digits", "--scale", "smoke", "--out", "x"], "expected --out, and one of"),
        (["--setting", "digits", "--dataset", "mnist", "--out", "x"], "expected --dataset beside --scale"),
        (["--setting", "digits", "--shard", "2/2", "--out", "x"], "expected I/N with 0 <= I < N, got '2/2'"),
        (["--setting", "digits", "--shard", "1", "--out", "x"], "expected I/N with 0 <= I < N, got '1'"),
        (["--setting", "digits", "--eps", "8/0", "--out", "x"], "expected a number or a fraction such as 8/255, got"),
        (["--setting", "digits", "--seeds", "a", "--out", "x"], "expected an integer >= 0, got 'a'"),
    ):
        with pytest.raises(SystemExit):
            grid.main(given)
        assert said in capsys.readouterr().err


def test_asked_to_stop_it_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stopped(*args, **options):
        raise training.InterruptedRunError("stopped after step 1 of 2")

    monkeypatch.setattr(grid_cells, "train", stopped)
    out = tmp_path / "out.json"
    assert grid.main(["--setting", "digits", "--out", str(out), "--work", str(tmp_path / "work")]) == 130
    assert "stopped after step 1 of 2; type the same command again" in capsys.readouterr().out
    assert not out.exists()


def changed(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_run_of_another_version_or_configuration_is_refused(tmp_path, monkeypatch):
    run(tmp_path, "--variants", "fgsm")
    folder = tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0"
    result = json.loads((folder / "result.json").read_text())
    changed(folder / "result.json", versions={**result["versions"], "elle_fast": "0.0.1"})
    refused = rf"work: expected .*, got '{folder}' of another: elle_fast = '0.0.1' \(now: "
    with pytest.raises(ValueError, match=refused):
        run(tmp_path, "--variants", "light")
    # One that was cut off.
    (folder / "result.json").unlink()
    changed(folder / "cell.json", versions={"elle_fast": "0.0.1"})
    with pytest.raises(ValueError, match=refused):
        run(tmp_path)
    # Of another commit, taken if that is asked for.
    changed_commit = {**result, "commit": "0123456789ab"}
    (folder / "result.json").write_text(json.dumps(changed_commit))
    with pytest.raises(ValueError, match=r"of another: commit = '0123456789ab' \(now: "):
        run(tmp_path)
    summary = json.loads(run(tmp_path, "--variants", "fgsm", "--any-commit").read_text())
    assert summary["runs"][0]["commit"] == "0123456789ab"
    # A setting that this version does not know, and one that differs.
    (folder / "result.json").write_text(json.dumps({**result, "config": {**result["config"], "novel": 1, "seed": 7}}))
    with pytest.raises(ValueError, match=r"of another: novel = 1 \(now: None\); seed = 7 \(now: 0\)"):
        run(tmp_path)


def test_a_run_that_is_older_than_an_option_counts_where_that_has_its_default(tmp_path, monkeypatch):
    run(tmp_path, "--variants", "fgsm")
    result = tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json"
    config = json.loads(result.read_text())["config"]
    changed(result, config={name: value for name, value in config.items() if name not in ("decay", "peak", "limit")})
    with pytest.raises(ValueError, match=r"of another: limit = None \(now: 80\); remove it"):
        run(tmp_path, "--variants", "fgsm")
    changed(result, config={name: value for name, value in config.items() if name not in ("decay", "peak")})
    assert json.loads(run(tmp_path, "--variants", "fgsm").read_text())["runs"][0]["config"].keys() < config.keys()
    monkeypatch.setitem(SETTINGS, "digits", replace(TINY, config=replace(TINY.config, decay="weights")))
    with pytest.raises(ValueError, match=r"of another: decay = None \(now: 'weights'\); remove it"):
        run(tmp_path, "--variants", "fgsm")


def test_what_a_run_found_out_about_its_machine_makes_it_no_other_run(tmp_path, monkeypatch):
    run(tmp_path, "--variants", "fgsm")
    result = tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json"
    config = json.loads(result.read_text())["config"]
    # As a training of pictures notes it, which was asked for "auto".
    changed(result, config={**config, "stream": "never", "workers": 3})
    assert json.loads(run(tmp_path, "--variants", "fgsm").read_text())["runs"][0]["config"]["stream"] == "never"


def test_a_run_names_every_commit_that_trained_it(tmp_path, monkeypatch):
    def stopped(*args, **options):
        training.train(*args, **options)
        raise training.InterruptedRunError("stopped")

    command = ["--setting", "digits", "--variants", "fgsm", "--any-commit", "--out", str(tmp_path / "out.json")]
    for name, train in (("one", stopped), ("one", stopped), ("another", training.train)):
        monkeypatch.setattr(grid_cells, "commit", lambda name=name: name)
        monkeypatch.setattr(grid_cells, "train", train)
        grid.main([*command, "--work", str(tmp_path / "work")])
        (result,) = (tmp_path / "work").rglob("result.json")
        if train is stopped:
            result.unlink()
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["commits"] == ["one", "another"]


def test_a_training_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    original, tried = training.train, []

    def train(config, folder, **options):
        tried.append(config.method)
        if config.method == "fgsm":
            raise RuntimeError(f"loss: expected finite numbers, got nan at step 3; the checkpoint in {folder}")
        return original(config, folder, **options)

    monkeypatch.setattr(grid_cells, "train", train)
    out, work = tmp_path / "out.json", tmp_path / "work"
    command = ["--setting", "digits", "--out", str(out), "--work", str(work)]
    for _ in range(2):
        assert grid.main(command) == 1
        said = "loss: expected finite numbers, got nan at step 3"
        assert f"fgsm, eps 0.1, seed 0: {said}\n" in capsys.readouterr().out
    assert tried == ["fgsm", "elle-a"]
    summary = json.loads(out.read_text())
    assert summary["failed"] == [{"variant": "fgsm", "eps": 0.1, "seed": 0, "error": said}]
    assert ([run["variant"] for run in summary["runs"]], summary["missing"]) == (["light"], 1)
    changed(work / "digits" / "fgsm-eps25.5-seed0" / "failed.json", commit="0123456789ab")
    with pytest.raises(ValueError, match=r"of another: commit = '0123456789ab' \(now: "):
        grid.main(command)


def test_a_run_on_other_data_is_refused(tmp_path, monkeypatch):
    run(tmp_path, "--variants", "fgsm")
    original = data.load

    def other(*args, **options):
        dataset = original(*args, **options)
        dataset.train.images[0, 0, 0, 0] ^= 1
        return dataset

    monkeypatch.setattr(data, "load", other)
    with pytest.raises(ValueError, match=r"fgsm-eps25.5-seed0' of another: data = '[0-9a-f]{32}' \(now: "):
        run(tmp_path)


def test_a_choice_without_cells_and_a_file_with_more_runs(tmp_path, monkeypatch):
    setting = replace(TINY, seeds=(0, 1), others={"other": {"method": "n-fgsm"}})
    monkeypatch.setitem(SETTINGS, "digits", setting)
    with pytest.raises(ValueError, match="variants, eps, seeds: expected a choice that the setting has cells of"):
        run(tmp_path, "--variants", "other", "--seeds", "1")
    out = run(tmp_path, "--variants", "fgsm", "--seeds", "0")
    kept = json.loads(out.read_text())
    out.write_text(json.dumps({"runs": [*kept["runs"], {}]}))
    with pytest.raises(ValueError, match=r"out: expected a file of at most the 1 runs .* with 2; choose another --out"):
        run(tmp_path, "--variants", "fgsm", "--seeds", "0")
    assert len(json.loads(out.read_text())["runs"]) == 2


def test_a_file_that_is_no_summary_is_named(tmp_path):
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text('{"runs": [')
    other.write_text("[]")
    with pytest.raises(ValueError, match=f"expected a whole JSON file, got '{broken}': "):
        grid.main(["--redraw", str(broken)])
    with pytest.raises(ValueError, match=f"redraw: expected a JSON file of this program, got '{other}'"):
        grid.main(["--redraw", str(other)])
    run(tmp_path, "--variants", "fgsm")
    result = tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json"
    result.write_text(result.read_text()[:100])
    with pytest.raises(ValueError, match=f"expected a whole JSON file, got '{result}': "):
        run(tmp_path)


def test_stronger_attacks_after_the_training(tmp_path, monkeypatch, capsys):
    setting = replace(TINY, strong=("fgsm",), strong_attacks="noise-2,pgd-2-2", strong_samples=8)
    monkeypatch.setitem(SETTINGS, "digits", setting)
    summary = json.loads(run(tmp_path, "--shard", "1/2").read_text())
    assert (summary["missing"], summary["missing_strong"]) == (1, 1)
    assert "1 cells are still to be attacked by noise-2,pgd-2-2" in capsys.readouterr().out
    out = run(tmp_path)
    summary = json.loads(out.read_text())
    assert (summary["missing"], summary["missing_strong"]) == (0, 0)
    fgsm, light = summary["runs"]
    assert list(fgsm["strong"]["accuracy"]) == ["noise-2", "pgd-2-2"]
    assert fgsm["strong"]["worst_case"]["samples"] == 8
    assert light["strong"] is None
    assert str(tmp_path) not in out.read_text()
    # What is done is not done again; others, and those on another checkpoint, are refused.
    monkeypatch.setattr(grid_cells, "evaluate_checkpoint", lambda *args, **options: pytest.fail("attacked again"))
    run(tmp_path)
    monkeypatch.setitem(SETTINGS, "digits", replace(setting, strong_samples=9, strong_attacks="noise-2"))
    with pytest.raises(ValueError, match=r"strong.json' of another: attacks = .*; samples = 8 \(now: 9\)"):
        run(tmp_path)


def test_misalignment_and_the_forms_of_e_lin_of_each_epoch(tmp_path, monkeypatch):
    setting = replace(TINY, measure=metrics.forms_of_e_lin)
    monkeypatch.setitem(SETTINGS, "digits", setting)
    summary = json.loads(run(tmp_path, "--variants", "fgsm").read_text())
    (row,) = summary["runs"][0]["epochs"]
    wanted = {"misalignment", *(metrics.FORM + name for name in metrics.FORMS)}
    assert wanted <= row.keys()
    assert all(math.isfinite(row[name]) for name in wanted)
    assert (tmp_path / "out-forms.svg").exists()


def test_misalignment_is_that_of_gradalign_and_leaves_no_trace():
    torch.manual_seed(0)
    model = models.build("cnn", in_shape=(1, 8, 8), classes=10, width=2).train()
    split = data.load("digits", limit=8, test_limit=8).test
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    found = metrics.forms_of_e_lin(model, split, 0.3)
    assert found == metrics.forms_of_e_lin(model, split, 0.3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    penalty = GradAlign(0.3, generator=torch.Generator().manual_seed(0))
    wanted = penalty(model.eval(), split.images / 255, split.labels).item()
    # The forward passes differ in memory format alone.
    assert found["misalignment"] == pytest.approx(wanted, rel=1e-4)
    assert found["misalignment"] > 0
    assert len({found[metrics.FORM + name] for name in metrics.FORMS}) == len(metrics.FORMS)


@pytest.mark.long
def test_smoke_takes_every_method_through_the_whole_path(tmp_path, capsys, monkeypatch):
    # Nine tenths of the time of such a run is its own picture.
    monkeypatch.setattr(ending, "plot_curves", lambda *args, **options: None)
    out = tmp_path / "smoke.json"
    assert grid.main(["--scale", "smoke", "--out", str(out), "--work", str(tmp_path / "work")]) == 0
    summary = json.loads(out.read_text())
    assert (summary["missing"], summary["missing_strong"]) == (0, 0)
    assert {cell["method"] for cell in summary["runs"]} == set(methods.NAMES)
    assert set(summary["runs"][0]["strong"]["accuracy"]) == {"pgd-50-10", "autoattack"}
    assert summary["runs"][0]["strong"]["masking"]["verdict"] in ("ok", "suspicious")
    assert all(0 <= row["misalignment"] <= 2 for cell in summary["runs"] for row in cell["epochs"])
    assert {path.name for path in tmp_path.glob("*.svg")} == {"smoke.svg", "smoke-time.svg", "smoke-lam.svg"}
    assert "time over gradalign" in capsys.readouterr().out
