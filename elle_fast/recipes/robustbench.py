"""A submission to RobustBench: weights, the entry that builds the model, its card as JSON, and the issue's text.

A submission is an issue with a model that takes pixels in [0, 1]. Fields of the card: those of the files in
``model_info/`` of RobustBench's repository; percentages are text.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from torch import nn

from elle_fast._core.files import write_atomically, write_json
from elle_fast.recipes import foreign, models
from elle_fast.recipes.checked import number_text
from elle_fast.recipes.trained import Trained

WEIGHTS, ENTRY, CARD, ISSUE = "model.safetensors", "model.py", "model_info.json", "issue.md"
_DATA = {"cifar10": "cifar10", "cifar100": "cifar100", "imagenet": "imagenet"}
_NORMS = {"linf": "Linf", "l2": "L2"}
_ASK = ""  # of a field that only its author can fill in

_SOURCE = '''"""{title}: the entry of a submission to RobustBench.

It needs `pip install 'elle-fast[recipes,export]'`{more}.
"""

from pathlib import Path

import torch
import elle_fast


def build() -> torch.nn.Module:
    """The model in eval mode: x [B, {shape}] with pixels in [0, 1] -> logits [B, {classes}]."""
    return elle_fast.load(Path(__file__).with_name("{weights}"){options})
'''

_TEXT = """\
# Paper Information

- **Paper Title**:
- **Paper URL**:
- **Paper authors**:

# Leaderboard Claim(s)

## Model 1

- **Architecture**: {architecture}
- **Dataset**: {dataset}{no_board}
- **Threat Model**: {threat}
- **eps**: {eps}
- **Clean accuracy**: {clean}
- **Robust accuracy**: {robust}
- **Additional data**: {additional}
- **Evaluation method**: {method}
- **Checkpoint and code**: `{weights}` and `{entry}`, whose `build()` returns the module; it takes pixels in [0, 1]

# Model Zoo:

- [ ] to be added to the Model Zoo
- [ ] with an architecture that the Model Zoo does not have
- [ ] under the MIT license, or under this one:
"""


def write(trained: Trained, folder: Path) -> None:
    """Write entry, card and issue beside the weights."""
    card = card_of(trained)
    write_json(folder / CARD, card)
    shape, name = trained.saved["shape"], trained.config.model
    entry = _SOURCE.format(
        title=f"{name} trained with {trained.config.method}".replace('"', "'").replace("\\", "/"),
        more=f" and {name.partition(':')[0].partition('.')[0]}" if ":" in name else "",
        shape=", ".join(map(str, shape["in_shape"])),
        classes=shape["classes"],
        weights=WEIGHTS,
        options=f", model={name!r}" if ":" in name else "",
    )
    attack, strongest = _strongest(trained)
    at_our_eps = f"{attack} of elle-fast eval" if attack else "(none yet: elle-fast eval --attacks clean,autoattack)"
    text = _TEXT.format(
        architecture=card["architecture"],
        dataset=card["dataset"],
        no_board="" if trained.config.data in _DATA else " (RobustBench has no leaderboard of it)",
        threat=_NORMS[_attacked(trained)[1]],
        eps=card["eps"],
        clean=_measured((trained.accuracy or {}).get("clean")),
        robust=_measured(strongest),
        additional={None: "(to be filled in: the first weights may be of other data)", False: "false"}[
            card["additional_data"]
        ],
        method=at_our_eps,
        weights=WEIGHTS,
        entry=ENTRY,
    )
    for file_name, content in ((ENTRY, entry), (ISSUE, text)):
        write_atomically(folder / file_name, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]


def card_of(trained: Trained) -> dict[str, Any]:
    """The model card. What only the authors know is empty text; what was not measured on all test images is null."""
    eps, _ = _attacked(trained)
    config, measured = trained.config, trained.accuracy or {}
    own_code = config.model not in models.NAMES and not foreign.from_library(config.model)  # it may load any weights
    began = getattr(config, "weights", None) or getattr(config, "pretrained", False) or own_code
    clean, autoattack = (_text(trained, measured.get(attack)) for attack in ("clean", "autoattack"))
    return {
        "link": _ASK,
        "name": _ASK,
        "authors": _ASK,
        "additional_data": None if began else False,
        "number_forward_passes": 1,
        "dataset": _DATA.get(trained.config.data, trained.config.data),
        "venue": _ASK,
        "architecture": trained.config.model,
        "eps": number_text(eps),
        "clean_acc": clean,
        "reported": autoattack,
        "autoattack_acc": autoattack,
        "unreliable": False,
    }


def is_entry(folder: Path) -> bool:
    """Whether a folder holds what :func:`write` leaves, and nothing else."""
    return {path.name for path in folder.iterdir()} <= {WEIGHTS, ENTRY, CARD, ISSUE, "__pycache__"}


def build(folder: Path) -> nn.Module:
    """The model that the folder's entry builds, as RobustBench would."""
    model: nn.Module = runpy.run_path(str(folder / ENTRY))["build"]()
    return model


def _attacked(trained: Trained) -> tuple[float, str]:
    return trained.attacked_at or (trained.config.eps, trained.config.norm)


def _strongest(trained: Trained) -> tuple[str | None, dict[str, Any] | None]:
    """The attack that counts: AutoAttack, else the one that the fewest images withstand."""
    found = {name: row for name, row in (trained.accuracy or {}).items() if name != "clean"}
    if not found:
        return None, None
    name = "autoattack" if "autoattack" in found else min(reversed(found), key=lambda each: found[each]["accuracy"])
    return name, found[name]


def _text(trained: Trained, row: dict[str, Any] | None) -> str | None:
    """Of an accuracy on the whole test set; that of a part of it is no claim for a leaderboard."""
    if row is None or trained.test_images is None or row.get("samples") != trained.test_images:
        return None
    return f"{100 * row['accuracy']:.2f}"


def _measured(row: dict[str, Any] | None) -> str:
    if row is None:
        return "(not measured)"
    return f"{100 * row['accuracy']:.2f}% on {row['samples']:,} test images"
