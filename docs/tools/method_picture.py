"""``python -m docs.tools.method_picture`` draws the points of ELLE and what E_lin measures, light and dark."""

from __future__ import annotations

import math
from pathlib import Path

from docs.tools.picture import COLOURS, ROOT, Colours, write

FILES = {theme: ROOT / "docs" / "assets" / f"method-{theme}.svg" for theme in COLOURS}
SAID = (
    "Left: the eps ball around x with x_adv in its corner, x_a and x_b at random, and x_c on the line between them. "
    "Right: the loss along that line; r is how far it is from the straight line at x_c."
)


def _text(x: float, y: float, said: str, colour: str, *, anchor: str = "middle", look: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" {look}>{said}</text>'


def _name(letter: str, index: str) -> str:
    return f'{letter}<tspan dy="5" font-size="12">{index}</tspan><tspan dy="-5">&#8203;</tspan>'


def _spot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{colour}"/>'


def draw(colours: Colours) -> str:
    """Both panels as an SVG."""
    attack, triplet = colours.lines
    left = [
        _text(150, 28, "four points of a sample", colours.text, look='font-weight="600"'),
        f'<rect x="50" y="50" width="200" height="200" fill="none" stroke="{colours.soft}" stroke-dasharray="5 4"/>',
        _text(150, 272, "the eps ball", colours.soft),
        f'<line x1="150" y1="150" x2="244" y2="56" stroke="{attack}" stroke-width="2.2"/>',
        _spot(150, 150, colours.text),
        _text(138, 146, "x", colours.text),
        _spot(250, 50, attack),
        _text(262, 56, _name("x", "adv"), attack, anchor="start"),
        f'<line x1="75" y1="228" x2="226" y2="166" stroke="{triplet}" stroke-width="2.2"/>',
        _spot(75, 228, triplet),
        _text(72, 216, _name("x", "a"), triplet),
        _spot(226, 166, triplet),
        _text(230, 190, _name("x", "b"), triplet),
        _spot(135.4, 203.2, triplet),
        _text(142, 228, _name("x", "c"), triplet, look='font-weight="700"'),
    ]
    begin, wide = 420.0, 280.0

    def across(part: float) -> float:
        return round(begin + wide * part, 1)

    def down(part: float) -> float:
        chord = 200 - 40 * part
        return round(chord - 92 * math.pow(abs(math.sin(math.pi * part)), 1.4), 1)

    steps = [place / 40 for place in range(41)]
    curve = " ".join(f"{across(part)},{down(part)}" for part in steps)
    alpha = 0.4
    at, on_chord = across(alpha), 200 - 40 * alpha
    right = [
        _text(560, 28, "the loss from one end to the other", colours.text, look='font-weight="600"'),
        f'<line x1="{begin - 20}" x2="{begin + wide + 20}" y1="250" y2="250" stroke="{colours.soft}"/>',
        f'<line x1="{across(0)}" y1="200" x2="{across(1)}" y2="160" stroke="{triplet}" stroke-dasharray="6 5"/>',
        f'<polyline points="{curve}" fill="none" stroke="{triplet}" stroke-width="2.6"/>',
        f'<line x1="{at}" x2="{at}" y1="{on_chord}" y2="{down(alpha)}" stroke="{attack}" stroke-width="3"/>',
        _text(at - 12, (on_chord + down(alpha)) / 2 + 6, "r", attack, look='font-weight="700" font-size="18"'),
        _spot(across(0), 200, triplet),
        _spot(across(1), 160, triplet),
        _spot(across(alpha), down(alpha), triplet),
        _text(across(0), 272, _name("x", "a"), triplet),
        _text(across(alpha), 272, _name("x", "c"), triplet),
        _text(across(1), 272, _name("x", "b"), triplet),
        _text(across(0.55), 58, "L(f(x))", colours.text, anchor="start"),
        _text(across(0.72), 196, "straight line", colours.soft, anchor="start"),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 290" role="img" aria-label="{SAID}"'
            ' font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" font-size="15">',
            f'<rect width="760" height="290" rx="8" fill="{colours.back}"/>',
            *left,
            *right,
            "</svg>",
            "",
        ]
    )


def pictures() -> dict[Path, str]:
    """What each file holds."""
    return {path: draw(COLOURS[theme]) for theme, path in FILES.items()}


if __name__ == "__main__":
    write(pictures())
