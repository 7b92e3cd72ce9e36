"""What dropout does to E_lin and to training if x_a, x_b and x_c have masks of their own, and if they share them.

    python -m benchmarks.studies.dropout --root mnist.npz --out benchmarks/results/dropout.json

E_lin at initialisation, on MNIST's first training images and on uniform noise, for networks with and without random
layers; then trainings from the same weights with the same batches. "common" is what LocalLinearity does
(elle_fast.draws); "apart" draws a mask for each row. ``--timm`` adds timm's vit_tiny to the first part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.program import command, parser
from benchmarks.harness.tables import markdown
from elle_fast import ELLELoss, LocalLinearity, TrainingStep, attacks, data
from elle_fast._core.files import write_json
from elle_fast.draws import Draws, Level, RandomLayers
from elle_fast.recipes.provenance import provenance

EPS, LAM, BATCH, LEARNING_RATE = 0.3, 4000.0, 64, 1e-3
MASKS = ("common", "apart")
DROPOUT = 0.1
METHODS = ("fgsm", "elle-a")


@contextmanager
def masks_apart() -> Iterator[None]:
    """Let each row have masks of its own, as if nothing were known of random layers."""
    run = RandomLayers.run

    def plain(self: RandomLayers, step: Callable[..., Any], model: Any, x: Tensor, samples: int, **_: Any) -> Any:
        return step(Draws(Level.NOTHING, samples, None), model)

    RandomLayers.run = plain  # type: ignore[method-assign]
    try:
        yield
    finally:
        RandomLayers.run = run  # type: ignore[method-assign]


def cnn(p: float) -> nn.Module:
    """Two strided convolutions and two linear layers, with dropout before the last one and after each convolution."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(channels, wider, 4, 2, padding=1), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 100), nn.ReLU(), nn.Dropout(p), nn.Linear(100, 10))


def vit_tiny(drop: float, drop_path: float) -> nn.Module:
    """timm's, for 32 x 32 pixels in patches of 4 x 4."""
    create = import_module("timm").create_model
    size = {"img_size": 32, "patch_size": 4, "num_classes": 10}
    model: nn.Module = create("vit_tiny_patch16_224", drop_rate=drop, drop_path_rate=drop_path, **size)
    return model


def at_initialisation(images: Tensor, labels: Tensor, with_timm: bool) -> list[dict[str, Any]]:
    """E_lin of networks with fresh weights, the mean over ten draws."""
    noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[str, Callable[[], nn.Module], Tensor, float]] = [
        (f"cnn, dropout {p}", partial(cnn, p), images, EPS) for p in (0.0, 0.1, 0.3)
    ]
    if with_timm:
        cases.append(("vit_tiny", partial(vit_tiny, 0.0, 0.0), noise, 8 / 255))
        cases.append(("vit_tiny, drop_rate 0.1, drop_path 0.2", partial(vit_tiny, 0.1, 0.2), noise, 8 / 255))
    rows = []
    for name, build, x, eps in cases:
        for masks in MASKS:
            torch.manual_seed(0)
            model, regulariser = build().train(), LocalLinearity(eps)
            with masks_apart() if masks == "apart" else nullcontext(), torch.no_grad():
                found = [regulariser(model, x, labels[: len(x)]).item() for _ in range(10)]
            rows.append({"model": name, "masks": masks, "eps": eps, "e_lin": statistics.mean(found)})
    return rows


def train(method: str, masks: str, p: float, seed: int, dataset: data.Dataset, epochs: int) -> dict[str, Any]:
    """Train one CNN, and count what is right under PGD-20."""
    torch.manual_seed(seed)
    model = cnn(p)
    criterion: Any = ELLELoss(EPS, LAM, adaptive=method == "elle-a", bounds=(0, 1))
    if method == "fgsm":
        criterion = lambda model, x, y: F.cross_entropy(model(attacks.fgsm(model, x, y, EPS, bounds=(0, 1))), y)  # noqa: E731
    step = TrainingStep(criterion, model, torch.optim.Adam(model.parameters(), LEARNING_RATE))
    loss, start = torch.zeros(()), time.process_time()
    with masks_apart() if masks == "apart" else nullcontext():
        for epoch in range(epochs):
            for x, y in data.batches(dataset.train, BATCH, seed=seed, epoch=epoch):
                loss = step(x, y)
    seconds = time.process_time() - start
    model.eval()
    right, generator = {"clean": 0, "pgd": 0}, torch.Generator().manual_seed(0)
    for x, y in data.in_order(dataset.test):
        points = {"clean": x, "pgd": attacks.pgd(model, x, y, EPS, step_size=EPS / 10, steps=20, generator=generator)}
        for name, each in points.items():
            with torch.no_grad():
                right[name] += int((model(each).argmax(1) == y).sum())
    about = {"method": method, "masks": masks, "dropout": p, "seed": seed, "cpu_seconds": round(seconds, 1)}
    finite = all(parameter.isfinite().all() for parameter in model.parameters())
    accuracy = {name: count / len(dataset.test) for name, count in right.items()}
    return {**about, "finite": bool(finite), "last_loss": loss.item() if finite else None, **accuracy}


def table(rows: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """Markdown of both parts; accuracies in per cent, of each seed."""
    first = markdown(
        ["model", "masks", "E_lin"], [(each["model"], each["masks"], f"{each['e_lin']:.1e}") for each in rows]
    )
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        cells.setdefault((run["method"], run["masks"], run["dropout"]), []).append(run)
    lines = []
    for key, found in cells.items():
        columns = [", ".join(f"{100 * run[name]:.1f}" for run in found) for name in ("clean", "pgd")]
        seconds = statistics.median(run["cpu_seconds"] for run in found)
        lines.append((*map(str, key), *columns, str(sum(not run["finite"] for run in found)), f"{seconds:.0f} s"))
    return f"{first}\n\n{markdown(['method', 'masks', 'dropout', 'clean', 'PGD-20', 'NaN', 'training'], lines)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the JSON file, print the tables."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    dataset = data.load("mnist", options.root, limit=options.limit, test_limit=options.test_limit)
    x, y = next(data.in_order(dataset.train, 64))
    rows = at_initialisation(x, y, options.timm)
    runs = []
    for seed in range(options.seeds):
        # Masks innermost: what slows the machine for a while slows all of them.
        for method in METHODS:
            for masks in MASKS if method != "fgsm" else ("common",):
                print(f"seed {seed}, {method}, {masks}", file=sys.stderr, flush=True)
                runs.append(train(method, masks, DROPOUT, seed, dataset, options.epochs))
    about = provenance(command(options_of, options))
    if options.timm:
        about["versions"]["timm"] = metadata.version("timm")
    settings = {"eps": EPS, "lam": LAM, "batch": BATCH, "learning_rate": LEARNING_RATE, "epochs": options.epochs}
    settings |= {"train_images": len(dataset.train), "test_images": len(dataset.test)}
    write_json(options.out, {**about, "settings": settings, "at_initialisation": rows, "runs": runs})
    print(table(rows, runs))
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.studies.dropout", __doc__)
    options_of.add_argument("--root", type=Path, required=True, help="MNIST, as elle_fast.data.load takes it")
    options_of.add_argument("--out", type=Path, required=True, help="the JSON file")
    options_of.add_argument("--limit", type=int, default=19200, help="training images")
    options_of.add_argument("--test-limit", type=int, default=1000, help="test images")
    options_of.add_argument("--epochs", type=int, default=5)
    options_of.add_argument("--seeds", type=int, default=3)
    options_of.add_argument("--timm", action="store_true", help="measure timm's vit_tiny too")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
