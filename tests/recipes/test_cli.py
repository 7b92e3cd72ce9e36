import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

import elle_fast
from elle_fast import data
from elle_fast.evaluation import names
from elle_fast.recipes import cli, models, provenance
from elle_fast.recipes import evaluate as report
from elle_fast.recipes.checked import number_text, parse_number
from elle_fast.recipes.config import TrainConfig, TrainOptions
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.schedules import SCHEDULES

TINY = shlex.split("--model cnn --width 2 --eps 0.1 --epochs 1 --batch-size 32")
TINY += shlex.split("--limit 80 --validation 16 --test-limit 16")


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fails(capsys, *arguments):
    """Exit status and the message of a call that fails; a traceback would have come out as an exception."""
    status = cli.main(arguments)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return status, said.err


def test_train_then_eval(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", *TINY, "--method", "elle-a", "--out", str(run)]) == 0
    said = capsys.readouterr()
    assert "pgd-20" in said.out
    assert f"picture      {run / 'curves.png'}" in said.out
    assert "epoch 1/1" in said.err

    path = tmp_path / "eval.json"
    asked = ["--attacks", "clean,fgsm,pgd-3-2", "--samples", "10", "--json", str(path)]
    assert cli.main(["eval", str(run / "checkpoint.pt"), *asked]) == 0
    said = capsys.readouterr().out
    assert said.count("of 10 test images") == 3
    result = json.loads(path.read_text())
    assert (
        said.splitlines()[3] == f"worst case   {result['worst_case']['accuracy']:7.2%}  withstand each of these attacks"
    )
    assert list(result["accuracy"]) == ["clean", "fgsm", "pgd-3-2"]
    assert len(result["accuracy"]["pgd-3-2"]["per_restart"]) == 2
    assert result["eps"] == 0.1


def test_eval_finds_what_train_found(tmp_path, capsys):
    cli.main(["train", *TINY, "--out", str(tmp_path / "run")])
    trained = capsys.readouterr().out.splitlines()[:3]
    cli.main(["eval", str(tmp_path / "run" / "checkpoint.pt")])
    assert capsys.readouterr().out.splitlines()[:3] == trained


def test_resume_and_overwrite(tmp_path, capsys):
    run = ["train", *TINY, "--out", str(tmp_path)]
    assert cli.main(run) == 0
    capsys.readouterr()
    status, message = fails(capsys, *run)
    assert status == 2
    assert "holds a run" in message
    assert cli.main([*run, "--resume"]) == 0
    assert cli.main([*run, "--overwrite", "--seed", "4"]) == 0


def test_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *TINY, "--method", "fgsm"]) == 0
    assert (tmp_path / "runs" / "digits-fgsm-eps0.1-seed0" / "result.json").is_file()


def test_fast_is_the_preset_and_gives_way_to_options(tmp_path):
    assert cli.main(["train", *TINY, "--fast", "--triplet-fraction", "0.5", "--out", str(tmp_path)]) == 0
    config = json.loads((tmp_path / "result.json").read_text())["config"]
    assert (config["method"], config["skip_below"], config["triplet_fraction"]) == ("elle-a", 0.01, 0.5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "imagenet"], "data: expected one of 'digits', 'cifar10'"),
        (["--method", "trades"], "method: expected one of 'plain'"),
        (["--method", "gradalign+elle"], "got 'gradalign+elle': it is a regulariser of local linearity itself"),
        (["--method", "fgsm", "--skip-below", "0.1"], "skip_below: method 'fgsm' has no E_lin term"),
        (["--method", "fgsm", "--fast"], "skip_below: method 'fgsm' has no E_lin term"),
        (["--eps=-1/255"], "eps: expected a finite number in [0, 3.40282e+38]"),
        (["--data", "cifar10"], "root: expected the path of the files of cifar10, got None"),
        (["--data", "cifar10", "--root", "nowhere"], "nowhere"),
        (["--data", "mnist", "--root", "empty"], "empty"),
        (["--data", "image-folder", "--root", "empty"], "empty"),
        (["--device", "gpu"], "device: expected one that torch can use here, got 'gpu'"),
        (["--limit", "100000"], "100000"),
    ],
)
def test_bad_train_options_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    status, said = fails(capsys, "train", *arguments, "--out", "run")
    assert status == 2
    assert message in said
    assert said.startswith("elle-fast train: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eps", ["big", "1/0", "nan", "8/255/2", ""])
def test_eps_that_is_no_number(eps, capsys):
    status, said = fails(capsys, "train", f"--eps={eps}")
    assert status == 2
    assert re.fullmatch(f"elle-fast train: Error parsing --eps: expected a .*, got '{eps}'\n", said)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--limit", "many"], "Error parsing --limit: no type matching INT could be instantiated"),
        (["train", "--epz", "0.1"], "--epz: not an option; did you mean --eps?\n"),
        (["train", "--lr", "0.1"], "--lr: not an option\n"),
        (["train", "--augment", "yes"], "yes: not an option\n"),
        (["train", "--epochs", "1", "--time-out=3"], "--time-out: not an option; did you mean --timeout?\n"),
        (["train", "--validation"], "Missing value for argument '--validation'. Expected 1 values.\n"),
        (["train", "--timeout", "soon"], "Error parsing --timeout: expected a number or a fraction such as 8/255"),
        (["train", "--timeout", "inf"], "Error parsing --timeout: expected a finite number, got 'inf'\n"),
        (
            ["eval"],
            "checkpoint: expected a file, or a model with weights, got neither\n",
        ),
        (["eval", "checkpoint.pt", "--lamm=3"], "--lamm: not an option\n"),
        (["eval", "checkpoint.pt", "--sampels=3"], "--sampels: not an option; did you mean --samples?\n"),
    ],
)
def test_options_that_are_not_there_and_values_of_another_type(arguments, message, capsys):
    status, said = fails(capsys, *arguments)
    assert status == 2
    assert said.startswith(f"elle-fast {arguments[0]}: {message}")


@pytest.mark.parametrize("timeout", ["0", "-1"])
def test_a_timeout_that_is_no_time(timeout, capsys):
    status, said = fails(capsys, "train", f"--timeout={timeout}")
    assert status == 2
    assert said.startswith("elle-fast train: timeout: expected a finite number in (0, 3.40282e+38]")


@pytest.mark.parametrize("command", ["", "tain", "--data"])
def test_a_command_that_is_not_there(command, capsys):
    assert fails(capsys, command) == (
        2,
        f"elle-fast: expected one of train, report, eval, export, methods, info, got {command!r}\n",
    )


@pytest.mark.parametrize("command", ["methods", "info"])
def test_commands_without_options(command, capsys):
    assert fails(capsys, command, "--all") == (2, f"elle-fast {command}: expected no options, got '--all'\n")
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: elle-fast {command}\n")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_unreadable_value_is_one_line_on_any_terminal(encoding):
    variables = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "elle_fast", "train", "--eps", "big"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    said = "elle-fast train: Error parsing --eps: expected a number or a fraction such as 8/255, got 'big'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"elle-fast {elle_fast.__version__}\n"


def test_help_has_each_command_and_each_option_with_its_default(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in cli.COMMANDS)
    shown = {}
    for command in ("train", "eval"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        shown[command] = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = [("train", option) for kind in (TrainConfig, TrainOptions) for option in fields(kind)]
    for command, option in [*options, *(("eval", option) for option in fields(EvalOptions))]:
        if option.name in ("run", "checkpoint"):
            continue
        name = option.name.replace("_", "-")
        value = rf"( [A-Z]+| NUMBER\|{{auto}}|, --no-{name})"
        found = re.search(rf" --{name}{value} (.*?) \(default: (.*?)\)", shown[command])
        assert found is not None, name
        assert len(found[2]) > 10, name
        assert found[3].replace(", ", ",") == ("8/255" if option.default == 8 / 255 else str(option.default)), name
    for name in (*data.NAMES, *models.NAMES, *SCHEDULES):
        assert name in shown["train"]


def test_a_flag_left_out_is_the_data_sets_own():
    for given, augment in (([], None), (["--augment"], True), (["--no-augment"], False)):
        assert cli.read_options("train", given).run.augment is augment


def test_neither_help_nor_info_imports_what_only_a_run_needs():
    script = """
import sys
from elle_fast.recipes.cli import main

HEAVY = {"matplotlib", "tensorboard", "sklearn", "scipy", "PIL", "rich"}
main(["--help"])
main(["info"])
assert not (HEAVY | {"tyro", "yaml", "numpy"}) & (sys.modules.keys() - before)
try:
    main(["train", "--help"])
except SystemExit:
    assert not HEAVY & (sys.modules.keys() - before)
"""
    before = "import sys, torch; before = {*sys.modules}"  # numpy is there if torch itself has imported it
    subprocess.run([sys.executable, "-c", before + script], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "variables, arguments, message",
    [
        ({"WORLD_SIZE": "two"}, [], "WORLD_SIZE: expected an integer >= 1 in the environment, got 'two'"),
        ({"WORLD_SIZE": "0"}, [], "WORLD_SIZE: expected an integer >= 1"),
        ({"WORLD_SIZE": "2"}, ["--device", "cuda:1"], "device: expected 'cpu' or 'cuda' under torchrun"),
        ({"WORLD_SIZE": "2"}, [], "RANK expected, but not set"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(variables, arguments, message, monkeypatch, tmp_path, capsys):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, said = fails(capsys, "train", *TINY, *arguments, "--out", str(tmp_path / "run"))
    assert status == 2
    assert message in said
    assert not (tmp_path / "run").exists()


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    from elle_fast.recipes.distributed import local_device

    monkeypatch.setattr(torch, "empty", lambda *size, device: None)  # as if there were these devices
    assert local_device("cuda:1") == "cuda:1"
    assert local_device("auto") == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == "cuda:3"
    assert local_device("cpu") == "cpu"
    assert local_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device("auto") == "cuda:3"


def test_eps_as_fraction_or_number():
    assert cli.read_options("train", ["--eps", "8/255"]).run.eps == 8 / 255
    assert cli.read_options("eval", ["checkpoint.pt", "--eps", "0.3"]).eps == 0.3
    for value, text in ((8 / 255, "8/255"), (0.2, "0.2"), (0.0, "0.0"), (4000.0, "4000.0"), (1 / 7, repr(1 / 7))):
        assert (number_text(value), parse_number(text)) == (text, value)


CONFIGS = [
    [],
    shlex.split("--eps 16/255 --no-normalize --augment --lam 4000 --learning-rate 1/3 --weight-decay 1e-9"),
    shlex.split("--data cifar10 --root 'a: b' --method elle-a --clamp attack --triplets 3 --seed 9223372036854775807"),
    shlex.split("--fast --device cpu --epochs 3 --eval-attacks clean"),
]


@pytest.mark.parametrize("arguments", CONFIGS)
def test_a_printed_run_is_read_back_the_same(arguments, tmp_path, capsys):
    assert cli.main(["train", *arguments, "--print-config", "--out", str(tmp_path / "none")]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert not (tmp_path / "none").exists()
    file = tmp_path / "run.yaml"
    file.write_text(said.out)
    assert TrainConfig.from_yaml(file) == cli.read_options("train", arguments).run
    assert cli.read_options("train", ["--config", str(file)]).run == cli.read_options("train", arguments).run


def test_options_win_over_the_preset_and_the_preset_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    lines = ["eps: 16/255", "seed: 3", "lam: 100", "weight_decay: 5e-3", "normalize: false", "skip_below: 1"]
    file.write_text("\n".join([*lines, "epochs: null"]))
    run = cli.read_options("train", ["--config", str(file), "--fast", "--triplet-fraction", "0.5", "--seed", "4"]).run
    from_file = TrainConfig(eps=16 / 255, lam=100.0, weight_decay=5e-3, normalize=False)
    assert run == replace(from_file, seed=4, skip_below=0.01, triplet_fraction=0.5)


def test_a_run_from_a_file(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(cli.read_options("train", TINY).run.to_yaml())
    assert cli.main(["train", "--config", str(file), "--method", "fgsm", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert config == asdict(cli.read_options("train", [*TINY, "--method", "fgsm"]).run.resolved())


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file"),
        ("", "expected lines of the form 'option: value', got None"),
        ("- eps", "expected lines of the form 'option: value', got ['eps']"),
        ("eps: [0.1", "not valid YAML: "),
        ("\0", "not valid YAML: "),
        ("eps: !!python/object/apply:os.getcwd []", "not valid YAML: could not determine a constructor"),
        ("learning-rate: 0.1", "learning-rate: not an option of a run; did you mean learning_rate?"),
        ("1: 2", "1: not an option of a run"),
        ("out: runs/here", "out: not an option of a run"),
        ("seed: !!int one", "not valid YAML: "),
        ("eps: 2020-13-45", "not valid YAML: "),
        ("eps: 1" + 400 * "0", "eps: expected a finite number in [0, 3.40282e+38], got 1000"),
        ("eps: 8/", "eps: expected a finite number in [0, 3.40282e+38], got '8/' (str)"),
        ("epochs: 1.5", "epochs: expected an integer >= 1, got 1.5 (float)"),
        ("epochs: 0", "epochs: expected an integer >= 1, got 0"),
        ("epochs: true", "epochs: expected an integer >= 1, got True (bool)"),
        ("seed: null", "seed: expected an integer >= 0, got None"),
        ("eps: big", "eps: expected a finite number in [0, 3.40282e+38], got 'big' (str)"),
        ("eps: .nan", "eps: expected a finite number in [0, 3.40282e+38], got nan"),
        ("momentum: 2", "momentum: expected a finite number in [0, 1], got 2"),
        ("augment: 1", "augment: expected True or False, got 1 (int)"),
        ("root: 3", "root: expected a string, got 3 (int)"),
        ("data: no", "data: expected a string, got False (bool)"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(text, message, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    for extra in ([], ["--print-config"]):
        status, said = fails(capsys, "train", "--config", str(file), *extra)
        assert status == 2
        assert said.startswith("elle-fast train: ")
        assert str(file) in said
        assert message in said


def test_options_that_do_not_go_together_are_not_printed(capsys):
    status, said = fails(capsys, "train", "--method", "fgsm", "--fast", "--print-config")
    assert status == 2
    assert "skip_below: method 'fgsm' has no E_lin term" in said


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": "8/255"}, r"eps: expected a finite number in \[0, 3.40282e\+38\], got '8/255' \(str\)"),
        ({"epochs": 1.0}, r"epochs: expected an integer >= 1, got 1.0 \(float\)"),
        ({"seed": True}, r"seed: expected an integer >= 0, got True \(bool\)"),
        ({"normalize": None}, r"normalize: expected True or False, got None \(NoneType\)"),
        ({"clamp": 1}, r"clamp: expected a string, got 1 \(int\)"),
        ({"root": Path("here")}, r"root: expected a string, got PosixPath\('here'\)"),
        ({"method": None}, r"method: expected a string, got None \(NoneType\)"),
    ],
)
def test_a_run_made_in_python_with_a_value_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        TrainConfig(**options).resolved()


def test_eval_of_a_damaged_checkpoint(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"PK\x03\x04 half a file")
    status, said = fails(capsys, "eval", str(path))
    assert status == 2
    assert said.startswith("elle-fast eval: checkpoint: expected a whole checkpoint")


@pytest.mark.parametrize(
    "attacks, message",
    [
        ("clean,cw", "attacks: expected names among clean, fgsm, pgd-K, "),
        ("clean,autoattack", "attacks: 'autoattack' needs the package pyautoattack: pip install 'elle-fast[eval]'"),
    ],
)
def test_eval_with_attacks_that_are_not_there(attacks, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(names, "find_spec", lambda package: None)
    status, said = fails(capsys, "eval", str(tmp_path / "none.pt"), "--attacks", attacks)
    assert status == 2
    assert said.startswith(f"elle-fast eval: {message}")


def test_eval_says_what_the_masking_check_found_and_what_attacks_warn_of(monkeypatch, capsys):
    def found(verdict):
        row = {"accuracy": 0.25, "suspicious": verdict != "ok"}
        masking = {"verdict": verdict, "samples": 8, "white_box": {"attack": "pgd-20", "accuracy": 0.5}}
        notes = {"N points": 3}
        return {
            "accuracy": {"autoattack": {"accuracy": 0.5, "samples": 8, "per_restart": [0.5], "notes": notes}},
            "worst_case": {"accuracy": 0.5, "samples": 8, "attacks": ["autoattack"]},
            "masking": {**masking, "attacks": {"square-1000": row}},
        }

    for verdict, line in (("ok", "ok"), ("suspicious", "suspicious: pgd-20 is beaten by square-1000")):
        monkeypatch.setattr(report, "evaluate_checkpoint", lambda *arguments, **options: found(verdict))  # noqa: B023
        assert cli.main(["eval", "checkpoint.pt"]) == 0
        said = capsys.readouterr()
        assert said.out.splitlines()[1:] == [f"gradients    {line} (pgd-20 50.00%, square-1000 25.00% of 8)"]
        assert said.err == "autoattack says, 3 times: N points\n"


def test_eval_of_no_checkpoint(tmp_path, capsys):
    assert fails(capsys, "eval", str(tmp_path / "none.pt"))[0] == 2


def test_a_failing_run_ends_with_1_and_an_interrupted_one_with_130(monkeypatch, capsys):
    from elle_fast.recipes import train

    def diverge(*args, **options):
        raise RuntimeError("loss: expected finite numbers")

    monkeypatch.setattr(train, "train", diverge)
    assert fails(capsys, "train") == (1, "elle-fast train: loss: expected finite numbers\n")

    def interrupt(*args, **options):
        raise train.InterruptedRunError("stopped after step 3")

    monkeypatch.setattr(train, "train", interrupt)
    assert fails(capsys, "train") == (130, "elle-fast train: stopped after step 3\n")


@pytest.mark.parametrize("library", ["tyro", "rich.console"])
def test_a_missing_library_is_named_with_the_way_to_get_it(library, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, "elle_fast.recipes.train", raising=False)
    monkeypatch.delitem(sys.modules, "elle_fast.recipes.logs", raising=False)
    status, said = fails(capsys, "train")
    assert status == 2
    assert "pip install 'elle-fast[recipes]'" in said


def test_info_needs_no_library_but_torch(monkeypatch, capsys):
    for library in ("tyro", "yaml", "rich", "numpy", "elle_fast.recipes.config"):
        monkeypatch.setitem(sys.modules, library, None)
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "backend reference    available" in said
    assert torch.__version__ in said


def test_commit_is_none_outside_a_checkout(monkeypatch, tmp_path):
    copied = tmp_path / "provenance.py"
    copied.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(copied))
    assert provenance.commit() is None
