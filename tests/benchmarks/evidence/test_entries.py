"""The list of the queue: the committed one, the order of its rows, and that every mistake names its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.detector import closed_loop
from benchmarks.evidence.entries import read_entries
from benchmarks.evidence.queue import ROOT
from benchmarks.paper.cells import Strong
from benchmarks.paper.settings import SETTINGS

TINY = {"limit": 80, "validation": 16, "test_limit": 16}


def read(folder, content, root=None):
    path = folder / "list.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return read_entries(path, root=root or folder, work=folder / "work", results=folder / "results")


def entry(**fields):
    own: dict[str, Any] = {"name": "one", "result": "one.json", "note": "a note", "eps": ["8/255"], "seeds": [0]}
    own["variants"] = {"fgsm": {"method": "fgsm"}}
    return {name: value for name, value in {**own, **fields}.items() if value is not ...}


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10-jpeg.tar.xz").touch()
    path = ROOT / "benchmarks" / "evidence" / "queue.yaml"
    found = read_entries(path, root=folder, work=Path("work"), results=Path("results"))
    return {entry.name: entry for entry in found}


def test_the_committed_list_and_its_order(committed):
    assert list(committed) == ["short", "wide", "fastat", "medium", "long", "advlc"]
    assert [len(entry.cells) for entry in committed.values()] == [36, 3, 12, 40, 3, 4]
    first = committed["short"]
    assert first.result == Path("results/short.json")
    variants = ["fgsm", "n-fgsm", "fgsm+paper", "n-fgsm+paper", "fgsm+relative", "n-fgsm+relative"]
    assert [(cell.name, round(255 * cell.config.eps), cell.config.seed) for cell in first.cells] == [
        (name, eps, seed) for seed in (0, 1) for eps in (16, 8, 26) for name in variants
    ]
    for entry in committed.values():
        strong = Strong("pgd-50-10,autoattack", 1000, masking=False, models=True)
        assert entry.name == "medium" or {cell.asked for cell in entry.cells} == {strong}
        for cell in entry.cells:
            config = cell.config.resolved()
            assert (config.precision, config.augment, config.limit, config.test_limit) == ("bf16", True, None, 1000)
            assert Path(config.root or "").name == "cifar10-jpeg.tar.xz"
            assert config.width == (32 if entry.name == "wide" else 16)


def test_the_page_about_the_list_has_its_entries(committed):
    page = (ROOT / "docs" / "results" / "evidence.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert [(name.strip("`"), epochs, count, file.strip("`")) for name, _, epochs, count, _, file in rows] == [
        (entry.name, str(entry.cells[0].config.resolved().epochs), str(len(entry.cells)), entry.result.name)
        for entry in committed.values()
    ]
    files = [ROOT / "benchmarks" / "results" / entry.result.name for entry in committed.values()]
    done = sum(len(json.loads(file.read_text())["runs"]) for file in files if file.exists())
    assert f" {done} of the {sum(len(entry.cells) for entry in committed.values())} rows" in page


def test_the_first_entry_has_the_cells_of_the_closed_loop(committed):
    own = {cell.folder: cell.config for cell in committed["short"].cells}
    root = committed["short"].cells[0].config.root
    for job in closed_loop.jobs():
        cell = closed_loop.cell_of(*job, Path("work/short"), root)
        if cell.folder in own:
            assert own.pop(cell.folder) == cell.config
    assert not own


def test_the_rows_under_the_protocol_of_fastat(committed):
    found = {cell.name: cell.config.resolved() for cell in committed["fastat"].cells}
    for name, config in found.items():
        assert (config.schedule, config.epochs, config.learning_rate) == ("onecycle", 30, 0.1)
        assert (config.average, config.validation, config.drop_last, config.normalize) == (0.9995, 1000, False, False)
        assert config.label_smoothing == (0.6 if name.startswith("liet") else 0.4)
    assert (found["elle as ranked"].lam, found["elle as ranked"].forward) == (1, "split")
    assert found["elle-a fast"].forward == "split"


def test_the_last_entries_answer_their_questions(committed):
    assert {cell.config.resolved().epochs for cell in committed["long"].cells} == {200}
    pgd, advlc, *_ = (cell.config for cell in committed["advlc"].cells)
    assert replace(pgd, lam=None) == advlc  # they differ in the term alone


def test_the_options_of_a_variant_win_over_those_of_its_entry_and_these_over_the_defaults(tmp_path):
    variants = {"a": {"method": "fgsm", "width": 3}, "b": {"method": "fgsm"}}
    (found,) = read(
        tmp_path,
        {
            "defaults": {**TINY, "width": 1, "epochs": 5, "batch_size": 8},
            "entries": [entry(variants=variants, options={"width": 2, "epochs": 6})],
        },
    )
    assert [(cell.config.width, cell.config.epochs, cell.config.batch_size) for cell in found.cells] == [
        (3, 6, 8),
        (2, 6, 8),
    ]
    assert {cell.asked for cell in found.cells} == {None}


def test_a_recipe_wins_over_the_defaults_and_options_win_over_it(tmp_path):
    variants = {"a": {"method": "liet"}, "b": {"method": "elle-a", "average": 0.9}}
    defaults = {**TINY, "epochs": 5, "momentum": 0.5}
    own = entry(recipe="fastat", options={"epochs": 6}, variants=variants)
    (found,) = read(tmp_path, {"defaults": defaults, "entries": [own]})
    a, b = (cell.config for cell in found.cells)
    assert (a.epochs, a.momentum, a.average, a.label_smoothing, a.limit) == (6, 0.95, 0.9995, None, 80)
    assert (b.average, b.label_smoothing, b.forward) == (0.9, 0.4, "split")


def test_an_entry_of_a_setting_has_the_cells_of_the_grid(tmp_path):
    (found,) = read(tmp_path, {"entries": [{"name": "one", "result": "one.json", "setting": "digits-smoke"}]})
    setting = SETTINGS["digits-smoke"]
    assert [(cell.name, cell.config) for cell in found.cells] == setting.cells(None)
    assert {cell.folder.parent for cell in found.cells} == {tmp_path / "work" / "one"}
    assert (found.note, found.result) == (setting.note, tmp_path / "results" / "one.json")
    assert [cell.name for cell in found.cells if cell.asked is not None] == ["fgsm"]


def test_without_a_folder_the_data_are_not_looked_for(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"defaults": {"data": "mnist", "root": "mnist.npz"}, "entries": [entry()]}))
    (found,) = read_entries(path, root=None, work=tmp_path, results=tmp_path)
    assert found.cells[0].config.root == "mnist.npz"


BAD = {
    "no list": ({}, r"entries: expected a list of at least one, got None"),
    "a key that is not known": ({"default": {}, "entries": [entry()]}, r"default: not .*; did you mean defaults\?"),
    "an entry without a field": ({"entries": [entry(eps=...)]}, r"entry 'one': eps: expected a value, got none"),
    "a field that is not known": ({"entries": [entry(seed=[0])]}, r"entry 'one': seed: not .*; did you mean seeds\?"),
    "an option that is not known": (
        {"defaults": {"epocs": 3}, "entries": [entry()]},
        r"entry 'one', variant 'fgsm': epocs: not an option of a run; did you mean epochs\?",
    ),
    "a type": (
        {"entries": [entry(variants={"fgsm": {"method": "fgsm", "epochs": "3"}})]},
        r"entry 'one', variant 'fgsm': epochs: expected an int",
    ),
    "a range": ({"entries": [entry(eps=["300/255"])]}, r"entry 'one', variant 'fgsm': eps: expected .* got 1\.17"),
    "a seed": ({"entries": [entry(seeds=[0, "one"])]}, r"entry 'one', variant 'fgsm': seed: expected an int"),
    "a combination": (
        {"entries": [entry(variants={"fgsm": {"method": "fgsm", "skip_below": 0.1}})]},
        r"entry 'one', variant 'fgsm': skip_below: ",
    ),
    "an eps among the options": (
        {"entries": [entry(options={"eps": 0.1})]},
        r"entry 'one', variant 'fgsm': eps: expected in the list 'eps' of the entry, got it among the options",
    ),
    "an attack": ({"entries": [entry(attacks="pdg-20")]}, r"entry 'one': attacks: .*pdg-20"),
    "samples without an attack": ({"entries": [entry(samples=4)]}, r"entry 'one': samples: expected none without"),
    "samples": ({"entries": [entry(attacks="clean", samples=0)]}, r"entry 'one': samples: expected an int"),
    "models without an attack": ({"entries": [entry(models=True)]}, r"entry 'one': models: expected none without"),
    "models": (
        {"entries": [entry(attacks="clean", models="best")]},
        r"entry 'one': models: expected True or False, got 'best'",
    ),
    "a recipe": (
        {"entries": [entry(recipe="fast")]},
        r"entry 'one', variant 'fgsm': recipe: expected one of 'paper', 'fastat', .* got 'fast'",
    ),
    "a setting": (
        {"entries": [{"name": "one", "result": "one.json", "setting": "digit"}]},
        r"entry 'one': setting: expected one of 'digits', .* got 'digit'",
    ),
    "a setting with seeds": (
        {"entries": [{"name": "one", "result": "one.json", "setting": "digits", "seeds": [0]}]},
        r"entry 'one': seeds: not a field of an entry with a setting",
    ),
    "two entries in one file": (
        {"entries": [entry(), entry(name="two")]},
        r"entry 'two': result: expected one of its own, got that of another entry",
    ),
    "two entries of one name": ({"entries": [entry(), entry(result="2")]}, r"entry 'one': name: expected one of its"),
    "a run twice": ({"entries": [entry(seeds=[0, 0])]}, r"entry 'one': expected runs that differ in variant, eps or"),
    "a path for a name": ({"entries": [entry(name="../one")]}, r"entry '../one': name: expected the name of a file"),
    "the folder above": ({"entries": [entry(name="..")]}, r"entry '..': name: expected the name of a file"),
    "a path for a variant": (
        {"entries": [entry(variants={"a/b": {"method": "fgsm"}})]},
        r"entry 'one', variant 'a/b': expected the name of a file or folder, without a path",
    ),
    "options that are a list": ({"entries": [entry(options=["width"])]}, r"entry 'one': options: expected lines"),
}


@pytest.mark.parametrize("content,said", BAD.values(), ids=BAD)
def test_a_mistake_is_named_with_its_place(tmp_path, content, said):
    with pytest.raises((TypeError, ValueError), match=rf"list.yaml: {said}"):
        read(tmp_path, content)


def test_an_option_given_twice_and_text_that_is_no_yaml(tmp_path):
    for text, said in (("defaults: {}\ndefaults: {}\n", "defaults: given twice"), ("entries: [", "not valid YAML")):
        with pytest.raises(ValueError, match=rf"list.yaml: .*{said}"):
            read(tmp_path, text)


def test_data_that_are_not_there(tmp_path):
    content = {"defaults": {"data": "mnist", "root": "mnist.npz"}, "entries": [entry()]}
    with pytest.raises(FileNotFoundError, match=r"entry 'one', variant 'fgsm': root: .*mnist.npz', which is not there"):
        read(tmp_path, content)
