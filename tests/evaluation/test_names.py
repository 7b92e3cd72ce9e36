"""Attacks by name, and the packages they need."""

import subprocess
import sys

import pytest

from elle_fast.evaluation import Attack, names, parse_attacks


@pytest.mark.parametrize(
    "text",
    [
        *("", "pgd", "pgd-0", "pgd-10-0", "PGD-10", "clean,,fgsm", "pgd-10-2-3", "pgd-010", "pgd-", "-20", "20"),
        *(
            "auto-attack",
            "autoattack-5",
            "clean-1",
            "noise",
            "noise-3-2",
            "square-0",
            "square-5-2",
            "foolbox",
            "pgd 20",
            *(
                "pgd-20-eps",
                "pgd-20-eps/0",
                "pgd-20-eps/2.5",
                "pgd-eps/8",
                "pgd-20-eps/8-2",
                "fgsm-eps/8",
                "noise-2-eps/8",
            ),
        ),
    ],
)
def test_unknown_attacks(text):
    with pytest.raises(ValueError, match="attacks: expected names among"):
        parse_attacks(text)


def test_what_a_name_means(monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda package: package)
    text = "clean, fgsm,pgd-20,pgd-50-10,noise-7,square,square-9,autoattack,foolbox-pgd,foolbox-pgd-3,foolbox-pgd-3-2"
    assert [(each.kind, each.steps, each.restarts) for each in parse_attacks(text)] == [
        *(("clean", 1, 1), ("fgsm", 1, 1), ("pgd", 20, 1), ("pgd", 50, 10), ("noise", 1, 7), ("square", 5000, 1)),
        *(("square", 9, 1), ("autoattack", 1, 1), ("foolbox-pgd", 20, 1), ("foolbox-pgd", 3, 1), ("foolbox-pgd", 3, 2)),
    ]
    stepped = parse_attacks("pgd-20-eps/8,pgd-20,pgd-50-10-eps/10,foolbox-pgd-3-eps/5")
    assert [(each.steps, each.restarts, each.divisor) for each in stepped] == [
        *((20, 1, 8), (20, 1, 4), (50, 10, 10), (3, 1, 5))
    ]
    with pytest.raises(ValueError, match=r"attacks: expected each name once, got 'pgd-5' twice"):
        parse_attacks("pgd-5,clean, pgd-5")


@pytest.mark.parametrize(
    "name", ["pgd-999999999999", "pgd-10-1000001", "noise-1000001", "square-1000001", "pgd-2-eps/9999999"]
)
def test_numbers_that_would_take_for_ever(name):
    with pytest.raises(ValueError, match=rf"attacks: expected numbers <= 1000000, got '{name}'"):
        parse_attacks(name)
    assert parse_attacks("pgd-1000000")[0].steps == 1_000_000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 5}, "name: expected a string, got 5"),
        ({"kind": "cw"}, "kind: expected one of 'clean', 'fgsm'"),
        ({"kind": None}, "kind: expected one of 'clean', 'fgsm'"),
        ({"steps": 0}, "steps: expected an integer >= 1 and <= 1000000, got 0"),
        ({"steps": 10**12}, "steps: expected an integer >= 1 and <= 1000000"),
        ({"divisor": 0}, "divisor: expected an integer >= 1 and <= 1000000, got 0"),
        ({"restarts": 1.5}, "restarts: expected an integer >= 1 and <= 1000000"),
    ],
)
def test_an_attack_made_by_hand(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Attack(**{"name": "mine", "kind": "pgd", **change})


@pytest.mark.parametrize(
    "name, package", [("autoattack", "pyautoattack"), ("square", "pyautoattack"), ("foolbox-pgd", "foolbox")]
)
def test_a_missing_package_is_named_with_the_way_to_get_it(name, package, monkeypatch):
    monkeypatch.setattr(names, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"'{name}' needs the package {package}: pip install 'elle-fast\[eval\]'"):
        parse_attacks(f"clean,{name}")


def test_the_packages_are_imported_where_they_are_used():
    script = "import sys, elle_fast.evaluation as r; r.parse_attacks('pgd-3'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "elle_fast.evaluation.points"} <= set(done.stdout.split())
    others = {"pyautoattack", "foolbox", "eagerpy", "scipy", "sklearn", "elle_fast.data", "elle_fast.recipes"}
    assert not others & set(done.stdout.split())
