"""The list of the queue: the committed one, the order of its rows, and that every mistake names its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.evidence.entries import read_entries
from benchmarks.evidence.queue import ROOT
from benchmarks.paper.cells import Strong

TINY = {"limit": 80, "validation": 16, "test_limit": 16}


def read(folder, content, root=None):
    path = folder / "list.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return read_entries(path, root=root or folder, work=folder / "work", results=folder / "results")


def entry(**fields):
    own: dict[str, Any] = {"name": "one", "result": "one.json", "note": "a note", "eps": ["8/255"], "seeds": [0]}
    own["variants"] = {"fgsm": {"method": "fgsm"}}
    return {name: value for name, value in {**own, **fields}.items() if value is not ...}


def test_the_committed_list_and_its_order(tmp_path):
    (tmp_path / "cifar10-jpeg.tar.xz").touch()
    path = ROOT / "benchmarks" / "evidence" / "queue.yaml"
    first, *_ = read_entries(path, root=tmp_path, work=Path("work"), results=Path("results"))
    assert (first.name, first.result) == ("narrow", Path("results/evidence.json"))
    variants = ["fgsm", "n-fgsm", "elle-a fast", "n-fgsm+elle-a fast"]
    assert [(cell.name, round(255 * cell.config.eps), cell.config.seed) for cell in first.cells] == [
        (name, eps, seed) for seed in (0, 1) for eps in (16, 8) for name in variants
    ]
    assert {cell.asked for cell in first.cells} == {Strong("pgd-50-10,autoattack", 1000, masking=False)}
    for cell in first.cells:
        config = cell.config.resolved()
        assert (config.data, config.model, config.width, config.epochs) == ("image-folder", "preact", 16, 30)
        assert (config.augment, config.limit, config.validation) == (True, None, 1024)
        assert config.root == str(tmp_path / "cifar10-jpeg.tar.xz")
        fast = (config.skip_below, config.triplet_fraction) == (0.01, 0.125)
        assert fast is cell.name.endswith("fast")


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
