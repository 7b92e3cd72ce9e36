"""ELLE-A in the Trainer of Hugging Face, on images: ``python examples/huggingface.py``, some seconds on a CPU.

Needs ``pip install 'elle-fast[transformers,recipes]'``. The digits are scikit-learn's; nothing is downloaded. A text
classifier trains alike: a dataset with ``input_ids``, ``attention_mask`` and ``labels``, an eps in the units of its
embeddings, and no ``bounds``.
"""

import tempfile

import torch
import transformers

from elle_fast import ELLELoss, attacks, data
from elle_fast.integrations.transformers import ELLETrainer

EPS = 0.15


def main() -> dict[str, float]:
    """Train, and return the accuracies."""
    transformers.set_seed(0)
    digits = data.load("digits")
    pixels = digits.train.images.float() / 255
    train = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, digits.train.labels, strict=True)]
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder,
            num_train_epochs=10,
            per_device_train_batch_size=64,
            learning_rate=5e-3,
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            disable_tqdm=True,
        )
        # With an image processor that normalizes: ELLELoss(..., mean=processor.image_mean, std=processor.image_std)
        # and ELLETrainer(..., normalized=True).
        criterion = ELLELoss(EPS, lam=100.0, adaptive=True, bounds=(0, 1))
        trainer = ELLETrainer(model, args, criterion=criterion, train_dataset=train)
        trainer.train()
    model.eval()

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(x).logits
        return logits

    x, y = (digits.test.images.float() / 255).to(model.device), digits.test.labels.to(model.device)
    x_adv = attacks.pgd(logits_of, x, y, EPS, steps=10)
    with torch.no_grad():
        clean, robust = ((logits_of(points).argmax(dim=1) == y).float().mean().item() for points in (x, x_adv))
    print(f"accuracy {clean:.1%}, under PGD-10 {robust:.1%}, lam {criterion.stats['lam'].item():.3g}")
    return {"clean": clean, "robust": robust}


if __name__ == "__main__":
    main()
