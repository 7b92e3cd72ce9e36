"""The tables of the studies' files, on made-up rows."""

from __future__ import annotations

from benchmarks.studies.doc_tables import auto_lam, gradient_bound, precision_training


def rows(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_how_runs_end_under_each_bound():
    def row(ended, bound, pgd=None):
        more = {} if pgd is None else {"pgd-20": pgd}
        return {"method": "elle", "lam": 4000.0, "max_ratio": bound, "ended": ended, **more}

    found = [row("nan", None), row("stands", 10.0, 0.4), row("stands", 10.0, 0.096), row("collapsed", 10.0, 0.0)]
    found += [row("stands", 100.0, 0.4), row("stands", 100.0, 0.401), row("stands", 1.0, 0.1), row("chance", 1.0, 0.1)]
    assert rows(gradient_bound({"rows": dict(enumerate(found))})) == [
        ["none", "1 NaN", "-", "-", "-"],
        ["100", "2 stand (PGD-20 40 %)", "-", "-", "-"],
        ["10", "2 stand (PGD-20 10 to 40 %), 1 collapsed", "-", "-", "-"],
        ["1", "1 stands (PGD-20 10 %), 1 at chance", "-", "-", "-"],
    ]


def test_a_run_that_ended_in_nan_counts_as_0():
    def row(variant, **numbers):
        return {"cell": "mnist", "variant": variant, **numbers}

    found = [row("tuned", clean=0.9, **{"pgd-20": 0.4}), row("tuned"), row("slope 15", clean=0.1, **{"pgd-20": 0.1})]
    assert rows(auto_lam({"rows": dict(enumerate(found))})) == [
        ["MNIST 0.3", "0, 2, 0, 0", "-", "20.0 (0.0 to 40.0)", "-", "-", "45.0 (0.0 to 90.0)", "-"]
    ]
    last = {"accuracy": {"last": {"clean": 0.5, "pgd-20": 0.25}}, "e_lin": 2e-7, "full_share": 0.5}
    one = {"precision": "bf16", "seed": 1, "ended": "stands", **last}
    content = {"precisions": {"bf16": {}, "fp32": {}}, "rows": {"a": one, "b": {**one, "seed": 0, "ended": "nan"}}}
    assert rows(precision_training(content)) == [
        ["bf16", "NaN, 50.0", "NaN, 25.0", "NaN, 2.0e-7", "NaN, 50", "25.0"],
        ["fp32", "", "", "", "", "-"],
    ]
