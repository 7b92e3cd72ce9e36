"""The line under a table."""

from __future__ import annotations

from benchmarks.tables.source import source

MACHINE = {"processor": "EPYC", "cores": 2, "torch_threads": 1}


def run(commit, seconds=60.0, threads=1, **more):
    machine = {**MACHINE, "torch_threads": threads}
    return {"commit": commit, "machine": machine, "versions": {"torch": "2.13.0"}, "training_seconds": seconds, **more}


def test_of_a_program_with_one_provenance():
    content = {"seconds": 119.6, "commit": "abcdef012345", "machine": MACHINE, "versions": {"torch": "2.13.0"}}
    said = source("a.json", {**content, "command": ["python", "-m", "a"]})
    assert said == (
        "<sub>From `benchmarks/results/a.json`; commit abcdef012345; EPYC, 2 cores, 1 thread; torch 2.13.0; 120 s; "
        "`python -m a`.</sub>"
    )


def test_of_many_trainings():
    runs = [run("aaaaaaa", 3000.0), run("bbbbbbb-dirty", 5000.0, commits=["aaaaaaa", "ccccccc"], threads=2)]
    content = {"runs": runs, "missing": 3, "failed": [{"error": "nan"}], "command": "make"}
    assert source("a.json", content) == (
        "<sub>From `benchmarks/results/a.json`; 2 of 5 trainings are done; 1 failed; commits aaaaaaa, bbbbbbb-dirty, "
        "ccccccc; EPYC, 2 cores, 1 or 2 threads; torch 2.13.0; 2.2 h for all trainings; `make`.</sub>"
    )


def test_many_commits_are_counted_and_what_is_none_is_left_out():
    rows = {str(place): {"commit": f"{place}" * 8} for place in range(5)} | {"none": {"commit": "unfinished"}}
    assert source("a.json", {"rows": rows, "steps": [{"commit": "f" * 8}]}) == (
        "<sub>From `benchmarks/results/a.json`; 5 commits, which the file names.</sub>"
    )
    assert source("a.json", {"attacks": {"pgd": {"seconds": [1.0]}}}) == "<sub>From `benchmarks/results/a.json`.</sub>"
