"""ELLE-A in a loop of Accelerate with two accumulated batches a step: ``python examples/accelerate_loop.py``.

Or ``accelerate launch --num_processes 2 examples/accelerate_loop.py``. Needs ``pip install
'elle-fast[accelerate,recipes]'``. The digits are scikit-learn's; nothing is downloaded; some seconds on a CPU.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import ELLELoss, attacks, data
from elle_fast.integrations.accelerate import AcceleratedLoss

EPS = 0.15


def main() -> dict[str, float]:
    """Train, and return the accuracies."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    digits = data.load("digits")
    train = TensorDataset(digits.train.images.float() / 255, digits.train.labels)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(train, 32, shuffle=True))
    # Registers the criterion for save_state and load_state, too.
    criterion = AcceleratedLoss(accelerator, ELLELoss(EPS, lam=100.0, adaptive=True, bounds=(0, 1)))
    for _ in range(8):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model, x, y))  # which divides by the accumulated batches
                optimizer.step()
                optimizer.zero_grad()
    model.eval()
    x = (digits.test.images.float() / 255).to(accelerator.device)
    y = digits.test.labels.to(accelerator.device)
    x_adv = attacks.pgd(model, x, y, EPS, steps=10)
    with torch.no_grad():
        clean, robust = ((model(points).argmax(dim=1) == y).float().mean().item() for points in (x, x_adv))
    if accelerator.is_main_process:
        lam = criterion.criterion.stats["lam"].item()
        print(f"accuracy {clean:.1%}, under PGD-10 {robust:.1%}, lam {lam:.3g}")
    return {"clean": clean, "robust": robust}


if __name__ == "__main__":
    main()
