"""Loading the extension: what is said where it is missing, damaged, or of another version, and ELLE_FAST_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import elle_fast
from elle_fast.backends import extension
from elle_fast.recipes import cli

BUILT = pytest.mark.skipif(extension.load() is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def forgotten():
    """Each test asks anew; afterwards everybody does."""
    yield
    for cached in (extension._loaded, extension._cpp_reason, extension._cuda_reason):
        cached.cache_clear()


@pytest.fixture
def module(monkeypatch) -> Any:
    """In the extension's place: a module for a machine that has AVX2 and no more."""
    used: list[str] = []
    fake: Any = types.ModuleType("elle_fast._C")
    fake.version, fake.used = elle_fast.__version__, used
    fake.isas, fake.use_isa, fake.cuda_built = lambda: ["avx2", "baseline"], used.append, lambda: False
    fake.isa = lambda: used[-1] if used else "avx2"
    fake.facts = lambda: {"compiler": "a compiler", "isas": "avx512 avx2 baseline", "cuda": "9.0+PTX"}
    monkeypatch.setattr(extension, "_file", lambda: Path("_C.so"))
    monkeypatch.setattr(extension, "_check_length", lambda file: None)
    monkeypatch.setattr(extension, "_import", lambda file: fake)
    monkeypatch.delenv("ELLE_FAST_ISA", raising=False)
    for cached in (extension._loaded, extension._cpp_reason, extension._cuda_reason):
        cached.cache_clear()
    return fake


def info(capsys) -> str:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return str(said.out)


@BUILT
def test_what_is_there_is_loaded(monkeypatch):
    monkeypatch.delenv("ELLE_FAST_ISA", raising=False)
    loaded = extension.load()
    assert extension.cpp_why_not() is None
    assert loaded is sys.modules["elle_fast._C"]
    assert loaded.version == elle_fast.__version__
    assert loaded.isa() == loaded.isas()[0]  # nobody asked for another than the widest


def test_missing(module, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(extension, "_file", lambda: None)
    monkeypatch.setattr(extension, "_FAILURE", tmp_path / "_build_failure.txt")
    assert extension.load() is None
    reason = extension.cpp_why_not()
    assert reason is not None
    assert reason.startswith("the extension is not built; with g++ or clang++ in place, `pip install ")
    assert "\n" not in reason
    assert extension.cuda_why_not() == reason
    assert f"\nextension            not available: {reason}\n" in info(capsys)


def test_what_the_build_wrote_down_is_told(module, monkeypatch, tmp_path, capsys):
    record = tmp_path / "_build_failure.txt"
    record.write_text("g++ -c some.cpp\nsome.cpp:1:1: error: no\n")
    monkeypatch.setattr(extension, "_FAILURE", record)
    # Without the extension, or with one that lacks CUDA.
    without_cuda = extension.cuda_why_not()
    assert without_cuda is not None
    assert without_cuda.startswith("the extension was built without CUDA; with nvcc in place, `ELLE_FAST_CUDA=1 pip ")
    assert without_cuda.endswith(". Its build failed:\n  g++ -c some.cpp\n  some.cpp:1:1: error: no")
    extension._loaded.cache_clear()
    extension._cpp_reason.cache_clear()
    monkeypatch.setattr(extension, "_file", lambda: None)
    reason = extension.cpp_why_not()
    assert reason is not None
    assert reason.endswith(". Its build failed:\n  g++ -c some.cpp\n  some.cpp:1:1: error: no")
    # Lines after the first stand below it.
    assert f"\n{' ' * 21}  some.cpp:1:1: error: no\n" in info(capsys)


def test_another_version(module):
    module.version = "0.0.9"
    assert extension.load() is None
    reason = extension.cpp_why_not()
    assert reason is not None
    assert reason.startswith(f"the extension was built for elle_fast 0.0.9, this is {elle_fast.__version__}; with ")


@pytest.mark.parametrize("error", [ImportError("undefined symbol: x"), OSError("unreadable")])
def test_what_cannot_be_imported(module, monkeypatch, error):
    def fail(file):
        raise error

    monkeypatch.setattr(extension, "_import", fail)
    reason = extension.cpp_why_not()
    assert reason is not None
    assert reason.startswith(f"the extension cannot be loaded ({error}); with ")


def test_cuda(module, monkeypatch):
    module.cuda_built = lambda: True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extension.cuda_why_not() == "torch sees no CUDA device"
    extension._cuda_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)  # as in builds for ROCm
    assert extension.cuda_why_not() == "torch sees no CUDA device"
    extension._cuda_reason.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    module.facts = lambda: {"cuda": "9.0"}
    module.cuda_probe = lambda: "no kernel image is available"
    reason = "the kernels, built for 9.0, cannot run on this device or driver: no kernel image is available"
    assert extension.cuda_why_not() == reason
    extension._cuda_reason.cache_clear()
    module.cuda_probe = lambda: ""
    assert extension.cuda_why_not() is None


def test_the_instruction_set_asked_for_is_used(module, monkeypatch):
    monkeypatch.setenv("ELLE_FAST_ISA", "baseline")
    assert extension.cpp_why_not() is None
    assert module.used == ["baseline"]
    extension.cpp_why_not()
    assert module.used == ["baseline"]


@pytest.mark.parametrize("name", ["avx512", "sse", "AVX2"])
def test_an_instruction_set_that_is_not_there(module, monkeypatch, capsys, name):
    monkeypatch.setenv("ELLE_FAST_ISA", name)
    message = (
        "ELLE_FAST_ISA: expected an instruction set that this machine and this build have (avx2, baseline), "
        f"got {name!r}"
    )
    for _ in range(2):  # it is not remembered as if all were well
        with pytest.raises(ValueError, match=r"^ELLE_FAST_ISA: ") as raised:
            extension.cpp_why_not()
        assert str(raised.value) == message
    assert module.used == []
    assert f"\nextension isa        {message}\n" in info(capsys)


def test_why_not_is_a_constant_to_the_compiler(module):
    def f(x):
        return x + 1 if extension.cpp_why_not() is None else x - 1

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(())).item() == 1


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )


SAY = "from elle_fast.backends import extension; print(extension.cpp_why_not())"


def test_a_damaged_file(tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"this is no library" * 100)
    done = run("import elle_fast", ELLE_FAST_EXTENSION=str(file))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(SAY, ELLE_FAST_EXTENSION=str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"the extension cannot be loaded ({file}: ")


@BUILT
@pytest.mark.skipif(sys.platform != "linux", reason="ELF files")
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_off(tmp_path, share):
    whole = extension._file()
    assert whole is not None
    data = whole.read_bytes()
    file = tmp_path / "_C.so"
    file.write_bytes(data[: int(share * len(data))])
    done = run(SAY, ELLE_FAST_EXTENSION=str(file))
    assert (done.returncode, done.stderr) == (0, "")  # a bus error would be another code
    assert done.stdout.startswith(f"the extension cannot be loaded ({file}")


@BUILT
def test_a_file_that_was_named(tmp_path):
    whole = extension._file()
    assert whole is not None
    file = tmp_path / "_C.so"
    file.write_bytes(whole.read_bytes())
    script = f"{SAY}; from elle_fast import _C; print(_C is extension.load(), _C.__file__)"
    done = run(script, ELLE_FAST_EXTENSION=str(file))
    assert done.stdout.splitlines() == ["None", f"True {file}"], done.stderr


@BUILT
def test_each_instruction_set_can_be_forced():
    module: Any = extension.load()
    for isa in module.isas():
        done = run(f"{SAY}; print(extension.load().isa())", ELLE_FAST_ISA=isa)
        assert done.stdout.splitlines() == ["None", isa], done.stderr
    assert run("import elle_fast", ELLE_FAST_ISA="nonsense").returncode == 0
    with pytest.raises(ValueError, match="isa"):
        module.use_isa("nonsense")
