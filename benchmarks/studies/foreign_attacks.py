"""Our attacks against the libraries' own on one model: the same accuracy, and in what time.

    python -m benchmarks.studies.foreign_attacks --root mnist.npz --out benchmarks/results/foreign_attacks.json

PGD-20 and PGD-50-10 against foolbox's with the same steps, step size and restarts, and ``autoattack``, which calls
pyautoattack, against a direct call of it. The program trains the model: a CNN on MNIST, with FGSM. Then the sides take
turns, and the medians of their times are compared: on the CPU of the processor's time of one thread, so that what else
runs on the machine counts little. Each side is called as its documentation does; accuracies are those on the same test
images, and differ by the random starts alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import VERDICTS, markdown, met
from elle_fast import TrainingStep, data, methods
from elle_fast._core.files import write_json
from elle_fast.evaluation import outcomes
from elle_fast.recipes import models
from elle_fast.recipes.provenance import provenance

Batches = list[tuple[Tensor, Tensor]]
Side = Callable[[], Tensor]  # which samples withstand, bool [N]

EPS, BATCH = 0.2, 256
MOST = {"pgd-20": 512, "pgd-50-10": 256, "autoattack": 48}  # test images


def trained(dataset: data.Dataset, width: int, epochs: int, device: str) -> nn.Module:
    """A CNN that FGSM has made robust to some degree, so that attacks have work to do."""
    torch.manual_seed(0)
    in_shape, classes = tuple(dataset.train.images.shape[1:]), len(dataset.classes)
    model = models.build("cnn", in_shape=in_shape, classes=classes, width=width, mean=dataset.mean, std=dataset.std)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    split = dataset.train.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    step = TrainingStep(methods.build("n-fgsm", eps=EPS, bounds=(0.0, 1.0)), model, optimizer)
    for epoch in range(epochs):
        for x, y in data.batches(split, min(128, len(split)), seed=0, epoch=epoch):
            step(x, y)
    return model.eval()


def ours(model: nn.Module, batches: Batches, attack: str) -> Tensor:
    """As ``elle-fast eval`` does it."""
    return outcomes(model, batches, attack, eps=EPS)[attack].robust[-1]


def by_foolbox(model: nn.Module, batches: Batches, attack: str) -> Tensor:
    """As foolbox's README does it, with its own way to restart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        foolbox: Any = import_module("foolbox")
    steps, restarts = [*map(int, attack.split("-")[1:]), 1][:2]
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=batches[0][0].device)
    pgd: Any = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=steps, random_start=True)
    if restarts > 1:
        pgd = pgd.repeat(restarts)
    torch.manual_seed(0)
    return torch.cat([~pgd(wrapped, x, y, epsilons=EPS)[2].cpu() for x, y in batches])


def by_pyautoattack(model: nn.Module, batches: Batches, attack: str) -> Tensor:
    """As its README does it."""
    from pyautoattack import AutoAttack

    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    auto = AutoAttack(model, norm="Linf", eps=EPS, version="standard", device=x.device, seed=0)
    points = auto.run_standard_evaluation(x.contiguous(), y, batch_size=BATCH)[0]
    with torch.no_grad():
        return torch.cat(
            [model(each).argmax(1) == labels for each, labels in zip(points.split(BATCH), y.split(BATCH), strict=True)]
        ).cpu()


LIBRARIES = {
    "pgd-20": ("foolbox", by_foolbox),
    "pgd-50-10": ("foolbox", by_foolbox),
    "autoattack": ("pyautoattack", by_pyautoattack),
}


def compare(sides: dict[str, Side], rounds: int, device: str) -> dict[str, Any]:
    """Let them take turns; times in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    robust: dict[str, list[Tensor]] = {name: [] for name in sides}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for turn in range(rounds + 1):
        for name, side in sides.items():
            begin = clock()
            found = side()  # on the CPU, so a device has finished
            if turn > 0:  # the first one imports, and fills caches
                seconds[name].append(clock() - begin)
                robust[name].append(found)
    one, other = (found[0] for found in robust.values())
    accuracies = [found.double().mean().item() for found in (one, other)]
    return {
        "samples": len(one),
        "seconds": {name: [float(f"{each:.4g}") for each in found] for name, found in seconds.items()},
        "ratio": statistics.median(next(iter(seconds.values()))) / statistics.median([*seconds.values()][1]),
        "accuracy": dict(zip(robust, accuracies, strict=True)),
        "differing_samples": int((one != other).sum()),
        # Twice the standard error of a difference of two such accuracies on samples of their own.
        "sampling_noise": 1.96 * math.sqrt(sum(each * (1 - each) for each in accuracies) / len(one)),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of all comparisons."""
    lines = []
    for attack, row in rows.items():
        library = LIBRARIES[attack][0]
        mine, others = (statistics.median(row["seconds"][name]) for name in ("elle_fast", library))
        apart = abs(row["accuracy"]["elle_fast"] - row["accuracy"][library])
        verdicts = [met(apart, row["sampling_noise"], at_most=True), met(row["ratio"], 1.0, at_most=True)]
        accuracies = [f"{row['accuracy'][name]:.2%}" for name in ("elle_fast", library)]
        numbers = [f"{mine:.3g} s", f"{others:.3g} s", f"{row['ratio']:.3f}", *(VERDICTS[each] for each in verdicts)]
        lines.append((attack, library, str(row["samples"]), *accuracies, *numbers))
    head = ["attack", "library", "images", "accuracy", "its accuracy", "time", "its time", "ratio", "accuracy", "time"]
    return markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, write the JSON file, print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    dataset = data.load(options.data, options.root, limit=options.limit)
    model = trained(dataset, options.width, options.epochs, options.device)
    about = provenance(command(options_of, options))
    about["versions"] |= {library: metadata.version(library) for library, _ in LIBRARIES.values()}
    settings = {"data": dataset.name, "train_images": len(dataset.train), "eps": EPS, "batch_size": BATCH}
    settings |= {"width": options.width, "epochs": options.epochs, "device": options.device}
    clock = "processor time of one thread" if options.device == "cpu" else "wall clock"
    rows: dict[str, dict[str, Any]] = {}
    for attack in options.attacks.split(","):
        library, other = LIBRARIES[attack]
        split = dataset.test.subset(min(options.samples or MOST[attack], len(dataset.test))).to(options.device)
        batches = list(data.in_order(split, BATCH))
        print(f"{attack}, {len(split)} images", file=sys.stderr, flush=True)
        sides: dict[str, Side] = {
            "elle_fast": partial(ours, model, batches, attack),
            library: partial(other, model, batches, attack),
        }
        rows[attack] = compare(sides, options.rounds, options.device)
        write_json(options.out, {**about, "settings": settings, "clock": clock, "attacks": rows})
    print(table(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.foreign_attacks", __doc__)
    options_of.add_argument("--data", default="mnist", help="a data set in memory, as elle_fast.data.load names it")
    options_of.add_argument("--root", type=Path, help="its files")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--limit", type=int, default=10_000, help="training images")
    options_of.add_argument("--samples", type=int, help="test images; by default 512, 256 and 48")
    options_of.add_argument("--attacks", default=",".join(LIBRARIES), help="some of them, with commas between")
    options_of.add_argument("--width", type=int, default=8, help="of the CNN")
    options_of.add_argument("--epochs", type=int, default=3)
    options_of.add_argument("--rounds", type=int, default=3, help="samples of each time, after one that warms up")
    options_of.add_argument("--device", default="cpu", help="cpu or cuda")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
