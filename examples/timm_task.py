"""ELLE-A as a training task of timm, with mixup, an average of the weights, and its normalizing loader.

``python examples/timm_task.py``, some seconds on a CPU. Needs ``pip install 'elle-fast[timm,recipes]'``. The digits
are scikit-learn's; nothing is downloaded.
"""

import timm
import torch
from timm.data.loader import PrefetchLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import ELLELoss, attacks, data
from elle_fast.integrations.timm import ELLETask

EPS, MEAN, STD = 0.15, (0.3,), (0.38,)


class Normalized(nn.Module):
    """Pixels in, logits out: what an attack in an evaluation needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of pixels."""
        logits: torch.Tensor = self.model((x - MEAN[0]) / STD[0])
        return logits


def main() -> dict[str, float]:
    """Train, and return the accuracies of the averaged weights."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = data.load("digits")
    # timm's loader takes bytes, and hands out floats that are normalized.
    train = DataLoader(TensorDataset(digits.train.images, digits.train.labels), 64, shuffle=True, drop_last=True)
    loader = PrefetchLoader(train, MEAN, STD, channels=1, device=device)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).to(device)
    criterion = ELLELoss(EPS, lam=100.0, adaptive=True, mean=MEAN, std=STD, bounds=(0, 1))
    task = ELLETask(model, criterion, normalized=True, device=device)
    task.setup_ema(decay=0.95)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(7):
        task.train()
        for x, y in loader:
            # Of probabilities too, as timm's Mixup makes them: here a plain mixup.
            share, order = 0.9, torch.randperm(len(y), device=device)
            target = nn.functional.one_hot(y, 10).float()
            mixed, soft = (share * whole + (1 - share) * whole[order] for whole in (x, target))
            task(mixed, soft)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
    average = Normalized(task.get_eval_model(ema=True).module).eval()
    x, y = (digits.test.images.float() / 255).to(device), digits.test.labels.to(device)
    x_adv = attacks.pgd(average, x, y, EPS, steps=10)
    with torch.no_grad():
        clean, robust = ((average(points).argmax(dim=1) == y).float().mean().item() for points in (x, x_adv))
    print(f"accuracy {clean:.1%}, under PGD-10 {robust:.1%}, lam {criterion.stats['lam'].item():.3g}")
    return {"clean": clean, "robust": robust}


if __name__ == "__main__":
    main()
