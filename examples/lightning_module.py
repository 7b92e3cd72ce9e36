"""ELLE-A in a Lightning Trainer, validated under PGD: ``python examples/lightning_module.py``, some seconds on a CPU.

Needs ``pip install 'elle-fast[lightning,recipes]'``. The digits are scikit-learn's; nothing is downloaded.
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast import ELLELoss, data
from elle_fast.integrations.lightning import ELLEModule, RobustValidation

EPS = 0.15


def main() -> dict[str, float]:
    """Train, and return what the last validation found."""
    lightning.seed_everything(0, verbose=False)
    digits = data.load("digits")
    train, test = (TensorDataset(split.images.float() / 255, split.labels) for split in (digits.train, digits.test))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 10),
    )  # fmt: skip
    module = ELLEModule(
        model,
        ELLELoss(EPS, lam=100.0, adaptive=True, bounds=(0, 1)),
        lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    )
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RobustValidation(EPS, steps=10)],  # gradients are switched on for it, whatever the Trainer's mode
    )
    trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 128))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    found = main()
    print(f"accuracy {found['val_acc']:.1%}, under PGD-10 {found['val_pgd_acc']:.1%}, lam {found['train_lam']:.3g}")
