"""The evaluation of a checkpoint as one JSON file; one that was interrupted goes on from where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from elle_fast import data
from elle_fast._core import checks, precision
from elle_fast._core.default_device import host_by_default
from elle_fast._core.digests import digest_of
from elle_fast._core.files import write_json
from elle_fast.evaluation import Chunks, Outcome, in_precision, masking, outcomes, parse_attacks, radius, worst_case
from elle_fast.recipes import checkpoint
from elle_fast.recipes.distributed import local_device
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.progress import describe_accuracy
from elle_fast.recipes.provenance import commit, provenance, versions


@host_by_default()
def evaluate_checkpoint(
    options: EvalOptions, *, dataset: data.Dataset | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Accuracy of a checkpoint under each attack and under all of them, and whether its gradients are masked.

    The masking check takes at most 256 samples, and for each of them about six times the passes of AutoAttack. While it
    works, ``NAME.partial`` beside ``options.json`` holds the finished batches, and the same call goes on from them.

    Args:
        options: the checkpoint, and how to attack it.
        dataset: instead of reading it, to read it once for several checkpoints.
        console: where the progress bar goes; ``None``: standard error.

    Returns:
        What the JSON file holds: the settings, digests of checkpoint and data, ``accuracy`` by attack, ``worst_case``,
        ``masking`` if asked for, and :func:`~elle_fast.recipes.provenance.provenance`.

    Raises:
        FileNotFoundError, IsADirectoryError, ImportError, TypeError, ValueError: for a bad setting, a missing package,
            a file that is no checkpoint, or data other than those of its training.
        OSError: if the file cannot be written; the accuracies are then printed on the console.
        RuntimeError: if an attack is not sound, as :func:`~elle_fast.evaluation.outcomes`.
    """
    if not isinstance(options, EvalOptions):
        raise TypeError(f"options: expected EvalOptions, got {checks.describe(options)}")
    checks.optional("dataset", dataset, data.Dataset, "a Dataset")
    checks.optional("console", console, Console, "a rich.console.Console")
    path, json, seed = options.checkpoint, options.json, options.seed
    chosen = parse_attacks(options.attacks)
    if json is not None and json.is_dir():  # said now, not at the end
        raise IsADirectoryError(f"json: expected a file to write to, got the folder {str(json)!r}")
    device, check_masking = local_device(options.device), options.masking_check
    if check_masking is None:
        check_masking = any(attack.kind == "autoattack" for attack in chosen)
    checking = parse_attacks(",".join(masking.ATTACKS)) if check_masking else []
    precision.check("precision", options.precision)
    model, config, saved = checkpoint.load_model(path)
    dataset = config.read_data(options.root) if dataset is None else dataset
    if not isinstance(dataset, data.Dataset):
        raise TypeError(f"dataset: expected None or a Dataset, got {checks.describe(dataset)}")
    if dataset.name != config.data:
        raise ValueError(f"data: expected the name of the training of {str(path)!r}, {config.data}, got {dataset.name}")
    digest = dataset.digest()
    checkpoint.check_same_data(saved, dataset, digest, path, options.allow_other_data)
    if options.samples is not None:
        checks.integer("samples", options.samples, low=1, high=len(dataset.test))
    split = dataset.test.subset(options.samples).to(device)
    batch_size = data.at_a_time(split) if options.batch_size is None else options.batch_size
    norm = config.norm if options.norm is None else options.norm
    eps = radius(config.eps if options.eps is None else options.eps, norm)
    about: dict[str, Any] = {
        "checkpoint_digest": digest_of(path.read_bytes()),
        "data": {"name": dataset.name, "digest": digest},
        "device": device,
        "precision": options.precision,
    }
    if digest != saved["data"]:
        about["data"]["digest_of_training"] = saved["data"]
    partial = None
    if json is not None:
        partial = Chunks(json.with_name(f"{json.name}.partial"), {**about, **versions(), "commit": commit()})
    console = console or Console(stderr=True)
    kept = data.choose(len(split), masking.SAMPLES if len(split) > masking.SAMPLES else None)
    masked = {}
    with _not_lost(console) as found, Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(options.attacks, total=len(chosen) * len(split) + len(checking) * len(kept))
        given: dict[str, Any] = {"eps": eps, "norm": norm, "seed": seed, "chunks": partial}
        given["advance"] = lambda done: bar.advance(task, done)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
        model = in_precision(model, options.precision)
        found |= outcomes(model, data.in_order(split, batch_size), chosen, **given)
        if check_masking:
            strongest = found[masking.AUTOATTACK].robust[-1][kept] if masking.AUTOATTACK in found else None
            checked = data.in_order(split[kept.to(split.labels.device)], batch_size)
            masked = {"masking": masking.masking_check(model, checked, **given, autoattack=strongest)}
        result = {
            "checkpoint": str(path),
            **about,
            "method": config.method,
            "weights": saved["weights"],
            "step": saved["step"],
            "eps": eps,
            "norm": norm,
            "seed": seed,
            "batch_size": batch_size,
            "accuracy": {name: outcome.summary() for name, outcome in found.items()},
            "worst_case": worst_case(found),
            **masked,
            "packages": {
                attack.package: attack.version for attack in [*chosen, *checking] if attack.package is not None
            },
            **provenance(),
        }
        if json is not None and partial is not None:
            write_json(json, result)
            partial.forget()
    return result


@contextmanager
def _not_lost(console: Console) -> Iterator[dict[str, Outcome]]:
    """Outcomes that have been found are printed if they cannot be returned or written."""
    found: dict[str, Outcome] = {}
    try:
        yield found
    except BaseException:
        if found:
            lines = describe_accuracy({name: outcome.summary() for name, outcome in found.items()})
            console.print(*lines, sep="\n", highlight=False, soft_wrap=True)
        raise
