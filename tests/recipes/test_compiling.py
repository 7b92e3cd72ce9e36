"""Runs whose model is compiled: which graphs there are, and the same bits where the compiler changes nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elle_fast import methods
from elle_fast.recipes import checkpoint, compiling
from elle_fast.recipes import train as training
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, train
from tests.recipes.test_train import CONFIG, STEPS_PER_EPOCH, assert_same_run, dataset, quiet

COMPILED = replace(CONFIG, compile=True, epochs=2, validation=8, eval_attacks="clean")


@pytest.fixture(autouse=True)
def compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs(monkeypatch):
    """The rows of each graph that is compiled, and of each that runs; they compute what the model does."""
    made, ran = [], []

    def backend(module, inputs):
        rows = next((given.shape[0] for given in inputs if given.dim() == 4 and given.shape[-1] == 8), 0)
        made.append(rows)

        def run(*given):
            ran.append(rows)
            return module.forward(*given)

        return run

    monkeypatch.setattr(compiling, "BACKEND", backend)
    return made, ran


@pytest.mark.parametrize(
    "options, sizes",
    [
        ({"method": "fgsm"}, [16, 16]),
        ({}, [16, 64]),
        ({"triplet_fraction": 0.25, "skip_below": 0.01, "precision": "bf16", "average": 0.9}, [16, 16, 12]),
    ],
)
def test_each_pass_is_one_graph_and_none_is_compiled_twice(options, sizes, graphs, monkeypatch, tmp_path):
    made, ran = graphs
    config, step, of_steps = replace(COMPILED, **options), training._Loop._step, []

    def counted(loop, x, y):
        ran.clear()
        step(loop, x, y)
        of_steps.append(list(ran))

    monkeypatch.setattr(training._Loop, "_step", counted)
    train(config, tmp_path / "compiled", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", step)
    assert of_steps == [sizes] * 2 * STEPS_PER_EPOCH
    kinds = len(sizes) + ("skip_below" in options)  # light steps have a graph of the triplets without a gradient
    assert len(made) <= kinds + 1  # and the first of all, which tells whether torch can compile
    train(replace(config, compile=False), tmp_path / "plain", dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "compiled", tmp_path / "plain")


def test_a_last_batch_that_is_not_full_has_graphs_of_its_own(graphs, tmp_path):
    made, _ = graphs
    config = replace(COMPILED, batch_size=20, drop_last=False)  # of 136: 6 of 20, and one of 16
    train(config, tmp_path, dataset=dataset(), console=quiet())
    assert sorted(made) == [0, 16, 20, 64, 80]


def test_a_killed_run_ends_with_the_same_bits_and_a_plain_model(graphs, monkeypatch, tmp_path):
    train(COMPILED, tmp_path / "whole", dataset=dataset(), console=quiet())
    step = training._Loop._step

    def killed(loop, x, y):
        if loop.run.step == 12:
            raise KeyboardInterrupt
        return step(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(COMPILED, tmp_path / "killed", dataset=dataset(), console=quiet())
    monkeypatch.setattr(training._Loop, "_step", step)
    with pytest.raises(ValueError, match=r"compile = False \(checkpoint: True\)"):
        train(replace(COMPILED, compile=False), tmp_path / "killed", resume=True, dataset=dataset(), console=quiet())
    train(COMPILED, tmp_path / "killed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert not [name for name in checkpoint.load(tmp_path / "whole" / CHECKPOINT)["model"] if "_orig_mod" in name]


def test_where_torch_cannot_compile_nothing_is_written(monkeypatch, tmp_path):
    def backend(module, inputs):
        raise RuntimeError("No working C++ compiler found\nin a long text")

    monkeypatch.setattr(compiling, "BACKEND", backend)
    with pytest.raises(RuntimeError, match=r"^compile: expected that torch.compile works here, .*No working C\+\+.*$"):
        train(COMPILED, tmp_path / "run", dataset=dataset(), console=quiet())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["gradalign", "cure", "llr", "fast-bat", "cure-fgsm"])
def test_a_method_that_differentiates_a_gradient_is_refused(method):
    with pytest.raises(ValueError, match=rf"^compile: method '{method}' differentiates a gradient"):
        replace(COMPILED, method=method).resolved()


@pytest.mark.parametrize("method", ["slat", "fuap", "slat+elle-a", "fuap+elle"])
def test_a_method_with_hooks_is_refused_before_anything_is_written(method, tmp_path):
    with pytest.raises(
        ValueError, match=rf"^compile: method '{re.escape(method)}' has .*hook.* not apply \(got True\)"
    ):
        train(replace(COMPILED, method=method), tmp_path / "run", dataset=dataset(), console=quiet())
    assert not (tmp_path / "run").exists()


def compilable(name):
    row = methods.TABLE[name]
    return "D" not in row.passes.split() and "compile" not in row.refuses


@pytest.mark.parametrize("method", [name for name in methods.TABLE if compilable(name)])
def test_a_compiled_step_of_each_method_has_the_same_bits(method, graphs):
    _, ran = graphs
    states = []
    for compiled in (True, False):
        config = replace(COMPILED, method=method, lam=None, compile=compiled, model="mlp", width=4)
        run = Run(config.resolved(), dataset(), Path(), Ranks(timeout=1.0))
        run.model.train()
        ran.clear()
        for x, y in run.upcoming(2):
            run.take_step(x, y)
            run.step += 1
        assert bool(ran) == compiled
        states.append([*run.model.state_dict().values(), run.meter.sums])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchs_own_compiler_trains_alike(tmp_path):
    """One epoch: inductor's sums have another order, and roundings of 1e-7 grow over eight steps."""
    config = replace(COMPILED, epochs=1, method="fgsm", model="mlp", width=8)
    for name in ("compiled", "plain"):
        train(replace(config, compile=name == "compiled"), tmp_path / name, dataset=dataset(), console=quiet())
    one, two = (checkpoint.load(tmp_path / name / CHECKPOINT)["history"] for name in ("compiled", "plain"))
    for first, second in zip(one["steps"], two["steps"], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    assert one["steps"][-1]["loss"] != one["steps"][0]["loss"]
