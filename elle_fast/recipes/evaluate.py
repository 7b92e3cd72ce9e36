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
from elle_fast.data.streaming import Stream
from elle_fast.evaluation import (
    Attack,
    Chunks,
    Outcome,
    curve,
    in_precision,
    inputs,
    masking,
    outcomes,
    parse_attacks,
    radius,
    worst_case,
)
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
        ``masking``, ``curve`` and ``by_class`` if asked for, ``test_images`` (how many the data have), ``unreadable``
        (by name, why a picture could not be read; such pictures are in none of the numbers) and ``warnings`` if there
        are any, and :func:`~elle_fast.recipes.provenance.provenance`.

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
    chosen = parse_attacks(options.attacks)
    _check_files(options.files())
    device, check_masking = local_device(options.device), options.masking_check
    if check_masking is None:
        check_masking = any(attack.kind == "autoattack" for attack in chosen)
    checking = parse_attacks(",".join(masking.ATTACKS)) if check_masking else []
    precision.check("precision", options.precision)
    radii = options.radii()
    subject = subjects.read(options, dataset, given)
    if radii is None and options.report is not None:
        radii = evaluation.default_radii(subject.eps, subject.norm)
    for eps in radii or ():
        radius(eps, subject.norm)
    if options.samples is not None:
        checks.integer("samples", options.samples, low=1, high=len(subject.dataset.test))
    work = _Evaluation(options, subject, device, chosen, checking, radii or [])
    return work.run(console or Console(stderr=True))


class _Evaluation:
    """The evaluation of a subject, whose settings have been checked."""

    def __init__(
        self,
        options: EvalOptions,
        subject: subjects.Subject,
        device: str,
        chosen: list[Attack],
        checking: list[Attack],
        radii: list[float],
    ) -> None:
        self.options, self.subject, self.chosen, self.checking, self.radii = options, subject, chosen, checking, radii
        self.index = data.choose(len(subject.dataset.test), options.samples)  # in the test split, of those in `split`
        self.split = subject.dataset.test.subset(options.samples).to(device)
        self.batch_size = data.at_a_time(self.split) if options.batch_size is None else options.batch_size
        self.about = {**subject.about, "device": device, "precision": options.precision}
        self.partial: Chunks | None = None
        if (place := next(iter(options.files().values()), None)) is not None:
            settings = {**self.about, **versions(), "commit": commit()}
            self.partial = Chunks(place.with_name(f"{place.name}.partial"), settings)
        # As in training.
        model = subject.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = in_precision(model, options.precision)
        self.extra: dict[str, Any] = {}  # what a result has beside the accuracies

    def run(self, console: Console) -> dict[str, Any]:
        """Check the inputs, attack, write the files; returns the result."""
        self._leave_out_unreadable(console)
        self._check_inputs(console)
        with _not_lost(console) as found, Progress(console=console, disable=not console.is_terminal) as bar:
            kept, on_curve = self._some(masking.SAMPLES), self._some(curve.SAMPLES)
            rounds = len(self.chosen) * len(self.split) + len(self.checking) * len(kept)
            task = bar.add_task(self.options.attacks, total=rounds + len(self.radii) * len(on_curve))
            how: dict[str, Any] = {"norm": self.subject.norm, "seed": self.options.seed, "chunks": self.partial}
            how["advance"] = lambda done: bar.advance(task, done)
            found |= outcomes(self.model, self._batches(), self.chosen, eps=self.subject.eps, **how)
            if self.checking:
                strongest = found[masking.AUTOATTACK].robust[-1][kept] if masking.AUTOATTACK in found else None
                how_far: dict[str, Any] = {"eps": self.subject.eps, "autoattack": strongest}
                self.extra["masking"] = masking.masking_check(self.model, self._batches(kept), **how_far, **how)
            if self.radii:
                self.extra["curve"] = curve.accuracy_curve(
                    self.model, lambda: self._batches(on_curve), self.radii, **how
                )
            return self._written(found)

    def _leave_out_unreadable(self, console: Console) -> None:
        """Keep the samples whose pictures can be read: in the place of another is one that is counted already."""
        count, known, lines = len(self.split), self.subject.dataset.unreadable, list[str]()
        if isinstance(self.split, Stream):
            if self.split.corrupt.allowed == 0:
                return
            found = self.split.tried()
            lines += self.split.corrupt.news()
        else:
            found = {place: known[row] for place, row in enumerate(self.index.tolist()) if row in known}
        if len(found) == count:
            raise ValueError(f"skip_corrupt: expected test pictures that can be read, got none of {count}")
        kept = torch.tensor([place not in found for place in range(count)], device="cpu")
        self.index = self.index[kept]
        if isinstance(self.split, Stream):
            self.split = self.split.without(found)
        elif found:
            self.split = self.split[kept.to(self.split.labels.device)]
        if found:
            self.extra["unreadable"] = dict(found.values())
            lines.append(f"{len(found)} of {count} test pictures cannot be read; none of the numbers counts them")
            self.extra["warnings"] = lines[-1:]
        for line in lines:
            console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)

    def _check_inputs(self, console: Console) -> None:
        """Say how a model from elsewhere normalizes, and whether it seems to take other inputs."""
        said = list(self.subject.remarks)
        if self.subject.foreign:
            suspicion = inputs.check_inputs(
                self.model, *next(iter(self._batches(self._some(inputs.SAMPLES), inputs.SAMPLES)))
            )
            if suspicion is not None:
                self.extra.setdefault("warnings", []).append(_advised(suspicion, self.subject))
                said.append(f"warning: {self.extra['warnings'][-1]}")
        for line in said:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _some(self, most: int) -> Tensor:
        """At most so many samples, always the same."""
        return data.choose(len(self.split), most if len(self.split) > most else None)

    def _batches(self, kept: Tensor | None = None, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        split = self.split if kept is None else self.split[kept.to(self.split.labels.device)]
        return data.in_order(split, size or self.batch_size)

    def _written(self, found: dict[str, Outcome]) -> dict[str, Any]:
        """The result, in all files that were asked for."""
        options, labels, classes = self.options, self.split.labels, self.subject.dataset.classes
        predicted = None
        if options.report is not None or options.per_sample is not None:
            predicted = evaluation.predictions(self.model, self._batches())
            self.extra["by_class"] = evaluation.by_class(labels, predicted, found, classes)
        result = {
            **self.subject.origin,
            **self.about,
            **self.subject.run,
            "eps": self.subject.eps,
            "norm": self.subject.norm,
            "seed": options.seed,
            "batch_size": self.batch_size,
            "test_images": len(self.subject.dataset.test),
            "accuracy": {name: outcome.summary() for name, outcome in found.items()},
            "worst_case": worst_case(found),
            **self.extra,
            "packages": {
                attack.package: attack.version
                for attack in [*self.chosen, *self.checking]
                if attack.package is not None
            },
            **provenance(),
        }
        if options.json is not None:
            write_json(options.json, result)
        if predicted is not None:
            if options.per_sample is not None:
                evaluation.write_per_sample(options.per_sample, self.index, labels, predicted, found)
            if options.report is not None:
                shown = evaluation.pick(labels, predicted, found)
                how: dict[str, Any] = {"eps": self.subject.eps, "norm": self.subject.norm, "seed": options.seed}
                x, y = next(iter(self._batches(shown, len(shown))))
                drawn = evaluation.attacked_examples(self.model, x, y, self.chosen, **how, index=self.index[shown])
                page = {"title": f"Robustness of {self.subject.name}", **result}
                evaluation.write_page(options.report, page, examples=drawn, classes=classes)
        if self.partial is not None:
            self.partial.forget()
        return result


def _check_files(files: dict[str, Path]) -> None:
    """Raise for a file that cannot be written, now and not at the end."""
    places = [path.absolute() for path in files.values()]
    if twice := [str(path) for path in places if places.count(path) > 1]:
        raise ValueError(f"{', '.join(files)}: expected a file for each, got {twice[0]!r} twice")
    for name, path in files.items():
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
