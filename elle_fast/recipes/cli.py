"""``elle-fast train | report | eval | export | methods | info``; as a module, for torchrun: ``python -m elle_fast``."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

import elle_fast

if TYPE_CHECKING:
    from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

_HELP = ("-h", "--help")
_USAGE = """usage: elle-fast [-h | --version | COMMAND [-h] [OPTIONS]]

Adversarial training with ELLE and ELLE-A, without catastrophic overfitting.
"""
_ABOUT_METHODS = """\
A step on a batch: F forward passes, G input gradients, B backward passes to the weights, D: with double
backpropagation. A unit is a forward pass, a data gradient or a weight gradient. lam: the default for CIFAR-10
at eps 8/255. Sources are arXiv numbers.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (interrupted).

    Raises:
        SystemExit: with status 0 after the ``--help`` of ``train``, ``report``, ``eval`` and ``export``.
    """
    command, *given = (sys.argv[1:] if arguments is None else arguments) or [""]
    if command in _HELP:
        print(_USAGE, *(f"  {name:9s}{run.__doc__}" for name, run in COMMANDS.items()), sep="\n")
        return 0
    if command == "--version":
        print(f"elle-fast {elle_fast.__version__}")
        return 0
    if command not in COMMANDS:
        print(f"elle-fast: expected one of {', '.join(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    who = f"elle-fast {command}"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # torchrun sets both variables
        who += f" (rank {os.environ.get('RANK')})"
    try:
        if given and command in ("methods", "info"):  # without options, they need no library that reads them
            if given[0] not in _HELP:
                raise ValueError(f"expected no options, got {given[0]!r}")
            print(f"usage: {who}\n\n{COMMANDS[command].__doc__}")
            return 0
        return COMMANDS[command](given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (TypeError, ValueError, ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = "; it needs the recipes' libraries: pip install 'elle-fast[recipes]'" if missing else ""
        print(f"{who}: {error}{hint}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"{who}: {str(error) or 'not enough memory'}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 130 if type(error).__name__ == "InterruptedRunError" else 1


def read_options(command: str, arguments: Sequence[str]) -> Any:
    """The TrainOptions, ReportOptions, EvalOptions or ExportOptions of a command; their docstrings are the help.

    An option that is given wins over the preset fast, which wins over a recipe, which wins over the file of
    ``--config``.

    Raises:
        SystemExit: with status 0 after ``--help``.
        ValueError: in one line, for an unknown option, a missing or an unreadable value, or one that contradicts the
            recipe ``authors``.
    """
    import tyro

    from elle_fast.presets import FAST
    from elle_fast.recipes import recipe
    from elle_fast.recipes.checked import number_text, parse_mapping, parse_number
    from elle_fast.recipes.config import TrainConfig, TrainOptions
    from elle_fast.recipes.eval_options import EvalOptions
    from elle_fast.recipes.export_options import ExportOptions
    from elle_fast.recipes.report_options import ReportOptions

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def fractions(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[float] | None:
        if info.type is not float:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="NUMBER",
            instance_from_str=lambda words: parse_number(words[0]),
            is_instance=lambda value: isinstance(value, (int, float)),
            str_from_instance=lambda value: [number_text(value)],
        )

    @registry.primitive_rule
    def mappings(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
        if get_origin(info.type) is not MutableMapping:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="MAPPING",
            instance_from_str=lambda words: parse_mapping(words[0]),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    conf = tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes, tyro.conf.PositionalRequiredArgs
    given: dict[str, Any] = {"prog": f"elle-fast {command}", "args": arguments, "config": conf, "registry": registry}

    def parse(kind: Any, **default: Any) -> Any:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options, unknown = tyro.cli(kind, return_unknown_args=True, **given, **default)
        except SystemExit as stopped:
            if stopped.code == 0:
                raise
            raise ValueError(_in_one_line(said.getvalue())) from None
        if unknown:
            raise ValueError(_not_an_option(unknown[0], kind, *[TrainConfig] * (kind is TrainOptions)))
        return options

    if command != "train":
        return parse({"report": ReportOptions, "eval": EvalOptions, "export": ExportOptions}[command])
    options = parse(TrainOptions)
    if options.config is None and options.recipe is None and not options.fast:
        return options
    run, preset = TrainConfig() if options.config is None else TrainConfig.from_yaml(options.config), {}
    if options.recipe is not None:
        # A recipe depends on the data set and the method, which may be given beside it.
        preset = recipe.options(options.recipe, parse(TrainOptions, default=TrainOptions(run=run)).run)
    run = replace(run, **{**preset, **(FAST if options.fast else {})})
    found = parse(TrainOptions, default=TrainOptions(run=run))
    recipe.check(options.recipe, found.run, preset)
    return found


def _in_one_line(framed: str) -> str:
    """Tyro's message, framed in Unicode or ASCII, without the frame, the title, and the help below the message."""
    parts = re.split("\n.*(?:─────|-----).*", "\n" + framed)
    said = " ".join((parts[1] if len(parts) > 1 else framed).replace("│", " ").split())
    return re.sub(
        "^Error parsing (run|ReportOptions|EvalOptions|ExportOptions): ", "", said
    )  # our own checks name the option


def _not_an_option(word: str, *kinds: Any) -> str:
    name = word.partition("=")[0]
    options = [field.name.replace("_", "-") for kind in kinds for field in fields(kind) if name.startswith("-")]
    near = "".join(f"; did you mean --{match}?" for match in get_close_matches(name.removeprefix("--"), options, 1))
    return f"{name}: not an option{near}"


def _train(arguments: Sequence[str]) -> int:
    """Train a model."""
    options = read_options("train", arguments)
    config = options.run.resolved()
    if options.print_config:
        print(options.run.to_yaml(), end="")
        return 0

    import torch

    from elle_fast.recipes.distributed import local_device, process_group
    from elle_fast.recipes.progress import describe_result
    from elle_fast.recipes.train import PAGE, PICTURE, train

    config = replace(config, device=local_device(options.run.device))
    ball = f"eps{config.eps:.4g}" + "-l2" * (config.norm == "l2")
    folder = options.out or Path("runs") / f"{config.data}-{config.method}-{ball}-seed{config.seed}"
    with process_group(torch.device(config.device), options.timeout) as is_main:
        names = ("resume", "overwrite", "allow_other_data", "timeout")
        result = train(config, folder, **{name: getattr(options, name) for name in names})
    if not is_main:
        return 0
    print(*describe_result(result), sep="\n")
    if result["collapsed"]:
        print(f"collapsed    first in epoch {result['collapsed_in_epoch']}")
    if result["never_robust"]:
        print("not robust   in any epoch, but under the training attack")
    if (folder / PICTURE).exists():
        print(f"picture      {folder / PICTURE}")
    if (folder / PAGE).exists():
        print(f"report       {folder / PAGE}")
    return 0


def _report(arguments: Sequence[str]) -> int:
    """One HTML page that compares trainings."""
    options = read_options("report", arguments)

    from elle_fast.evaluation.document import write_document
    from elle_fast.recipes.run_page import run_page
    from elle_fast.recipes.run_record import read_all

    write_document(options.out, run_page(read_all(options.runs)))
    print(f"report       {options.out}")
    return 0


def _eval(arguments: Sequence[str]) -> int:
    """Accuracy of a model, clean and under attack."""
    options = read_options("eval", arguments)

    from elle_fast.recipes.evaluate import evaluate_checkpoint
    from elle_fast.recipes.progress import describe_accuracy

    result = evaluate_checkpoint(options, given=_names(arguments))
    for name, numbers in result["accuracy"].items():
        print(*describe_accuracy({name: numbers}))
        for note, times in numbers.get("notes", {}).items():
            print(f"{name} says, {times} times: {note}", file=sys.stderr)
    worst = result["worst_case"]
    if len(worst["attacks"]) > 1:
        print(f"{'worst case':12s} {worst['accuracy']:7.2%}  withstand each of these attacks")
    if "masking" in result:
        print(_masking_line(result["masking"]))
    if options.report is not None:
        print(f"{'report':12s} {options.report}")
    return 0


def _names(arguments: Sequence[str]) -> set[str]:
    """The names of the options among the words of a command line, as Python has them."""
    words = [word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")]
    return {word.removeprefix("no-").replace("-", "_") for word in words}


def _masking_line(found: dict[str, Any]) -> str:
    rows = {found["white_box"]["attack"]: found["white_box"], **found["attacks"]}
    numbers = ", ".join(f"{name} {row['accuracy']:.2%}" for name, row in rows.items())
    beaten = ", ".join(name for name, row in found["attacks"].items() if row["suspicious"])
    verdict = f"suspicious: {found['white_box']['attack']} is beaten by {beaten}" if beaten else found["verdict"]
    verdict += ": too few samples" * (verdict == "undecided")
    return f"{'gradients':12s} {verdict} ({numbers} of {found['samples']})"


def _export(arguments: Sequence[str]) -> int:
    """A trained model as a file for others: safetensors, torch.export, ONNX, or an entry of RobustBench."""
    options = read_options("export", arguments)

    from elle_fast.recipes.export import export

    done = export(options)
    print(f"{'weights':12s} {done['weights']} ({done['checkpoint']})")
    print(f"{'compared':12s} {done['compared']}")
    print(f"{'written':12s} {done['file']}")
    return 0


def _methods(_: Sequence[str]) -> int:
    """The training methods, with cost and source."""
    from elle_fast import presets
    from elle_fast.methods import TABLE

    print(_ABOUT_METHODS)
    width = max(map(len, TABLE))
    print(f"{'method':{width}s}  units  {'a step':10s}  {'lam':>6s}  {'source':12s}  what it is")
    for name, row in TABLE.items():
        weight = presets.weight(name)
        lam = "-" if weight is None else f"{weight:g}"
        print(f"{name:{width}s}  {row.units:5g}  {row.passes:10s}  {lam:>6s}  {row.source:12s}  {row.about}")
    return 0


def _info(_: Sequence[str]) -> int:
    """Versions, devices, and which backends can run here."""
    import torch

    from elle_fast.backends import BACKENDS, extension
    from elle_fast.recipes.provenance import commit, machine, versions

    rows: dict[str, Any] = {**versions(), "commit": commit() or "not a checkout", **machine()}
    rows["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    rows |= extension.describe()
    for name, backend in BACKENDS.items():
        try:
            reason = backend.why_not()
        except ValueError as error:  # a variable of the environment asks for what is not there
            reason = str(error)
        rows[f"backend {name}"] = f"available on {backend.runs_on}" if reason is None else f"not available: {reason}"
    for name, value in rows.items():
        lines = str("not installed" if value is None else value).splitlines()
        print(f"{name:20s} " + ("\n" + " " * 21).join(lines))
    return 0


COMMANDS = {
    "train": _train,
    "report": _report,
    "eval": _eval,
    "export": _export,
    "methods": _methods,
    "info": _info,
}
