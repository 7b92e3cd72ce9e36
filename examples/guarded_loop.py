"""FGSM training that collapses, and the same loop with a guard: ``python examples/guarded_loop.py``.

Half a minute on a CPU. Needs ``pip install 'elle-fast[recipes]'``. The digits are scikit-learn's; nothing is
downloaded. At eps 0.25 the network learns to be right at FGSM's points and loses what it withstood under PGD.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import CollapseGuard, attacks, data
from elle_fast.guard import Alarm

EPS, EPOCHS, HELD_OUT = 0.25, 60, 180


def say(alarm: Alarm) -> None:
    """What the guard noticed and did."""
    went = "as they were" if alarm.back_to is None else f"those of step {alarm.back_to}"
    seen = f"{alarm.signal} {alarm.value:.2f}, less than {alarm.limit:.2f}" if alarm.signal == "probe" else alarm.signal
    print(f"  step {alarm.step}: {seen}; the weights are {went}, and E_lin is in the loss from now on")


def train(guarded: bool) -> tuple[dict[str, float], list[Alarm]]:
    """The accuracies on the test images, and the alarms."""
    torch.manual_seed(0)
    digits = data.load("digits")
    (x, y), (x_test, y_test) = ((split.images.float() / 255, split.labels) for split in (digits.train, digits.test))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    held_out = x[:HELD_OUT], y[:HELD_OUT]  # not trained on
    guard = CollapseGuard(
        model, optimizer, eps=EPS, held_out=held_out, probe_every=10, margin=40, snapshot_every=20,
        lam=100.0, rescue_steps=10_000, on_alarm=say,
    )  # fmt: skip
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x) - HELD_OUT).split(64)[:-1]:
            xs, ys = x[HELD_OUT + batch], y[HELD_OUT + batch]
            loss = F.cross_entropy(model(attacks.fgsm(model, xs, ys, EPS, bounds=(0, 1))), ys)
            if guarded:
                loss = loss + guard.penalty(xs, ys)  # 0 but after an alarm
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if guarded:
                guard.step(xs, ys)
    model.eval()
    return _accuracies(model, x_test, y_test), guard.alarms


def _accuracies(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    points = {
        "clean": x,
        "fgsm": attacks.fgsm(model, x, y, EPS, bounds=(0, 1)),
        "robust": attacks.pgd(model, x, y, EPS, steps=20, generator=generator),
    }
    with torch.no_grad():
        return {name: (model(each).argmax(1) == y).float().mean().item() for name, each in points.items()}


def main() -> dict[str, float]:
    """Train without and with a guard, print both, and return the accuracies with it."""
    alone, _ = train(guarded=False)
    print(_line("without a guard", alone))
    rescued, alarms = train(guarded=True)
    print(_line("with a guard", rescued))
    return {**rescued, "alone": alone["robust"], "alarms": len(alarms)}


def _line(name: str, found: dict[str, float]) -> str:
    return f"{name}: accuracy {found['clean']:.1%}, under FGSM {found['fgsm']:.1%}, under PGD-20 {found['robust']:.1%}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are small
    main()
