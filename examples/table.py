"""ELLE-A on a table of measurements: ``python examples/table.py``, some seconds on a CPU.

Needs ``pip install 'elle-fast[recipes]'``. The table is scikit-learn's; nothing is downloaded. FGSM training
overfits to its own points here. docs/guides/tables-and-tokens.md has the results of several seeds.
"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from elle_fast import ELLELoss, attacks

EPS, EPOCHS = 0.5, 100  # eps in standard deviations of a column, as the columns are standardised


def fgsm_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Plain FGSM training. Measurements have no common range: ``bounds=None`` clamps nothing."""
    return nn.functional.cross_entropy(model(attacks.fgsm(model, x, y, EPS, bounds=None)), y)


def train(criterion: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> dict[str, float]:
    """Train, and return the accuracies on the test rows."""
    torch.manual_seed(0)
    table = load_breast_cancer()  # 569 rows, 30 columns, two classes
    rows, test_rows, y, y_test = train_test_split(
        table.data, torch.tensor(table.target), test_size=0.25, stratify=table.target, random_state=0
    )
    scaler = StandardScaler().fit(rows)  # of the training rows alone
    x, x_test = (torch.tensor(scaler.transform(each), dtype=torch.float32) for each in (rows, test_rows))
    model = nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            criterion(model, x[batch], y[batch]).backward()
            optimizer.step()
    model.eval()
    points = {
        "clean": x_test,
        "fgsm": attacks.fgsm(model, x_test, y_test, EPS, bounds=None),
        "robust": attacks.pgd(model, x_test, y_test, EPS, steps=50, restarts=2, bounds=None),
    }
    with torch.no_grad():
        return {name: (model(each).argmax(dim=1) == y_test).float().mean().item() for name, each in points.items()}


def main() -> dict[str, float]:
    """Train with FGSM and with ELLE-A, print both, and return the accuracies with ELLE-A."""
    alone, found = train(fgsm_loss), train(ELLELoss(EPS, adaptive=True))
    for name, each in (("FGSM", alone), ("ELLE-A", found)):
        print(f"{name}: accuracy {each['clean']:.1%}, under FGSM {each['fgsm']:.1%}, under PGD-50 {each['robust']:.1%}")
    return {**found, "alone": alone["robust"]}


if __name__ == "__main__":
    main()
