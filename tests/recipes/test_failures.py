"""What goes wrong around a run: full disks, failing pictures, signals, bad arguments, unfit checkpoints, one class."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elle_fast._core import devices
from elle_fast.recipes import checkpoint, cli, demo, distributed, plot
from elle_fast.recipes import evaluate as report
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.checked import parse_number
from elle_fast.recipes.distributed import Ranks, local_device, process_group
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.logs import RunLog
from elle_fast.recipes.provenance import provenance
from elle_fast.recipes.stopping import stop_requests
from elle_fast.recipes.train import CHECKPOINT, PICTURE, RESULT, train
from tests._core.test_files import full_disk
from tests.recipes.test_train import CONFIG, STEPS_PER_EPOCH, dataset, quiet

TINY = replace(CONFIG, width=2, epochs=1, validation=8, eval_attacks="clean")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(ending, "plot_curves", lambda *args, **options: None)
        train(TINY, folder, dataset=dataset(), console=quiet())
    return folder / CHECKPOINT


def test_a_picture_that_fails_is_a_warning_and_the_result_is_there(tmp_path, monkeypatch):
    def fail(*args, **options):
        assert (tmp_path / RESULT).exists()
        raise ValueError("no [red] canvas")

    monkeypatch.setattr(ending, "plot_curves", fail)
    console = quiet()
    result = train(TINY, tmp_path, dataset=dataset(), console=console)
    assert json.loads((tmp_path / RESULT).read_text()) == result
    assert "warning: no picture: ValueError: no [red] canvas\n" in console.file.getvalue()


def test_the_demo_tells_its_results_without_a_picture(tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("no canvas")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "plot_curves", fail)
    monkeypatch.setattr(demo, "STRONG", "pgd-2")
    short = replace(demo.SETTING, epochs=1, width=2, limit=136, validation=8, test_limit=20, image_size=8)
    monkeypatch.setattr(demo, "SETTING", replace(short, eval_attacks="clean,pgd-1"))
    threads = torch.get_num_threads()
    assert demo.main() == 1
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "warning: no picture: RuntimeError: no canvas" in said
    assert "enlarged from 8x8 to 8x8 pixels" in said  # it says what the setting is
    assert "elle-a" in said
    assert "Not what was expected" in said
    # The commands it tells are commands.
    checkpoint_of, *options = said.split("elle-fast eval ")[1].split("\n")[0].split()
    assert checkpoint.load(checkpoint_of)["config"]["method"] == "elle-a"
    assert options == ["--attacks", "clean,pgd-20,autoattack"]
    last = said.splitlines()[-1]
    assert last.startswith("Next, your own pictures: elle-fast train ")
    words = last.split("elle-fast ")[1].replace("PICTURES", str(tmp_path)).split()
    assert cli.main([*words, "--print-config"]) == 0


@pytest.mark.parametrize(
    "best, fgsm, collapsed, elle_a, expected",
    [
        (0.5, 0.01, True, 0.5, True),
        (0.3, 0.01, True, 0.5, True),
        (0.5, 0.06, True, 0.5, False),
        (0.5, 0.01, False, 0.5, False),
        (0.5, 0.01, True, 0.3, False),
    ],
)
def test_what_the_demo_expects(best, fgsm, collapsed, elle_a, expected):
    def result(strong, fallen):
        return {"accuracy": {demo.STRONG: {"accuracy": strong}}, "collapsed": fallen, "train_adv": 0.9}

    results = {"fgsm": result(fgsm, collapsed), "elle-a": result(elle_a, False)}
    rows = [{"epoch": 1, "val_pgd": 0.1}, {"epoch": 2, "val_pgd": best}, {"epoch": 3, "val_pgd": 0.0}]
    sentence, found = demo.verdict(results, {"fgsm": {"epochs": rows}})
    assert found == expected
    if expected:
        assert sentence.startswith(f"FGSM collapsed: in epoch 2 {best:.0%} of the watched images withstood PGD-10.")
    else:
        assert f"fgsm {fgsm:.1%}, elle-a {elle_a:.1%}" in sentence


@pytest.mark.parametrize("ever, said", [(True, "collapsed    first in epoch 3"), (False, "not robust   in any epoch")])
def test_the_last_lines_say_whether_a_run_was_ever_robust(ever, said, tmp_path, monkeypatch, capsys):
    found = {"accuracy": {}, "models": {}, "collapsed": ever, "collapsed_in_epoch": 3, "never_robust": not ever}
    monkeypatch.setattr(training, "train", lambda *args, **options: found)
    assert cli.main(["train", "--device=cpu", "--out", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    (tmp_path / PICTURE).touch()
    cli.main(["train", "--device=cpu", "--out", str(tmp_path)])
    assert f"picture      {tmp_path / PICTURE}\n" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "agg"])
def test_a_picture_is_drawn_whatever_backend_the_environment_asks_for(backend, tmp_path):
    script = f"""
import os
from elle_fast.recipes.plot import new_figure, write_figure
figure = new_figure()
figure.subplots()
write_figure(figure, {str(tmp_path / "x.png")!r})
assert os.environ["MPLBACKEND"] == {backend!r}
import matplotlib
print(matplotlib.rcParams._get("backend"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "MPLBACKEND": backend, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    if backend == "agg":
        assert done.stdout == "agg\n"


def test_a_result_that_cannot_be_written_is_printed(tmp_path, monkeypatch):
    def write(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(ending, "write_json", write)
    console = quiet()
    with pytest.raises(OSError, match="No space left on device"):
        train(TINY, tmp_path, dataset=dataset(), console=console)
    assert "clean" in console.file.getvalue().splitlines()[-1]
    assert "of 40 test images" in console.file.getvalue()


def test_an_evaluation_that_cannot_be_written_is_printed(finished, tmp_path, monkeypatch):
    def write(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(report, "write_json", write)
    console = quiet()
    options = EvalOptions(finished, "clean", samples=40, device="cpu", json=tmp_path / "a.json")
    monkeypatch.setattr(checkpoint, "check_same_data", lambda *args: None)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.json'"):
        report.evaluate_checkpoint(options, dataset=replace(dataset(), name="digits"), console=console)
    assert console.file.getvalue().count("of 40 test images") == 1
    assert (tmp_path / "a.json.partial").exists()


def test_a_full_disk_ends_a_run_with_the_name_of_the_file_and_the_cause(tmp_path, monkeypatch, capsys):
    arguments = ["train", "--width=2", "--epochs=1", "--limit=64", "--test-limit=20", "--device=cpu"]
    with full_disk():
        assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith(f"File too large: '{tmp_path / 'run' / CHECKPOINT}'\n")
    assert list((tmp_path / "run").iterdir()) == []


def test_tensorboard_on_a_full_disk_is_named_without_a_traceback(tmp_path, capfd):
    row = {"step": 1, **{f"number {place}": 0.5 for place in range(200)}}
    log = RunLog(tmp_path, "", 1, {"steps": [], "epochs": []}, quiet())

    def write_rows():
        with log:
            while True:
                log.step(row, "")

    with full_disk(limit=0), pytest.raises(OSError, match=r"File too large: '.*tensorboard'"):
        write_rows()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_signal_that_the_parent_ignores_stays_ignored(number, handler):
    before = signal.signal(number, handler)
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), number)
            assert asked() == (handler == signal.SIG_DFL)
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


def test_a_handler_that_is_not_pythons_is_left_alone(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *args: pytest.fail("a handler was set"))
    with stop_requests() as asked:
        assert not asked()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"config": None}, "config: expected a TrainConfig, got None"),
        ({"config": {}}, "config: expected a TrainConfig, got"),
        ({"folder": None}, "folder: expected a path, got None"),
        ({"folder": 5}, "folder: expected a path, got 5"),
        ({"resume": "no"}, "resume: expected True or False, got 'no'"),
        ({"overwrite": 1}, "overwrite: expected True or False, got 1"),
        ({"dataset": "digits"}, "dataset: expected None or a Dataset, got 'digits'"),
        ({"console": sys.stderr}, "console: expected None or a rich.console.Console, got"),
        ({"timeout": "a"}, "timeout: expected a finite number in"),
        ({"timeout": 0}, "timeout: expected a finite number in"),
        ({"measure": 5}, "measure: expected None or a function"),
        ({"config": replace(TINY, device="gpu")}, "device: expected one that torch can use here, got 'gpu'"),
    ],
)
def test_train_refuses_arguments_by_name_and_leaves_nothing(change, message, tmp_path):
    given: dict[str, Any] = {"config": TINY, "folder": tmp_path / "run", "dataset": dataset(), "console": quiet()}
    with pytest.raises((TypeError, ValueError), match=message):
        train(**{**given, **change})
    assert not (tmp_path / "run").exists()


def test_a_process_that_has_ended_is_known_before_and_after_its_parent_has_asked():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not distributed._has_ended(platform.node(), process.pid)
    process.kill()
    for _ in range(500):
        if distributed._has_ended(platform.node(), process.pid):
            break
        time.sleep(0.01)
    assert distributed._has_ended(platform.node(), process.pid)  # a zombie
    process.communicate()
    assert distributed._has_ended(platform.node(), process.pid)
    assert not distributed._has_ended("another machine", process.pid)
    assert not distributed._has_ended(platform.node(), os.getpid())


@pytest.mark.parametrize("error", ["loss: not finite", "gloo/pair.cc: Connection closed by peer\nand more"])
def test_only_a_broken_connection_of_several_ranks_is_said_to_be_one(error, monkeypatch):
    with closing(Ranks(1.0)) as ranks:
        with pytest.raises(RuntimeError, match=rf"^{error}$"), ranks.naming_the_lost():
            raise RuntimeError(error)
        monkeypatch.setattr(ranks, "count", 3)
        for gone, said in (
            ([2], "rank 2 of 3 is gone"),
            ([], "one of 3 ranks is gone, or took longer than the timeout"),
        ):
            monkeypatch.setattr(ranks, "_gone", lambda gone=gone: gone)
            with pytest.raises(RuntimeError) as raised, ranks.naming_the_lost():
                raise RuntimeError(error)
            expected = f"{said}; start all of them again with --resume (gloo/pair.cc: Connection closed by peer)"
            assert str(raised.value) == (expected if "gloo" in error else error)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: local_device(5), "device: expected a string, got 5"),  # type: ignore[arg-type]
        (lambda: process_group("cpu", 1.0).__enter__(), "device: expected a torch.device, got 'cpu'"),  # type: ignore[arg-type]
        (lambda: process_group(torch.device("cpu"), 0.0).__enter__(), "timeout: expected a finite number in"),
        (lambda: Ranks("a"), "timeout: expected a finite number in"),  # type: ignore[arg-type]
        (lambda: report.evaluate_checkpoint("c.pt"), "options: expected EvalOptions, got 'c.pt'"),  # type: ignore[arg-type]
        (
            lambda: report.evaluate_checkpoint(EvalOptions("c.pt"), dataset=5),  # type: ignore[arg-type]
            "dataset: expected None or a Dataset, got 5",
        ),
        (lambda: plot.write_figure(None, None), "path: expected a path, got None"),  # type: ignore[arg-type]
        (lambda: plot.write_figure(None, "x.pdf"), "the path's ending: expected one of '.png', '.svg', got '.pdf'"),
        (lambda: plot.plot_curves(None, "x.png", title=""), "runs: expected histories by label, got None"),  # type: ignore[arg-type]
        (lambda: plot.styles([1]), r"labels: expected strings, got \[1\]"),  # type: ignore[list-item]
        (lambda: checkpoint.save("c.pt", None), "state: expected a dictionary, got None"),  # type: ignore[arg-type]
        (lambda: parse_number(5), "text: expected a string, got 5"),  # type: ignore[arg-type]
        (lambda: provenance("ls"), "command: expected None or a list of strings, got 'ls'"),  # type: ignore[arg-type]
    ],
)
def test_other_functions_refuse_arguments_by_name(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_string_serves_as_a_folder(tmp_path):
    train(TINY, str(tmp_path / "run"), dataset=dataset(), console=quiet())
    assert (tmp_path / "run" / RESULT).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"step": 10**6},
        {"step": STEPS_PER_EPOCH - 1},
        {"history": {"steps": [], "epochs": []}},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"criterion": {}},
        {"criterion": {"lam": 3}},
        {"rng": {}},
        {"rng": {"cpu": torch.zeros(3), "cuda": None}},
        {"model": {}},
        {"shape": {"in_shape": [1, 8, 9], "classes": 3, "mean": None, "std": None}},
    ],
    ids=str,
)
def test_a_checkpoint_that_does_not_fit_the_run_is_one_error_that_names_the_file(change, finished, tmp_path):
    path = tmp_path / CHECKPOINT
    checkpoint.save(path, {**checkpoint.load(finished), **change})
    with pytest.raises(ValueError, match=rf"(checkpoint|data): expected .* '{path}'"):
        train(TINY, tmp_path, resume=True, dataset=dataset(), console=quiet())
    assert [each.name for each in tmp_path.iterdir()] == [CHECKPOINT]


@pytest.mark.parametrize("change", ["momentum", "state", "shape"])
def test_an_optimizer_of_another_run_is_refused(change, finished, tmp_path):
    saved = checkpoint.load(finished)
    if change == "momentum":
        saved["optimizer"]["param_groups"][0]["momentum"] = 0.1
    elif change == "state":
        saved["optimizer"]["state"] = {}
    else:
        saved["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    checkpoint.save(tmp_path / CHECKPOINT, saved)
    with pytest.raises(ValueError, match=rf"checkpoint: .* got '{tmp_path / CHECKPOINT}': optimizer: expected"):
        train(TINY, tmp_path, resume=True, dataset=dataset(), console=quiet())


@pytest.mark.parametrize("split", ["training", "test"])
def test_one_class_is_warned_of(split, tmp_path):
    whole, console = dataset(), quiet()
    one = {"training": "train", "test": "test"}[split]
    images = getattr(whole, one)
    train(TINY, tmp_path, dataset=replace(whole, **{one: images[images.labels == 1]}), console=console)
    assert console.file.getvalue().count(f"warning: all {split} images are of one class") == 1
    console = quiet()
    train(TINY, tmp_path, overwrite=True, dataset=whole, console=console)
    assert "warning" not in console.file.getvalue()


def test_large_pictures_with_the_lam_of_small_ones_are_warned_of(tmp_path):
    def doubt(side: int, **options: Any) -> str | None:
        return replace(TINY, **{"data": "image-folder", "method": "elle-a", **options}).resolved().doubt_of_lam(side)

    said = "lam 4000 is the default of small pictures, and these are of 128 pixels: --image-size 128 brings 10000, or "
    assert doubt(128) == f"{said}give --lam"
    assert [doubt(127), doubt(128, image_size=128), doubt(128, lam=9.0), doubt(128, method="fgsm")] == [None] * 4
    assert doubt(128, data="cifar10") is None

    small, console = dataset(), quiet()
    splits = {
        name: replace(split, images=split.images.repeat(1, 1, 16, 16))
        for name, split in (("train", small.train), ("test", small.test))
    }
    pictures = replace(small, name="image-folder", **splits)
    config = replace(TINY, data="image-folder", lam=None, triplet_fraction=0.1, learning_rate=0.0)
    train(config, tmp_path, dataset=pictures, console=console)
    assert console.file.getvalue().count("warning: lam 4000 is the default of small pictures") == 1


def test_a_device_without_float64_can_train(tmp_path, monkeypatch):
    """Every tensor counts as one on such a device, but for those of the data set's statistics and digests."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if any(
                isinstance(each, torch.Tensor) and each.dtype == torch.float64
                for each in torch.utils._pytree.tree_leaves(made)
            ):
                raise TypeError("Cannot convert a tensor to float64 dtype as the framework doesn't support float64")
            return made

    config = replace(TINY, method="fgsm", epochs=2)
    train(config, tmp_path / "float64", dataset=dataset(), console=quiet())
    given = dataset()
    assert len(given.mean) == len(given.std) == 1  # computed on the CPU, before
    original = training._Loop.run_to_end

    def run_to_end(loop):
        with NoFloat64():
            original(loop)

    monkeypatch.setattr(devices, "has_float64", lambda device: False)

    monkeypatch.setattr(training._Loop, "run_to_end", run_to_end)
    train(config, tmp_path / "float32", dataset=given, console=quiet())
    one, two = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("float64", "float32"))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    for first, second in zip(one["history"]["epochs"], two["history"]["epochs"], strict=True):
        assert first["train_adv"] == second["train_adv"]  # counts are exact
        # Eight sums of float32: each rounds by 2^-24 of at most the whole.
        assert second["loss"] == pytest.approx(first["loss"], rel=8 * 2**-24)
