"""A cell and its folder: train it, attack it, read what is there. Of the paper's grid, or of the queue of evidence."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from elle_fast import data
from elle_fast._core.files import write_json
from elle_fast.evaluation import parse_attacks
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import OF_THE_MACHINE, TrainConfig
from elle_fast.recipes.eval_options import EvalOptions
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.folder import BEST, LAST
from elle_fast.recipes.provenance import commit, versions
from elle_fast.recipes.train import CHECKPOINT, RESULT, Measure, train

CELL, STRONG, FAILED, HISTORY = "cell.json", "strong.json", "failed.json", "history.json"
# Of the other models of a run: their files, and the attack of those that get a stronger one.
_MODELS = {"best": BEST["trained"], "averaged": LAST["averaged"], "best averaged": BEST["averaged"]}
_MODELS_ATTACK = "pgd-50-10"
_ROWS = 200  # of lam over time that are kept of a run
# What the summary keeps of a run's result, and of the stronger attacks'.
_KEPT = (
    *("accuracy", "models", "e_lin", "train_adv", "collapsed", "collapsed_in_epoch", "training_seconds"),
    *("machine", "versions", "commit"),
)
_KEPT_STRONG = ("accuracy", "worst_case", "masking", "packages")

_Difference = tuple[str, Any, Any]  # what, as it was made, as it is now


@dataclass(frozen=True)
class Strong:
    """Stronger attacks on a trained model.

    Attributes:
        attacks: names, with commas between.
        samples: how many test images they get; ``None``: all.
        masking: whether AutoAttack brings a look for masked gradients.
        models: whether the best weights are attacked too, and the averaged and best averaged ones of a run that
            averages, by PGD-50-10.
    """

    attacks: str
    samples: int | None = None
    masking: bool = True
    models: bool = False


@dataclass(frozen=True)
class Cell:
    """A variant at one eps with one seed.

    Reading its folder raises ValueError if that holds a run of another configuration, version or commit, and lists
    what differs; a ``code`` of ``None`` accepts every commit. An option that did not exist yet when the run was made
    is no difference where the cell leaves it at its default.

    Attributes:
        work: the folder of its folder.
        code: the commit whose runs it accepts.
        name: of the variant.
        config: its training.
        asked: stronger attacks on it, if any.
        measure: measured after each epoch beside what every run measures.
    """

    work: Path
    code: str | None
    name: str
    config: TrainConfig
    asked: Strong | None = None
    measure: Measure | None = None

    @property
    def folder(self) -> Path:
        """Where its run is."""
        return self.work / f"{self.name.replace(' ', '-')}-eps{255 * self.config.eps:.3g}-seed{self.config.seed}"

    @property
    def text(self) -> str:
        """For messages."""
        return f"{self.name}, eps {self.config.eps:.4g}, seed {self.config.seed}"

    def train(self, dataset: data.Dataset) -> bool:
        """Train it, or continue; False if its loss or weights are no longer finite, which its folder then records.

        Whatever else is raised says nothing of the training: memory that ran out, say, or code that is half made.
        """
        folder, config = self.folder, self.config
        resume = (folder / CHECKPOINT).exists()
        earlier = read_json(folder / CELL).get("commits", []) if resume else []
        now = commit()
        commits = earlier if earlier[-1:] == [now] else [*earlier, now]
        write_json(folder / CELL, {"versions": versions(), "commit": now, "commits": commits})
        try:
            train(config, folder, resume=resume, dataset=dataset, measure=self.measure)
        except RuntimeError as error:
            if not diverged(error):
                raise
            # Without the folder's path on this machine.
            text = str(error).partition(";")[0]
            asked = asdict(config.resolved())
            write_json(folder / FAILED, {"error": text, "config": asked, "versions": versions(), "commit": commit()})
            return False
        return True

    def attack(self, dataset: data.Dataset) -> None:
        """Make the stronger attacks that are missing."""
        for path, file, attacks in self._attacked():
            if self.asked is not None and not path.exists():
                options = EvalOptions(self.folder / file, attacks, samples=self.asked.samples, json=path)
                check = None if self.asked.masking else False  # None: beside AutoAttack
                evaluate_checkpoint(replace(options, device=self.config.device, masking_check=check), dataset=dataset)

    def _attacked(self) -> list[tuple[Path, str, str]]:
        """The result, the checkpoint and the attacks of each model that gets stronger ones; the last weights first."""
        if self.asked is None:
            return []
        found = [(self.folder / STRONG, CHECKPOINT, self.asked.attacks)]
        if self.asked.models:
            for file in self._others().values():
                found.append((self.folder / f"strong_{Path(file).stem}.json", file, _MODELS_ATTACK))
        return found

    def _others(self) -> dict[str, str]:
        """The files of the run's other models than the last weights."""
        return {
            name: file for name, file in _MODELS.items() if self.config.average is not None or "averaged" not in name
        }

    def check_data(self, digest: str) -> None:
        """Raise ValueError for a run on other data."""
        _refuse(self.folder, [("data", self._history()["data"], digest)])

    def kept(self, run: dict[str, Any]) -> bool:
        """Whether ``run``, of a summary, is this cell's; ValueError if it is, with other settings or code."""
        of = run.get("variant"), run.get("seed"), run.get("config", {}).get("eps")
        if of != (self.name, self.config.seed, self.config.eps):
            return False
        self._check_run(run, run["config"])
        return True

    def is_whole(self, run: dict[str, Any] | None) -> bool:
        """Whether ``run``, of a summary, leaves nothing to do: it has the stronger attacks too, if it should."""
        return run is not None and not (self.asked is not None and run.get("strong") is None)

    def failure(self) -> str | None:
        """Why the training failed, if it did."""
        if not (self.folder / FAILED).exists():
            return None
        found = read_json(self.folder / FAILED)
        self._check_run(found, found["config"])
        return str(found["error"])

    def is_done(self) -> bool:
        """Whether it is trained."""
        if (self.folder / RESULT).exists():
            result = read_json(self.folder / RESULT)
            self._check_run(result, result["config"])
            return True
        if (self.folder / CHECKPOINT).exists():
            self._check_run(read_json(self.folder / CELL), checkpoint.load(self.folder / CHECKPOINT)["config"])
        return False

    def strong(self) -> dict[str, Any] | None:
        """The result of the stronger attacks, if they were asked for and all made; ``models``: of the other models."""
        attacked = self._attacked()
        if not attacked or not all(path.exists() for path, *_ in attacked):
            return None
        last, *others = [self._checked(*each) for each in attacked]
        found = {name: last[name] for name in _KEPT_STRONG if name in last}
        if others:
            found["models"] = {name: each["accuracy"] for name, each in zip(self._others(), others, strict=True)}
        return found

    def _checked(self, path: Path, file: str, attacks: str) -> dict[str, Any]:
        """The result of stronger attacks, if they are those asked for, on this checkpoint."""
        found: dict[str, Any] = read_json(path)
        digest = hashlib.blake2b((self.folder / file).read_bytes(), digest_size=16).hexdigest()
        differing: list[_Difference] = [
            ("attacks", list(found["accuracy"]), [attack.name for attack in parse_attacks(attacks)]),
            ("checkpoint_digest", found["checkpoint_digest"], digest),
            *self._code(found),
        ]
        if self.asked is not None and self.asked.samples is not None:
            # No more than there are.
            samples = min(self.asked.samples, self.config.test_limit or self.asked.samples)
            differing.append(("samples", found["worst_case"]["samples"], samples))
        _refuse(path, differing)
        return found

    def read(self) -> dict[str, Any]:
        """The run as the summary keeps it: with its machine, versions and commit, without this machine's paths.

        ``commit`` is the checkout's at its end, ``commits`` those with which its training began and went on.
        """
        result = read_json(self.folder / RESULT)
        history = self._history()
        steps = history["steps"]
        full, light = (result.get(f"{kind}_steps") for kind in ("full", "light"))
        return {
            "variant": self.name,
            "method": result["config"]["method"],
            "seed": result["config"]["seed"],
            "config": {name: value for name, value in result["config"].items() if name != "root"},
            **{name: result[name] for name in _KEPT},
            "never_robust": result.get("never_robust"),  # which earlier versions do not tell
            "commits": read_json(self.folder / CELL).get("commits", [result["commit"]]),
            # The share of steps with the whole gradient of E_lin; None if every step has it.
            "full_share": None if full is None or light is None else full / (full + light),
            "epochs": history["epochs"],
            # Every n-th row.
            "steps": steps[:: max(1, math.ceil(len(steps) / _ROWS))],
            "strong": self.strong(),
        }

    def _history(self) -> dict[str, Any]:
        """The data's digest, the epochs, and lam over time, of a run that is done.

        A file of its own holds them, made when the run is first read: rows are read as long as the last of their file
        is not done, in which time the checkpoint's format may change.
        """
        path = self.folder / HISTORY
        if not path.exists():
            saved = checkpoint.load(self.folder / CHECKPOINT)
            epochs, steps = (saved["history"][name] for name in ("epochs", "steps"))
            lam = [{"step": row["step"], "lam": row["lam"]} for row in steps if "lam" in row]
            write_json(path, {"data": saved["data"], "epochs": epochs, "steps": lam})
        return dict(read_json(path))

    def _check_run(self, about: dict[str, Any], made: dict[str, Any]) -> None:
        """Raise ValueError for a run of other settings or other code."""
        asked, own, defaults = asdict(self.config.resolved()), asdict(self.config), asdict(TrainConfig())
        names = sorted((made.keys() | {name for name in own if own[name] != defaults[name]}) - set(OF_THE_MACHINE))
        _refuse(self.folder, self._code(about) + [(name, made.get(name), asked.get(name)) for name in names])

    def _code(self, about: dict[str, Any]) -> list[_Difference]:
        """Version and commit of a file, and of now."""
        found: list[_Difference] = [("elle_fast", about["versions"].get("elle_fast"), versions()["elle_fast"])]
        return found if self.code is None else [*found, ("commit", about.get("commit"), self.code)]


def diverged(error: RuntimeError) -> bool:
    """Whether a training ended because its loss or its weights were no longer finite."""
    return str(error).startswith("loss: expected finite numbers")


def _refuse(path: Path, compared: list[_Difference]) -> None:
    listed = [f"{name} = {made!r} (now: {now!r})" for name, made, now in compared if made != now]
    if listed:
        raise ValueError(
            f"work: expected runs of this setting and version, got {str(path)!r} of another: {'; '.join(listed)}; "
            "remove it, or choose another --work"
        )


def read_json(path: Path) -> Any:
    """A JSON file's content; ValueError if it was cut off, or is no JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected a whole JSON file, got {str(path)!r}: {error}") from error
