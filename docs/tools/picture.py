"""``python -m docs.tools.picture`` draws the picture of README, light and dark, from the curves of a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

from elle_fast._core.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "benchmarks" / "results" / "cifar10-jpeg-levers.json"
EPS = 16 / 255
# The variants of the file, and what the picture calls them.
DRAWN = {"fgsm": "FGSM", "fast": "ELLE-A"}
FILES = {theme: ROOT / "docs" / "assets" / f"collapse-{theme}.svg" for theme in ("light", "dark")}

WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 92, 44, 46


class Colours(NamedTuple):
    """Of a theme; each line has at least 4.5 times the luminance of the background, or the other way round."""

    text: str
    soft: str
    grid: str
    back: str
    lines: tuple[str, ...]


COLOURS = {
    "light": Colours("#1c2126", "#57606a", "#dfe3e6", "#ffffff", ("#b34700", "#0b63a5")),
    "dark": Colours("#e6eaed", "#9aa6b0", "#39424b", "#14181c", ("#ff9d5c", "#66b3f2")),
}


def curves(content: Mapping[str, Any], eps: float, variants: Sequence[str]) -> dict[str, list[list[float]]]:
    """Accuracy under PGD-10 after each epoch, in [0, 1]: for each variant a list a seed.

    Raises:
        ValueError: if a variant has no run at ``eps``, or the runs have different lengths.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for run in content["runs"]:
        name = run.get("variant", run["method"])
        if name in found and abs(run["config"]["eps"] - eps) < 1e-9:
            found[name].append([row.get("val_pgd", row.get("test_pgd")) for row in run["epochs"]])
    lengths = {len(line) for lines in found.values() for line in lines}
    if not all(found.values()) or len(lengths) != 1:
        raise ValueError(f"expected runs of one length of {', '.join(variants)} at eps {eps:.4g}, got {found}")
    return found


def draw(lines: Mapping[str, Sequence[Sequence[float]]], colours: Colours, *, title: str) -> str:
    """An SVG: a line for each seed, and the name where they end on average."""
    epochs = len(next(iter(lines.values()))[0])
    most = max(max(line) for each in lines.values() for line in each)
    top = next(round(0.05 * count, 2) for count in range(1, 21) if 0.05 * count >= most)
    inner, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    soft, bold = colours.soft, 'font-size="16" font-weight="700"'

    def across(epoch: float) -> float:
        return round(LEFT + inner * (epoch - 1) / max(epochs - 1, 1), 1)

    def down(accuracy: float) -> float:
        return round(TOP + tall * (1 - accuracy / top), 1)

    said = f"{title}. At the end: " + "; ".join(
        f"{name} {100 * sum(line[-1] for line in each) / len(each):.1f} %, mean of {len(each)} seeds"
        for name, each in lines.items()
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}"'
        ' font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{colours.back}"/>',
        f'<text x="{LEFT - 42}" y="25" fill="{colours.text}" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    step = 0.05 if top <= 0.3 else 0.1 if top <= 0.6 else 0.2
    for count in range(int(top / step + 1e-9) + 1):
        y = down(count * step)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="{colours.grid}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 5}" text-anchor="end" fill="{soft}">{100 * count * step:.0f} %</text>'
        )
    for epoch in sorted({1, *range(max(epochs // 6, 1), epochs + 1, max(epochs // 6, 1)), epochs}):
        parts.append(
            f'<text x="{across(epoch)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="{soft}">{epoch}</text>'
        )
    parts.append(
        f'<text x="{LEFT + inner / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="{colours.soft}">epoch</text>'
    )
    for (name, each), colour in zip(lines.items(), colours.lines, strict=True):
        for line in each:
            points = " ".join(f"{across(place + 1)},{down(value)}" for place, value in enumerate(line))
            look = 'fill="none" stroke-width="2.2" stroke-linejoin="round" opacity="0.8"'
            parts.append(f'<polyline points="{points}" stroke="{colour}" {look}/>')
        y = min(down(sum(line[-1] for line in each) / len(each)) + 5, HEIGHT - BOTTOM - 2)
        parts.append(f'<text x="{WIDTH - RIGHT + 10}" y="{y}" fill="{colour}" {bold}>{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def pictures() -> dict[Path, str]:
    """What each file holds."""
    content = json.loads(SOURCE.read_text("utf-8"))
    found = curves(content, EPS, tuple(DRAWN))
    lines = {DRAWN[name]: each for name, each in found.items()}
    title = f"Accuracy under PGD-10, eps {255 * EPS:.0f}/255: {len(found['fgsm'])} seeds of each"
    return {path: draw(lines, COLOURS[theme], title=title) for theme, path in FILES.items()}


def write(pictures: Mapping[Path, str]) -> None:
    """Write each file."""
    for path, content in pictures.items():
        write_atomically(path, methodcaller("write", content.encode()))
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    write(pictures())
