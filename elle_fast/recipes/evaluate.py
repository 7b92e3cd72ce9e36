"""The evaluation of a checkpoint as one JSON file; one that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from elle_fast import data
from elle_fast._core import checks
from elle_fast._core.files import write_json
from elle_fast.evaluation import masking
from elle_fast.evaluation.accuracy import outcomes, parse_attacks, worst_case
from elle_fast.evaluation.chunks import Chunks
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import commit, provenance, versions


def evaluate_checkpoint(
    path: Path,
    attacks: str = "clean,fgsm,pgd-20",
    *,
    eps: float | None = None,
    root: str | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "cpu",
    masking_check: bool | None = None,
    json: Path | None = None,
    dataset: data.Dataset | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Accuracy of a checkpoint under each attack and under all of them, and whether its gradients are masked.

    Args:
        path: the checkpoint.
        attacks: names, separated by commas (:class:`~elle_fast.evaluation.names.Attack`).
        eps: radius in pixels of [0, 1]; ``None``: the one of training.
        root: the data set's files; ``None``: those of training.
        samples: how many test samples; ``None``: all.
        batch_size: samples at a time.
        seed: of everything that is drawn.
        device: where to compute.
        masking_check: whether to make :func:`~elle_fast.evaluation.masking.masking_check`; ``None``: beside
            AutoAttack, which makes about six times its passes for each sample.
        json: write the result there, atomically. Beside it ``NAME.partial`` holds what is done until then, and the same
            call goes on from it.
        dataset: instead of reading it, to read it once for several checkpoints.
        console: where the progress bar goes; ``None``: standard error.

    Returns:
        What the JSON file holds: the settings, digests of checkpoint and data, ``accuracy`` by attack, ``worst_case``,
        ``masking`` if asked for, and :func:`~elle_fast.recipes.provenance.provenance`.

    Raises:
        FileNotFoundError, IsADirectoryError, ImportError, TypeError, ValueError: for a bad setting, a missing package,
            no or another checkpoint, or data other than those of its training.
        RuntimeError: if an attack is not sound, as :func:`~elle_fast.evaluation.accuracy.outcomes`.
    """
    chosen = parse_attacks(attacks)
    checks.integer("seed", seed, low=0, high=2**63 - 1)
    if json is not None and json.is_dir():  # said now, not at the end
        raise IsADirectoryError(f"json: expected a file to write to, got the folder {str(json)!r}")
    if masking_check is None:
        masking_check = any(attack.kind == "autoattack" for attack in chosen)
    checking = parse_attacks(",".join(masking.ATTACKS)) if masking_check else []
    saved = checkpoint.load(path)
    model, config = checkpoint.load_model(path)
    if dataset is None:
        dataset = data.load(
            config.data,
            config.root if root is None else root,
            limit=config.limit,
            test_limit=config.test_limit,
            image_size=config.image_size,
        )
    check_data(saved, dataset, path)
    if samples is not None:
        checks.integer("samples", samples, low=1, high=len(dataset.test))
    split = dataset.test.subset(samples).to(device)
    eps = config.eps if eps is None else eps
    about: dict[str, Any] = {
        "checkpoint_digest": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        "data": {"name": dataset.name, "digest": saved["data"]},
        "device": device,
    }
    partial = None
    if json is not None:
        partial = Chunks(json.with_name(f"{json.name}.partial"), {**about, **versions(), "commit": commit()})
    console = console or Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        checked = min(masking.SAMPLES, len(split))
        task = bar.add_task(attacks, total=len(chosen) * len(split) + len(checking) * checked)
        options: dict[str, Any] = {
            "eps": eps,
            "batch_size": batch_size,
            "seed": seed,
            "advance": lambda done: bar.advance(task, done),
            "chunks": partial,
        }
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
        found = outcomes(model, split, chosen, **options)
        masked = None
        if masking_check:
            strongest = found[masking.AUTOATTACK].robust[-1] if masking.AUTOATTACK in found else None
            masked = masking.masking_check(model, split, **options, autoattack=strongest)
    result = {
        "checkpoint": str(path),
        **about,
        "method": config.method,
        "eps": eps,
        "seed": seed,
        "batch_size": batch_size,
        "accuracy": {name: outcome.summary() for name, outcome in found.items()},
        "worst_case": worst_case(found),
        **({} if masked is None else {"masking": masked}),
        "packages": {attack.package: attack.version for attack in [*chosen, *checking] if attack.package is not None},
        **provenance(),
    }
    if json is not None:
        write_json(json, result)
    if partial is not None:
        partial.forget()
    return result


def check_data(saved: dict[str, Any], dataset: data.Dataset, path: Path) -> None:
    """Raise a ValueError if ``dataset`` is not the one that the checkpoint's model was trained and normalised for."""
    config, shape = TrainConfig(**saved["config"]), saved["shape"]
    given: list[tuple[str, Any, Any]] = [
        ("name", config.data, dataset.name),
        ("input shape", list(shape["in_shape"]), list(dataset.test.images.shape[1:])),
        ("number of classes", shape["classes"], len(dataset.classes)),
    ]
    if config.normalize:
        given += [("mean", shape["mean"], list(dataset.mean)), ("std", shape["std"], list(dataset.std))]
    given.append(("digest of images and labels", saved["data"], dataset.digest()))
    for name, expected, got in given:
        if expected != got:
            raise ValueError(f"data: expected the {name} of the training of {str(path)!r}, {expected}, got {got}")
