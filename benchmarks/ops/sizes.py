"""The calls of pack_points and elle_loss that benchmarks/gpu/gpu_report.py times, and the bytes that each has to move.

The cases of the targets come first, as a part may run out of time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

EPS = 8 / 255
# The first is compared with the others; the last two are the reference. cuda only if the extension has it.
BACKENDS = ("triton", "cuda", "eager", "compiled")
PACKED = 4  # points for each sample


@dataclass(frozen=True)
class PackCase:
    """A call of pack_points."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str = "fgsm"
    options: dict[str, Any] = field(default_factory=lambda: {"bounds": (0.0, 1.0)})
    channels_last: bool = False
    target: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        layout = " channels-last" if self.channels_last else ""
        return f"{'x'.join(map(str, self.shape))} {short(self.dtype)}{layout} {self.label}"

    @property
    def launch_bound(self) -> bool:
        """Whether the launches of a call take longer than its work."""
        return math.prod(self.shape) < 1 << 23

    @property
    def bytes(self) -> int:
        """Read x and its gradient, write the points."""
        out = self.options.get("dtype") or self.dtype
        return math.prod(self.shape) * (2 * self.dtype.itemsize + PACKED * out.itemsize)


@dataclass(frozen=True)
class LossCase:
    """A call of elle_loss on logits ``[rows, classes]``; lam is a number, or ELLE-A's."""

    rows: int
    classes: int
    dtype: torch.dtype = torch.float32
    adaptive: bool = False
    target: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        return f"[{self.rows}, {self.classes}] {short(self.dtype)}{' ELLE-A' if self.adaptive else ''}"

    @property
    def launch_bound(self) -> bool:
        """Whether the launches of a call take longer than its work."""
        return self.rows * self.classes < 1 << 23

    def bytes(self, what: str) -> int:
        """What has to be moved: the forward reads the logits, the backward writes their gradient as well."""
        accesses = {"forward": 1, "backward": 2, "both": 2}[what]
        return accesses * self.rows * self.classes * self.dtype.itemsize


def short(dtype: torch.dtype) -> str:
    return {F32: "fp32", BF16: "bf16"}[dtype]


F32, BF16 = torch.float32, torch.bfloat16
SMALL, MIDDLE, LARGE = (128, 3, 32, 32), (1024, 3, 32, 32), (256, 3, 224, 224)
CHANNELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PACK_CASES = (
    PackCase(LARGE, F32, target=True),
    PackCase(LARGE, BF16, target=True),
    PackCase(SMALL, F32, target=True),
    PackCase(SMALL, BF16, target=True),
    PackCase(LARGE, F32, "normalised to bf16", {"bounds": (0.0, 1.0), "dtype": BF16, **CHANNELS}),
    PackCase(LARGE, F32, "rs-fgsm", {"bounds": (0.0, 1.0), "start": 1.0, "step_size": 1.25 * EPS, "project": True}),
    PackCase(MIDDLE, F32, "l2", {"bounds": (0.0, 1.0), "norm": "l2"}),
    PackCase(MIDDLE, F32),
    PackCase(MIDDLE, BF16),
    PackCase(LARGE, F32, channels_last=True),
    PackCase(LARGE, BF16, channels_last=True),
    PackCase(SMALL, F32, channels_last=True),
    PackCase(SMALL, BF16, channels_last=True),
    PackCase(MIDDLE, F32, channels_last=True),
    PackCase(MIDDLE, BF16, channels_last=True),
)
LOSS_CASES = (
    LossCase(512, 10, target=True),
    LossCase(1024, 1000, target=True),
    LossCase(4096, 32000, BF16, target=True),
    LossCase(512, 10, adaptive=True),
    LossCase(4096, 32000),
    LossCase(2048, 10),  # B = 512
    LossCase(4096, 1000),  # B = 1024
    LossCase(512, 100),  # B = 128
    LossCase(1024, 1000, adaptive=True),
    LossCase(4096, 32000, BF16, adaptive=True),
    LossCase(2048, 10, adaptive=True),
    LossCase(4096, 1000, adaptive=True),
    LossCase(512, 100, adaptive=True),
    LossCase(4096, 32000, adaptive=True),
)


def dry_pack_cases() -> list[PackCase]:
    """Every kind of case, on sizes that the interpreter can do."""
    kinds = {(case.label, case.channels_last): case for case in PACK_CASES}
    kinds["fgsm", False] = PACK_CASES[0]  # a target's, which is compiled too
    return [replace(case, shape=(1, 3, 4, 4)) for case in kinds.values()]


def dry_loss_cases() -> list[LossCase]:
    """A case of each dtype, with a constant lam and ELLE-A's, on sizes that the interpreter can do."""
    kinds = {case.dtype: case for case in LOSS_CASES} | {F32: LOSS_CASES[0]}
    return [replace(case, rows=PACKED, classes=10) for case in kinds.values()]
