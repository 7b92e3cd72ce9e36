"""The tables of the grid's files, on made-up runs."""

from __future__ import annotations

from typing import Any

from benchmarks.paper.doc_tables import at_eps, digits, methods, robust, stronger, trainings


def run(variant, eps=0.1, seed=0, pgd=0.2, collapsed=False, strong=None, models=None, **more):
    accuracy = {name: {"accuracy": value} for name, value in (("clean", 0.5), ("pgd-20", pgd))}
    found: dict[str, Any] = {"variant": variant, "config": {"eps": eps}, "seed": seed, "accuracy": accuracy}
    return {**found, "collapsed": collapsed, "strong": strong, "models": models or {}, "train_adv": 0.3, **more}


def attacked(pgd, verdict="ok", **models):
    accuracy = {"pgd-50-10": {"accuracy": pgd}, "autoattack": {"accuracy": pgd / 2}}
    return {"accuracy": accuracy, "masking": {"verdict": verdict}, "models": models}


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_variants_with_several_seeds_at_each_eps():
    runs = [run("a", eps, seed, 0.1 * (seed + 1), seed == 1) for eps in (0.1, 0.2) for seed in (0, 1)]
    assert rows(robust({"eps": [0.1, 0.2], "runs": [*runs, run("b", 0.2)]})) == [
        ["a", "15.0 (10.0 to 20.0)", "1 of 2", "15.0 (10.0 to 20.0)", "1 of 2"]
    ]


def test_a_table_with_the_stronger_attacks_that_were_made():
    runs = [run("a", strong=attacked(0.2)), run("a", 0.2, strong=attacked(0.1, "undecided")), run("b"), run("b", 0.2)]
    runs.append(run("c", 0.2, strong=attacked(0.3)))
    assert rows(stronger({"eps": [0.1, 0.2], "runs": runs})) == [
        ["a", "20.0", "10.0", "10.0", "5.0", "undecided at 51/255"],
        ["c", "-", "-", "30.0", "15.0", "ok"],
    ]
    plain, both = (digits({"runs": [run("a", strong=each)]}) for each in (None, attacked(0.2)))
    assert rows(plain) == [["a", "30.0", "50.0", "20.0", "0 of 1"]]
    assert rows(both) == [["a", "30.0", "50.0", "20.0", "20.0", "10.0", "0 of 1"]]


def test_all_methods_in_two_columns_with_the_time_of_their_steps():
    runs = [run("fgsm", collapsed=True, pgd=0.0), run("a"), run("a", seed=1, pgd=0.9), run("b"), run("b", 0.2)]
    table = methods({"runs": runs, "step_times": {"ms": {"fgsm": 10.0, "a": 25.0}}}, 0.1)
    assert rows(table) == [
        ["fgsm", "50.0", "0.0, collapsed", "1.00", "b", "50.0", "20.0", "-"],
        ["a", "50.0", "20.0", "2.50", "", "", "", ""],
    ]


def test_the_epochs_that_were_collapsed():
    epochs = [{"epoch": epoch, "collapsed": epoch in (2, 3, 4, 7)} for epoch in range(1, 9)]
    runs = [run("a", strong=attacked(0.1, "suspicious"), epochs=epochs), run("b", epochs=epochs[:1]), run("c", 0.2)]
    assert rows(at_eps({"runs": runs}, 0.1)) == [
        ["a", "20.0", "10.0", "5.0", "suspicious", "2 to 4, 7"],
        ["b", "20.0", "-", "-", "-", "none"],
    ]


def test_long_trainings_with_their_other_weights():
    weak = {"best": {"accuracy": {"pgd-20": {"accuracy": 0.25}}}}
    strong = attacked(0.2, best={"pgd-50-10": {"accuracy": 0.22}})
    one = [run("a", seed=seed, strong=strong, models=weak, full_share=share) for seed, share in ((0, 0.5), (1, 0.7))]
    # Of another one the stronger attacks are still to be made.
    found = rows(trainings({"runs": [*one, run("b", models=weak), run("c", strong=attacked(0.1))]}))
    same = ["20.0 (20.0 to 20.0)", "20.0 (20.0 to 20.0)", "10.0 (10.0 to 10.0)", "22.0 (22.0 to 22.0)"]
    assert found == [
        ["25.5/255", "a", "0, 1", "50.0 (50.0 to 50.0)", *same, "-", "60 %", "0 of 2"],
        ["25.5/255", "b", "0", "50.0", "20.0", "-", "-", "(25.0)", "-", "-", "0 of 1"],
        ["25.5/255", "c", "0", "50.0", "20.0", "10.0", "5.0", "-", "-", "-", "0 of 1"],
    ]
