"""Which CUDA architectures setup.py builds for: what is asked for, else what the machine's GPUs are, else none."""

from __future__ import annotations

from pathlib import Path

import pytest

import setup

USUAL = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def tool(folder: Path, name: str, says: str, status: int = 0) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An nvcc that knows what 13.0 knows, beside an nvidia-smi that says what it is told to."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    known = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
    nvcc = tool(tmp_path, "nvcc", "\n".join(f"compute_{number}" for number in known))

    def built_for(asked: str, gpus: str | None = None) -> list[str]:
        tool(tmp_path, "nvidia-smi", gpus or "", status=9 if gpus is None else 0)
        found: list[str] = setup.cuda_architectures(str(nvcc), asked)
        return found

    return built_for


def test_nothing_without_a_gpu(machine):
    assert machine("") == []


@pytest.mark.parametrize("said", ["[N/A]", "No devices were found", "NVIDIA-SMI has failed"])
def test_what_nvidia_smi_says_besides_numbers(machine, said):
    assert machine("", said) == []


@pytest.mark.parametrize(
    "gpus,expected",
    [
        ("9.0", ["9.0"]),
        ("9.0\n9.0", ["9.0"]),
        ("12.0\n8.6\n[N/A]", ["8.6", "12.0"]),
        ("13.4", ["12.1+PTX"]),  # which nvcc does not know yet: what it knows, for the driver to compile
        ("6.1", ["6.1"]),  # which it no longer knows: nvcc says so
    ],
)
def test_the_gpus_that_are_there(machine, gpus, expected):
    assert machine("", gpus) == expected


@pytest.mark.parametrize("gpus", [None, "9.0"])
def test_all_on_request(machine, gpus):
    assert machine("1", gpus) == USUAL


@pytest.mark.parametrize("gpus", [None, "8.6"])
@pytest.mark.parametrize(
    "asked,expected",
    [("90a", ["90a"]), ("8.0;9.0", ["8.0", "9.0"]), ("8.0 9.0+PTX", ["8.0", "9.0+PTX"]), ("8.0, 120", ["8.0", "120"])],
)
def test_a_list(machine, monkeypatch, asked, expected, gpus):
    assert machine(asked, gpus) == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert machine("", gpus) == machine("1", gpus) == expected
    assert machine("7.5", gpus) == ["7.5"]


@pytest.mark.parametrize("asked", ["yes", "true", "-1", "9.0;H100", "sm_90"])
def test_a_list_that_is_none(machine, monkeypatch, asked):
    expected = f"^ELLE_FAST_CUDA: expected 0, 1 or architectures such as '8.0;9.0', got '{asked}'$"
    with pytest.raises(ValueError, match=expected):
        machine(asked)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(ValueError, match=expected):
        machine("")


@pytest.mark.parametrize("arch,number", [("9.0", "90"), ("90a", "90a"), ("9.0a", "90a"), ("12.0+PTX", "120")])
def test_flags(monkeypatch, arch, number):
    monkeypatch.delenv("CXX", raising=False)
    ptx = f",compute_{number}" if arch.endswith("+PTX") else ""
    assert setup.nvcc_command("nvcc", [arch])[-1] == f"-gencode=arch=compute_{number},code=[sm_{number}{ptx}]"
