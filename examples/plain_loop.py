"""A clean PyTorch loop made robust by its criterion: ``python examples/plain_loop.py``, some seconds on a CPU.

Needs ``pip install 'elle-fast[recipes]'``. The digits are scikit-learn's; nothing is downloaded.
docs/start/plain-loop.md explains each step.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import ELLELoss, attacks, data

EPS = 0.15


def clean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What the loop minimised so far."""
    return nn.functional.cross_entropy(model(x), y)


def train(criterion: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Train, and return the accuracies on the test images."""
    torch.manual_seed(0)
    digits = data.load("digits")
    train_set, test = (TensorDataset(part.images.float() / 255, part.labels) for part in (digits.train, digits.test))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loader = DataLoader(train_set, 64, shuffle=True)
    for _ in range(6):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model, x, y)  # the only line that ELLE changes
            loss.backward()
            optimizer.step()
    model.eval()
    x, y = test.tensors
    x_adv = attacks.pgd(model, x, y, EPS, steps=20)
    with torch.no_grad():
        clean, robust = ((model(points).argmax(dim=1) == y).float().mean().item() for points in (x, x_adv))
    return {"clean": clean, "robust": robust}


def main() -> dict[str, float]:
    """Train with the cross-entropy and with ELLE-A, print both, and return the accuracies with ELLE-A."""
    alone = train(clean_loss)
    print(f"cross-entropy: accuracy {alone['clean']:.1%}, under PGD-20 {alone['robust']:.1%}")
    criterion = ELLELoss(EPS, lam=100.0, adaptive=True, attack="n-fgsm", bounds=(0, 1))
    found = train(criterion)
    lam = criterion.stats["lam"].item()
    print(f"ELLE-A: accuracy {found['clean']:.1%}, under PGD-20 {found['robust']:.1%}, lam {lam:.3g}")
    return {**found, "alone": alone["robust"]}


if __name__ == "__main__":
    main()
