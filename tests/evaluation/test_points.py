"""Points outside the ball or the image range are an error."""

import pytest
import torch

from elle_fast.evaluation import evaluate, points
from tests.evaluation.cases import Threshold, pixels


def just_outside(x, eps):
    """The first float32 numbers beyond what rounding explains."""
    return x + (eps + (0.5 + 3 * eps) * 2**-24 + 2**-24)


@pytest.mark.parametrize(
    "cheat, message",
    [
        (lambda model, x, eps: just_outside(x, eps), r"expected points within eps = 0.1 of the images, got one at 0.1"),
        (lambda model, x, eps: x - 1.5 * eps, r"expected points within eps = 0.1"),
        (lambda model, x, eps: (x - eps) * 0 - 2**-30, r"expected pixels in \[0.0, 1.0\], got some from -9.3"),
        (lambda model, x, eps: x * 0 + 1 + 2**-23, r"expected pixels in \[0.0, 1.0\], got some from 1.0"),
        (lambda model, x, eps: x * torch.nan, r"expected pixels in"),
        (
            lambda model, x, eps: x[:1],
            r"expected points torch.float32 \[2, 1, 1, 1\], got torch.float32 \[1, 1, 1, 1\]",
        ),
        (lambda model, x, eps: x.double(), r"expected points torch.float32 .*, got torch.float64"),
        (lambda model, x, eps: model.train() and x, r"expected a model in eval mode after it"),
    ],
)
def test_an_attack_that_cheats_is_an_error_not_a_number(cheat, message, model, monkeypatch):
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, eps, attack, generator: cheat(model, x, eps))
    with pytest.raises(RuntimeError, match="attack 'fgsm': " + message):
        evaluate(model, pixels([102, 153]), "fgsm", eps=0.1)


def test_rounding_is_no_cheating(monkeypatch):
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, eps, attack, generator: (x + eps).clamp(0, 1))
    monkeypatch.setitem(points.OWN, "pgd", lambda model, x, y, eps, attack, generator: (x - eps).clamp(0, 1))
    for eps in (0.0, 1 / 3, 8 / 255, 1e-3, 0.9):
        evaluate(Threshold(), pixels(range(256)), "fgsm,pgd-1", eps=eps)
