"""Points outside the ball or the image range are an error."""

import pytest
import torch

from elle_fast.evaluation import evaluate, parse_attacks, points
from elle_fast.evaluation.names import Ball
from tests.evaluation.cases import Threshold, needs_autoattack, needs_foolbox, pixels


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
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, ball, attack, generator: cheat(model, x, ball.eps))
    with pytest.raises(RuntimeError, match="attack 'fgsm': " + message):
        evaluate(model, pixels([102, 153]), "fgsm", eps=0.1)


@pytest.mark.parametrize("length, fits", [(1 + 2**-22, True), (1 + 1e-5, False), (3.0, False)])
def test_a_point_outside_the_l2_ball(length, fits, monkeypatch):
    """Each pixel within eps, and the image 3 eps away, is inside the linf ball alone."""

    def moved(model, x, y, ball, attack, generator):
        return x + length * ball.eps / 3

    monkeypatch.setitem(points.OWN, "fgsm", moved)
    batch = torch.full((2, 1, 3, 3), 0.5), torch.tensor([0, 1])
    model = torch.nn.Flatten()
    evaluate(model, [batch], "fgsm", eps=0.3)
    if fits:
        evaluate(model, [batch], "fgsm", eps=0.3, norm="l2")
        return
    message = r"attack 'fgsm': expected points within eps = 0.3 \(l2\) of the images, got one at 0\.[39]"
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, [batch], "fgsm", eps=0.3, norm="l2")


@needs_autoattack
@pytest.mark.parametrize("name", ["square-50", "autoattack"])
def test_images_too_small_for_square_in_l2(name):
    batch = torch.full((2, 1, 4, 9), 0.5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=rf"^attack '{name}': expected images of at least 5 pixels .*\[2, 1, 4, 9\]"):
        evaluate(torch.nn.Flatten(), [batch], name, eps=0.3, norm="l2")


def test_rounding_is_no_cheating(monkeypatch):
    monkeypatch.setitem(points.OWN, "fgsm", lambda model, x, y, ball, attack, generator: (x + ball.eps).clamp(0, 1))
    monkeypatch.setitem(points.OWN, "pgd", lambda model, x, y, ball, attack, generator: (x - ball.eps).clamp(0, 1))
    for eps in (0.0, 1 / 3, 8 / 255, 1e-3, 0.9):
        evaluate(Threshold(), pixels(range(256)), "fgsm,pgd-1", eps=eps)


@pytest.mark.parametrize("kind", ["pgd", pytest.param("foolbox-pgd", marks=needs_foolbox)])
def test_a_name_can_choose_the_step_of_pgd(kind):
    """From one start, one step of eps / 5 and one of eps / 4 are eps / 20 apart where neither leaves the ball."""
    eps, model = 0.1, Threshold().eval()
    ((x, y),) = pixels([90, 95, 100, 105] * 50)
    found = {}
    for name in (f"{kind}-1", f"{kind}-1-eps/5"):
        (attack,) = parse_attacks(name)
        found[name], _ = points.attack_points(model, x, y, Ball(eps, "linf"), attack, seed=3)
    usual, shorter = found.values()
    inside = (usual - x).abs() < eps * 0.999
    assert 50 < inside.sum() < 200
    assert (usual - shorter)[inside].tolist() == pytest.approx([eps / 20] * int(inside.sum()), rel=1e-4)
