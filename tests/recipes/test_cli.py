import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

from elle_fast.evaluation import names
from elle_fast.recipes import cli, provenance
from elle_fast.recipes import evaluate as report

README = Path(__file__).parents[2] / "README.md"
TINY = shlex.split("--model cnn --width 2 --eps 0.1 --epochs 1 --batch-size 32 --limit 64 --test-limit 16 --watch 16")


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fails(capsys, *arguments):
    """Exit status and the message of a call that fails; a traceback would have come out as an exception."""
    status = cli.main(arguments)
    said = capsys.readouterr()
    assert said.out == ""
    return status, said.err


def test_train_then_eval(tmp_path, capsys):
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
        (["--method", "trades"], "method: expected one of 'fgsm'"),
        (["--method", "gradalign+elle"], "got 'gradalign+elle': it is a regulariser of local linearity itself"),
        (["--method", "fgsm", "--skip-below", "0.1"], "skip_below: method 'fgsm' has no E_lin term"),
        (["--method", "fgsm", "--fast"], "skip_below: method 'fgsm' has no E_lin term"),
        (["--eps=-1/255"], "eps: expected a finite number in [0, inf)"),
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
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eps", ["big", "1/0", "nan", "8/255/2", ""])
def test_eps_that_is_no_number(eps, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", f"--eps={eps}"])
    assert stopped.value.code == 2
    assert "--eps: expected a" in capsys.readouterr().err


@pytest.mark.parametrize("timeout", ["0", "-1", "soon", "inf"])
def test_a_timeout_that_is_no_time(timeout, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", f"--timeout={timeout}"])
    assert stopped.value.code == 2
    assert "--timeout: expected a" in capsys.readouterr().err


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

    assert local_device("cuda") == "cuda"
    assert local_device(None) is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == "cuda:3"
    assert local_device("cpu") == "cpu"
    assert local_device(None) is None  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device(None) == "cuda:3"


def test_eps_as_fraction_or_number():
    parse = cli._parser().parse_args
    assert parse(["train", "--eps", "8/255"]).eps == 8 / 255
    assert parse(["train", "--eps", "0.3"]).eps == 0.3


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
    assert said.count("\n") == 1


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


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.delitem(sys.modules, "elle_fast.recipes.train", raising=False)
    monkeypatch.delitem(sys.modules, "elle_fast.recipes.logs", raising=False)
    status, said = fails(capsys, "train")
    assert status == 2
    assert "pip install 'elle-fast[recipes]'" in said


def test_info(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "backend reference    available" in said
    assert torch.__version__ in said


def test_the_commands_of_the_readme_are_understood():
    lines = [
        line.split("#")[0].strip() for line in README.read_text().splitlines() if line.startswith("    elle-fast ")
    ]
    assert len(lines) >= 4
    for line in lines:
        cli._parser().parse_args([word for word in shlex.split(line)[1:] if word != "..."])


def test_commit_is_none_outside_a_checkout(monkeypatch, tmp_path):
    copied = tmp_path / "provenance.py"
    copied.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(copied))
    assert provenance.commit() is None
