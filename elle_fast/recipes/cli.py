"""``elle-fast train | eval | methods | info``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import elle_fast

_EXTRA_MISSING = "needs the recipes' libraries: pip install 'elle-fast[recipes]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (interrupted)."""
    parser = _parser()
    options = parser.parse_args(arguments)
    who = f"elle-fast {options.command}"
    if os.environ.get("WORLD_SIZE", "1") != "1":  # set by torchrun, as is the process' number
        who += f" (rank {os.environ.get('RANK')})"
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"{who}: {error}; it {_EXTRA_MISSING}", file=sys.stderr)
        return 2
    except (TypeError, ValueError, ImportError, OSError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 130 if type(error).__name__ == "InterruptedRunError" else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elle-fast", description="Adversarial training with ELLE and ELLE-A, without catastrophic overfitting."
    )
    parser.add_argument("--version", action="version", version=f"elle-fast {elle_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval | methods | info")
    _add_train(commands.add_parser("train", help="train a model", formatter_class=argparse.RawDescriptionHelpFormatter))
    _add_eval(commands.add_parser("eval", help="accuracy of a checkpoint, clean and under attack"))
    methods = commands.add_parser("methods", help="the training methods, with cost and source")
    methods.set_defaults(run=_methods)
    info = commands.add_parser("info", help="versions, devices, and which backends can run here")
    info.set_defaults(run=_info)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a model. --out then holds checkpoint.pt, result.json, curves.png, steps.csv, epochs.csv, tensorboard/.\n"
        "Options left out take the schedule's, the model's or the data set's own value.\n"
        "Under torchrun, its processes share each batch: torchrun --nproc_per_node 2 -m elle_fast.recipes.cli train ..."
    )
    add = parser.add_argument
    add("--data", help="digits (default), cifar10, cifar100, svhn, mnist or image-folder")
    add("--root", help="folder or archive of the data set; digits need none")
    add("--limit", type=int, help="train on this many images")
    add("--test-limit", type=int, help="keep this many test images")
    add("--image-size", type=int, help="resize and crop an image folder's pictures to this")
    add("--model", help="preact, preactresnet18, wideresnet28-10, cnn (default) or mlp")
    add("--width", type=int, help="channels of the model's first stage")
    add("--normalize", action=argparse.BooleanOptionalAction, help="subtract mean, divide by std first (yes)")
    add("--method", help="elle-a (default), fgsm, n-fgsm+elle-a, ...: elle-fast methods lists them")
    add("--eps", type=fraction, help="radius in pixels of [0, 1]: 8/255 (default) or 0.1")
    add("--lam", type=float, help="lam of elle, lam_max of elle-a, else the weight of the method's regulariser")
    add(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="clamp training points to [0, 1] (as the method's source)",
    )
    add("--forward", help="packed (default), split or checkpoint: speed against memory, where ELLE makes the pass")
    add("--skip-below", type=float, help="elle-a: no gradient of E_lin while lam is at most this part of lam_max")
    add("--triplet-fraction", type=float, help="part of the batch on which E_lin is estimated (1)")
    add("--fast", action="store_true", help="elle-a: the preset fast, --skip-below 0.01 --triplet-fraction 0.125")
    add("--lagged", action=argparse.BooleanOptionalAction, help="elle-a: a step's lam takes effect in the next (no)")
    add("--points", help="of E_lin: elle (default), three on a line, or five-point, the paper's Definition 3")
    add("--triplets", type=int, help="independent triplets over which E_lin is averaged (1)")
    add("--alpha", help="of x_c between x_a and x_b: uniform (default) or half")
    add("--augment", action=argparse.BooleanOptionalAction, help="random crop and flip (as usual for the data set)")
    add("--schedule", help="short (default), long, long-cos or constant")
    add("--epochs", type=int, help="instead of the schedule's")
    add("--lr", type=float, dest="learning_rate", help="highest learning rate, instead of the schedule's")
    add("--batch-size", type=int, help="instead of the schedule's")
    add("--momentum", type=float, help="of SGD (0.9)")
    add("--weight-decay", type=float, help="of SGD (5e-4)")
    add("--seed", type=int, help="of weights, order and noise (0)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add(
        "--sync-batchnorm",
        action=argparse.BooleanOptionalAction,
        help="under torchrun: batch norm over the whole batch, not each process' share; on GPUs (no)",
    )
    add("--timeout", type=_seconds, default=120.0, help="under torchrun: seconds to wait for another process (120)")
    add("--watch", type=int, help="test images attacked after each epoch (512)")
    add("--eval-attacks", help="of the final result (clean,fgsm,pgd-20)")
    add("--eval-samples", type=int, help="test images for the final result (all)")
    add("--log-every", type=int, help="steps between rows of steps.csv (10)")
    add("--checkpoint-every", type=int, help="steps between checkpoints within an epoch (200)")
    add("--out", type=Path, help="folder of the run (runs/<data>-<method>-eps<eps>-seed<seed>)")
    add("--resume", action="store_true", help="continue the run in --out from its checkpoint")
    add("--overwrite", action="store_true", help="begin anew even if --out holds a run")
    parser.set_defaults(run=_train)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a run")
    add(
        "--attacks",
        default="clean,fgsm,pgd-20",
        help="separated by commas: clean, fgsm, pgd-K, pgd-K-RESTARTS, noise-K, and with elle-fast[eval] autoattack, "
        "square, square-QUERIES, foolbox-pgd-K, foolbox-pgd-K-RESTARTS (clean,fgsm,pgd-20)",
    )
    add("--eps", type=fraction, help="radius; by default the one of training")
    add("--root", help="the data set's files; by default those of training")
    add("--samples", type=int, help="test images (all)")
    add("--batch-size", type=int, default=256)
    add("--seed", type=int, default=0, help="of the random starts")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add(
        "--masking-check",
        action=argparse.BooleanOptionalAction,
        help="look for masked gradients: PGD-200, Square, noise against PGD-20 on 256 images (yes beside autoattack)",
    )
    add("--json", type=Path, help="write the result to this file; cut off, the same command goes on where it was")
    parser.set_defaults(run=_eval)


def _train(options: argparse.Namespace) -> int:
    import torch

    from elle_fast.presets import FAST
    from elle_fast.recipes.config import TrainConfig
    from elle_fast.recipes.distributed import local_device, process_group
    from elle_fast.recipes.train import PICTURE, train

    given = {f.name: getattr(options, f.name) for f in fields(TrainConfig)}
    given["device"] = device(local_device(options.device))
    chosen = {name: value for name, value in given.items() if value is not None}
    config = TrainConfig(**{**(FAST if options.fast else {}), **chosen}).resolved()
    folder = options.out or Path("runs") / f"{config.data}-{config.method}-eps{config.eps:.4g}-seed{config.seed}"
    with process_group(torch.device(given["device"]), options.timeout) as first:
        result = train(config, folder, resume=options.resume, overwrite=options.overwrite, timeout=options.timeout)
    if not first:
        return 0
    for name, numbers in result["accuracy"].items():
        print(f"{name:12s} {numbers['accuracy']:7.2%}  of {numbers['samples']} test images")
    if result["collapsed"]:
        print(f"collapsed    first in epoch {result['collapsed_in_epoch']}")
    print(f"picture      {folder / PICTURE}")
    return 0


def _eval(options: argparse.Namespace) -> int:
    from elle_fast.recipes.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(
        options.checkpoint,
        options.attacks,
        eps=options.eps,
        root=options.root,
        samples=options.samples,
        batch_size=options.batch_size,
        seed=options.seed,
        device=device(options.device),
        masking_check=options.masking_check,
        json=options.json,
    )
    for name, numbers in result["accuracy"].items():
        print(f"{name:12s} {numbers['accuracy']:7.2%}  of {numbers['samples']} test images")
        for note, times in numbers.get("notes", {}).items():
            print(f"{name} says, {times} times: {note}", file=sys.stderr)
    worst = result["worst_case"]
    if len(worst["attacks"]) > 1:
        print(f"{'worst case':12s} {worst['accuracy']:7.2%}  withstand each of these attacks")
    if "masking" in result:
        print(_masking_line(result["masking"]))
    return 0


def _masking_line(found: dict[str, Any]) -> str:
    rows = {found["white_box"]["attack"]: found["white_box"], **found["attacks"]}
    numbers = ", ".join(f"{name} {row['accuracy']:.2%}" for name, row in rows.items())
    beaten = ", ".join(name for name, row in found["attacks"].items() if row["suspicious"])
    verdict = f"suspicious: {found['white_box']['attack']} is beaten by {beaten}" if beaten else found["verdict"]
    verdict += ": too few samples" * (verdict == "undecided")
    return f"{'gradients':12s} {verdict} ({numbers} of {found['samples']})"


def _methods(options: argparse.Namespace) -> int:
    from elle_fast.methods import METHODS

    print("A step on a batch: F forward passes, G input gradients, B backward passes to the weights, D: with double")
    print(
        "backpropagation. A unit is a forward pass, a data gradient or a weight gradient. lam: the default for CIFAR-10"
    )
    print("at eps 8/255. Sources are arXiv numbers.\n")
    width = max(map(len, METHODS))
    print(f"{'method':{width}s}  units  {'a step':10s}  {'lam':>6s}  {'source':12s}  what it is")
    for name, row in METHODS.items():
        lam = "-" if row.weight is None else f"{row.weight('cifar10', 'preactresnet18', 8 / 255):g}"
        print(f"{name:{width}s}  {row.units:5g}  {row.passes:10s}  {lam:>6s}  {row.source:12s}  {row.about}")
    return 0


def _info(options: argparse.Namespace) -> int:
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


def device(name: str | None) -> str:
    """The name, or that of the fastest device here; a ValueError if torch cannot use it."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device: expected one that torch can use here, got {name!r}: {error}") from error
    return name


def _seconds(text: str) -> float:
    value = fraction(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """``8/255`` or ``0.1``."""
    numerator, _, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number or a fraction such as 8/255, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
