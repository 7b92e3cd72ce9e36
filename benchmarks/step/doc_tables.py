"""The tables of README and docs that are drawn from bench_step.py's and bench_train.py's files."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import markdown
from benchmarks.step import kept_memory
from benchmarks.step.train_tables import LARGE, SMALL, milliseconds, over
from benchmarks.tables.table import Table

# By row of bench_step.py, what README calls it.
_STEPS = {
    "fgsm": "FGSM",
    "authors": "the authors' ELLE-A step, restated, one optimiser step",
    "elle-a": "ELLE-A, Algorithm 1, packed",
    "elle-a-split": '`forward="split"`',
    "elle-a-checkpoint": '`forward="checkpoint"`',
    "elle-a-skip-light": "`skip_below=0.01`, a light step",
    "elle-a-skip-full": "the same, a full step",
    "elle-a-quarter": "`triplet_fraction=0.25`",
    "elle-a-eighth": "`triplet_fraction=0.125`",
    "elle-a-fast-light": "`skip_below=0.01, triplet_fraction=0.125`, a light step",
    "elle-a-fast-full": "the same, a full step",
    "gradalign": "GradAlign",
    "cure": "CURE",
    "llr": "LLR",
    "pgd-at": "PGD-10",
}
# Rows that a file of this commit has of methods as they were before they were compared with their sources (CHANGELOG).
_BEFORE = {"5330bbee25a8": ("cure", "llr")}
# By row of bench_train.py, the same.
_TRAININGS = {
    "authors": "authors, ELLE-A, fp32",
    "plain": "plain, ELLE-A, fp32",
    "elle-a": "ELLE-A, Algorithm 1, fp32",
    "fast": "`--fast`, fp32",
    "fast bf16": "`--fast --precision bf16`, triplets in fp32",
    "fast bf16 compiled": "the same, `--compile`",
    "fast bf16 same": "the same, `--triplet-precision same`, not compiled",
    "fgsm": "FGSM, fp32",
    "fgsm bf16": "FGSM, bf16",
}
_NETS = {
    SMALL: "narrow PreActResNet",
    LARGE: "PreActResNet18, width 32",
    "resnet50": "ResNet50, 64x64, batch 32",
}


def steps(content: dict[str, Any]) -> str:
    """Time, work and memory of a step of ELLE-A's forms beside other methods' steps."""
    lines = []
    for name, label in _STEPS.items():
        if name not in content["methods"]:  # of a row that is no longer timed
            continue
        row = content["methods"][name]
        if name in _BEFORE.get(content["commit"], ()):
            label += ", its form before"
        parts = [f"{row[part]:.0f}" if part in row else "-" for part in ("forward_ms", "backward_ms")]
        cells = [f"{row['ms']['median']:.0f}", *parts, f"{row['ratio']:.2f}", f"{row['units']:.3g}"]
        lines.append((label, *cells, f"{row['peak_ratio']:.2f}", str(row["host_syncs"])))
    head = ["", "ms", "loss", "backward", "x FGSM", "units", "peak memory, x FGSM", "host syncs"]
    return markdown(head, lines)


def epochs(content: dict[str, Any]) -> str:
    """Images per second over whole epochs and, in brackets, how many times the authors'."""
    share, nets = content["setting"]["full_share"], content["nets"]
    lines = []
    for name, label in _TRAININGS.items():
        peak = nets[LARGE]["rows"][name].get("peak_bytes")
        cells = [_speed(nets[net], name, share) for net in _NETS]
        lines.append((label, *cells, "-" if peak is None else f"{peak / 1e6:,.0f} MB"))
    return markdown(["", *_NETS.values(), "peak memory, PreActResNet18"], lines)


def _speed(net: dict[str, Any], name: str, share: float) -> str:
    ms, times = milliseconds(net["rows"].get(name), share), over(net["rows"], "authors", name, share)
    if ms is None or times is None:
        return "-"
    images = 1e3 * net["batch"] / ms
    return f"{images:{',.0f' if images >= 100 else '.1f'}} ({times:{'.0f' if name == 'authors' else '.2f'}})"


def _kept_memory(content: dict[str, Any]) -> str:
    return kept_memory.table(content["rows"])


TABLES = {
    "step": Table("bench_step.json", steps),
    "epochs": Table("bench_train.json", epochs),
    "kept-memory": Table("kept_memory.json", _kept_memory),
}
