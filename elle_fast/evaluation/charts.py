"""Pictures of a report, in its file: PNG as data URIs, and curves as SVG in the colours of the page."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


def png(image: Tensor) -> bytes:
    """A PNG file of floating ``[1 or 3, H, W]`` in [0, 1], rounded to bytes."""
    channels, height, width = image.shape
    rows = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).reshape(height, width * channels)
    filtered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)  # a byte before each row: no filter
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(filtered.numpy().tobytes(), 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def is_picture(x: Tensor) -> bool:
    """Whether a sample can be shown: ``[1 or 3, H, W]``."""
    return x.dim() == 3 and x.shape[0] in (1, 3)


def figure(image: Tensor, description: str) -> str:
    """An ``<img>`` with the picture in it; small ones keep their pixels."""
    data = base64.b64encode(png(image)).decode()
    size = f'width="{image.shape[2]}" height="{image.shape[1]}"'
    sharp = ' class="pixels"' if max(image.shape[1:]) < 96 else ""
    return f'<img{sharp} {size} alt="{escape(description)}" src="data:image/png;base64,{data}">'


@dataclass(frozen=True)
class Axes:
    """The frame of a chart in the colours of the page: from 0 to ``most`` across, from ``low`` to ``high`` upwards.

    With ``log`` the logarithm is what goes upwards, and ``low`` is above 0.
    """

    most: float
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    def across(self, value: float) -> float:
        """Where a value is from the left."""
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * value / self.most, 1)

    def down(self, value: float) -> float:
        """Where a value is from the top."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

    def drawn(self, levels: Iterable[tuple[float, str]], unit: str) -> list[str]:
        """Lines at ``levels`` with their texts, ticks across, and below them ``unit``, what is across."""
        parts, bottom = [], HEIGHT - _BOTTOM
        for level, text in levels:
            y = self.down(level)
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{y + 4}" text-anchor="end">{escape(text)}</text>')
        for tick in ticks(self.most):
            x = self.across(tick)
            parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        middle = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(unit)}</text>')
        return parts


PERCENT = [(level / 100, str(level)) for level in (0, 25, 50, 75, 100)]


def svg(parts: Iterable[str], description: str) -> str:
    """An ``<svg>`` of the size of a chart."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def curve(points: Sequence[tuple[float, float]], samples: int, marked: float | None, unit: str) -> str:
    """Accuracy in [0, 1] against radii, as an ``<svg>`` with the points' 95 % intervals.

    Args:
        points: (radius in units of the axis, accuracy), at least one.
        samples: of each accuracy.
        marked: a radius to mark, in the same units.
        unit: what the radii are, for the axis.
    """
    from elle_fast.evaluation.predictions import interval

    points = sorted(points)
    axes = Axes(max(points[-1][0], marked or 0.0) or 1.0)
    across, down = axes.across, axes.down
    parts = axes.drawn(PERCENT, unit)
    if marked is not None:
        x = across(marked)
        parts.append(f'<line class="marked" x1="{x}" x2="{x}" y1="{_TOP}" y2="{down(0)}"/>')
        near = x > WIDTH - 90
        anchor, at = ("end", x - 5) if near else ("start", x + 5)
        parts.append(f'<text class="marked" x="{at}" y="{_TOP + 11}" text-anchor="{anchor}">eps {marked:.4g}</text>')
    ends = [interval(round(accuracy * samples), samples) for _, accuracy in points]
    upper = [f"{across(radius)},{down(high)}" for (radius, _), (_, high) in zip(points, ends, strict=True)]
    lower = [f"{across(radius)},{down(low)}" for (radius, _), (low, _) in zip(points, ends, strict=True)]
    parts.append(f'<polygon class="band" points="{" ".join([*upper, *reversed(lower)])}"/>')
    line = " ".join(f"{across(radius)},{down(accuracy)}" for radius, accuracy in points)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for (radius, accuracy), (low, high) in zip(points, ends, strict=True):
        said = f"{unit.split(',')[0]} {radius:.4g}: {accuracy:.1%} ({low:.1%} to {high:.1%})"
        spot = f'<circle class="spot" cx="{across(radius)}" cy="{down(accuracy)}" r="3.5"><title>{escape(said)}</title>'
        parts.append(f"{spot}</circle>")
    return svg(parts, "Accuracy in per cent against the radius")


def ticks(most: float) -> list[float]:
    """About five round numbers from 0 to ``most``."""
    scale = 10 ** math.floor(math.log10(most / 6))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if most / (scale * factor) <= 6)
    return [float(f"{step * count:.6g}") for count in range(int(most / step + 1e-9) + 1)]
