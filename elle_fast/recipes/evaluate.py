"""The evaluation of a model as a JSON file, a page and a table; one that was interrupted goes on from where it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from elle_fast import data, evaluation
from elle_fast._core import checks, precision
from elle_fast._core.default_device import host_by_default
from elle_fast._core.files import check_writable, write_json
from elle_fast.evaluation import Chunks, Outcome, curve, in_precision, inputs, masking, outcomes, parse_attacks
from elle_fast.recipes import subject as subjects
from elle_fast.recipes.distributed import local_device
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.progress import describe_accuracy
from elle_fast.recipes.provenance import commit, provenance, versions


@host_by_default()
def evaluate_checkpoint(
    options: EvalOptions,
    *,
    dataset: data.Dataset | None = None,
    console: Console | None = None,
    given: Collection[str] | None = None,
) -> dict[str, Any]:
    """Accuracy of a model under each attack and under all of them, and whether its gradients are masked.

    The model is that of a checkpoint of ``elle-fast train``, or any other one that the options name, with its weights
    from a file. Of the latter 256 samples tell beforehand whether it seems to take normalized inputs.

    The masking check takes at most 256 samples, and for each of them about six times the passes of AutoAttack. While it
    works, ``NAME.partial`` beside ``options.json`` (or else ``report``, or ``per_sample``) holds the finished batches,
    and the same call goes on from them.

    Args:
        options: the model, and how to attack it.
        dataset: instead of reading it, to read it once for several models.
        console: where warnings and the progress bar go; ``None``: standard error.
        given: the names of the options of model and data that were asked for, none of which may contradict a
            checkpoint; by default those that are not as they are by default.

    Returns:
        What the JSON file holds: the settings, digests of weights and data, ``accuracy`` by attack, ``worst_case``,
        ``masking``, ``curve`` and ``by_class`` if asked for, ``warnings`` if there are any, and
        :func:`~elle_fast.recipes.provenance.provenance`.

    Raises:
        FileNotFoundError, IsADirectoryError, ImportError, TypeError, ValueError: for a bad setting, a missing package,
            a file that is no checkpoint or has no weights of the model, or data other than those of a checkpoint.
        OSError: if a file cannot be written, which is tried before the work; should it fail at the end, the accuracies
            are printed on the console.
        RuntimeError: if an attack is not sound, as :func:`~elle_fast.evaluation.outcomes`.
    """
    if not isinstance(options, EvalOptions):
        raise TypeError(f"options: expected EvalOptions, got {checks.describe(options)}")
    checks.optional("dataset", dataset, data.Dataset, "a Dataset")
    checks.optional("console", console, Console, "a rich.console.Console")
    json, seed = options.json, options.seed
    chosen = parse_attacks(options.attacks)
    files = {"json": json, "report": options.report, "per_sample": options.per_sample}
    _check_files(files)
    device, check_masking = local_device(options.device), options.masking_check
    if check_masking is None:
        check_masking = any(attack.kind == "autoattack" for attack in chosen)
    checking = parse_attacks(",".join(masking.ATTACKS)) if check_masking else []
    precision.check("precision", options.precision)
    radii = options.radii()
    console = console or Console(stderr=True)
    subject = subjects.read(options, dataset, given)
    dataset, eps, norm = subject.dataset, subject.eps, subject.norm
    if radii is None and options.report is not None:
        radii = evaluation.default_radii(eps, norm)
    for radius in radii or ():
        evaluation.radius(radius, norm)
    if options.samples is not None:
        checks.integer("samples", options.samples, low=1, high=len(dataset.test))
    index = data.choose(len(dataset.test), options.samples)
    split = dataset.test.subset(options.samples).to(device)
    batch_size = data.at_a_time(split) if options.batch_size is None else options.batch_size
    about = {**subject.about, "device": device, "precision": options.precision}
    partial, place = None, next((path for path in files.values() if path is not None), None)
    if place is not None:
        partial = Chunks(place.with_name(f"{place.name}.partial"), {**about, **versions(), "commit": commit()})

    def some(most: int) -> Tensor:
        return data.choose(len(split), most if len(split) > most else None)

    def batches_of(kept: Tensor) -> Any:
        return data.in_order(split[kept.to(split.labels.device)], batch_size)

    kept, on_curve = some(masking.SAMPLES), some(curve.SAMPLES)
    more: dict[str, Any] = {}
    with _not_lost(console) as found, Progress(console=console, disable=not console.is_terminal) as bar:
        rounds = len(chosen) * len(split) + len(checking) * len(kept) + len(radii or ()) * len(on_curve)
        task = bar.add_task(options.attacks, total=rounds)
        how: dict[str, Any] = {"norm": norm, "seed": seed, "chunks": partial}
        how["advance"] = lambda done: bar.advance(task, done)
        model = subject.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in training
        model = in_precision(model, options.precision)
        said = list(subject.remarks)
        if subject.foreign:
            suspicion = inputs.check_inputs(model, *next(iter(batches_of(some(inputs.SAMPLES)))))
            if suspicion is not None:
                more["warnings"] = [_advised(suspicion, subject)]
                said.append(f"warning: {more['warnings'][0]}")
        for line in said:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        found |= outcomes(model, data.in_order(split, batch_size), chosen, eps=eps, **how)
        if check_masking:
            strongest = found[masking.AUTOATTACK].robust[-1][kept] if masking.AUTOATTACK in found else None
            checked = masking.masking_check(model, batches_of(kept), eps=eps, **how, autoattack=strongest)
            more["masking"] = checked
        if radii is not None:
            more["curve"] = curve.accuracy_curve(model, lambda: batches_of(on_curve), radii, **how)
        predicted = None
        if options.report is not None or options.per_sample is not None:
            predicted = evaluation.predictions(model, data.in_order(split, batch_size))
            more["by_class"] = evaluation.by_class(split.labels, predicted, found, dataset.classes)
        result = {
            **subject.origin,
            **about,
            **subject.run,
            "eps": eps,
            "norm": norm,
            "seed": seed,
            "batch_size": batch_size,
            "accuracy": {name: outcome.summary() for name, outcome in found.items()},
            "worst_case": evaluation.worst_case(found),
            **more,
            "packages": {
                attack.package: attack.version for attack in [*chosen, *checking] if attack.package is not None
            },
            **provenance(),
        }
        if json is not None:
            write_json(json, result)
        if options.per_sample is not None and predicted is not None:
            evaluation.write_per_sample(options.per_sample, index, split.labels, predicted, found)
        if options.report is not None and predicted is not None:
            shown = evaluation.pick(split.labels, predicted, found)
            x, y = next(iter(data.in_order(split[shown.to(split.labels.device)], len(shown))))
            drawn = evaluation.attacked_examples(model, x, y, chosen, eps=eps, norm=norm, seed=seed, index=index[shown])
            page = {"title": f"Robustness of {subject.name}", **result}
            evaluation.write_page(options.report, page, examples=drawn, classes=dataset.classes)
        if partial is not None:
            partial.forget()
    return result


def _check_files(files: dict[str, Path | None]) -> None:
    """Raise for a file that cannot be written, now and not at the end."""
    places = [path.absolute() for path in files.values() if path is not None]
    if twice := [str(path) for path in places if places.count(path) > 1]:
        raise ValueError(f"{', '.join(files)}: expected files of their own, got {twice[0]!r} twice")
    for name, path in files.items():
        if path is not None:
            if path.is_dir():
                raise IsADirectoryError(f"{name}: expected a file to write to, got the folder {str(path)!r}")
            check_writable(path)


def _advised(suspicion: evaluation.Suspicion, subject: subjects.Subject) -> str:
    """What the check of the inputs found, in terms of the options."""
    if suspicion.mean is None or suspicion.std is None:
        return suspicion.message
    if subject.remarks:
        return f"{suspicion.message}; now it {subject.remarks[0]}: --mean and --std (or --no-normalize) change that"
    asked = f"--mean {inputs.listed(suspicion.mean)} --std {inputs.listed(suspicion.std)}"
    return f"{suspicion.message}: {asked}, or better the numbers of its training"


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
