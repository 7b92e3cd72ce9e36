"""The ELLE authors' CIFAR trainer of ELLE-A, restated in plain torch: what people run today.

Restated from the facts of its public code (PAPER sections 6 and 9), to the letter where it costs time or memory:

- the attack goes backward to the weights as well and keeps its graph; x_adv stays attached to the x that the attack
  moved, so the loss' backward pass computes an input gradient too;
- x_adv and the triplet take a forward pass each, and the clean x takes a further one, for the log, with a graph;
- lam is that of the step before; mean and standard deviation of every E_lin so far are computed twice in a step;
- two optimiser steps on each gradient, the rate moved between them; float32, contiguous images;
- pictures are cropped and flipped one by one, by Pillow, in torch's DataLoader.

Left out, in their favour: the progress bar, the data frame that grows by a row in each step, tables of times, the
checkpoint after each epoch, noise that is drawn in each step though its size is 0, and nn.DataParallel. A benchmark's
list of E_lin is short, while that of a whole training makes each step a little longer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from elle_fast.data import Split


class AuthorsList:
    """lam as their code keeps it: a Python list of every E_lin so far (PAPER section 6, items 2 and 5)."""

    def __init__(self, lam_max: float, length: int = 0) -> None:
        self.lam_max, self.lam = lam_max, 0.0
        self.history = [1.0] * length
        self.logged = (0.0, 0.0)

    def update(self, e_lin: Tensor) -> None:
        """lam for the next step. Mean and standard deviation of the whole list are computed twice."""
        value = e_lin.item()
        detected = len(self.history) > 2 and value > np.mean(self.history) + 2 * np.std(self.history)
        self.lam = self.lam_max if detected else 0.99 * self.lam
        self.history.append(value)
        self.logged = (float(np.mean(self.history)), float(np.std(self.history)))


class AuthorsLoss:
    """Their loss of a batch as a criterion ``(model, x, target) -> loss``; ``rule.update(e_lin)`` ends the step.

    ``numbers`` are those of the last step that they have on the host: loss, accuracy on the clean x and on x_adv.
    """

    def __init__(self, eps: float, rule: AuthorsList) -> None:
        self.eps, self.rule = eps, rule
        self.numbers: dict[str, float] = {}

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The loss, with lam of the step before."""
        x_adv = copy.deepcopy(x)
        x_adv.requires_grad = True
        outputs = model(x_adv)
        with torch.autocast(x.device.type, enabled=False):  # a backward pass runs outside of it
            F.cross_entropy(outputs, y).backward(retain_graph=True)
        assert x_adv.grad is not None
        x_adv = x_adv + self.eps * torch.sign(copy.deepcopy(x_adv.grad))
        model.zero_grad()

        at_adv = model(x_adv)
        loss = F.cross_entropy(at_adv, y)
        batch = len(x)
        x_ab = torch.cat((x, x))
        x_ab = x_ab + self.eps * (2 * torch.rand_like(x_ab) - 1)
        alpha = torch.rand(batch, 1, 1, 1, dtype=x.dtype, device=x.device)
        x_c = (1 - alpha) * x_ab[:batch] + alpha * x_ab[batch:]
        alpha = alpha.flatten()
        losses = F.cross_entropy(model(torch.cat((x_ab, x_c))), y.repeat(3), reduction="none")
        a, b, c = losses.chunk(3)
        e_lin = F.mse_loss(c, (1 - alpha) * a + alpha * b)
        loss = loss + self.rule.lam * e_lin
        self.e_lin = e_lin.detach()
        self.numbers = {"loss": loss.item()}
        clean = model(x).detach()
        for name, logits in (("clean_acc", clean), ("adversarial_acc", at_adv.detach())):
            right = torch.softmax(logits, dim=1).argmax(dim=1) == y
            self.numbers[name] = (right.sum().float() / float(batch)).item()
        return loss


class AuthorsStep:
    """Their step on a batch: ``step(x, target) -> loss``, detached.

    Args:
        model, optimizer: SGD in theirs.
        scheduler: of the rate, moved between the two optimiser steps; ``None``: none.
        eps, lam: radius and lam_max.
        autocast: a dtype that their code does not have, around the forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        eps: float,
        lam: float,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.autocast = model, optimizer, scheduler, autocast
        self.loss = AuthorsLoss(eps, AuthorsList(lam))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Take the step; the host waits for the device four times."""
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.loss(self.model, x, y)
        loss.backward()
        self.loss.rule.update(self.loss.e_lin)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.step()
        return loss.detach()


class Pictures(Dataset[tuple[Tensor, int]]):
    """Labelled pictures one by one: as torchvision's, with its crop (4 pixels of padding), flip and conversion."""

    def __init__(self, split: Split, *, augment: bool) -> None:
        self.images = split.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        self.labels, self.augment = split.labels.tolist(), augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = Image.fromarray(self.images[index])
        if self.augment:
            width, height = picture.size
            picture = ImageOps.expand(picture, border=4, fill=0)
            left, top = (int(torch.randint(9, (1,))) for _ in range(2))
            picture = picture.crop((left, top, left + width, top + height))
            if torch.rand(1) < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return values.to(torch.float32).div(255), self.labels[index]


def loader(split: Split, batch_size: int, *, workers: int, augment: bool = True) -> DataLoader[tuple[Tensor, int]]:
    """An epoch's batches in random order, the last of which may be smaller."""
    pictures = Pictures(split, augment=augment)
    pinned = torch.cuda.is_available()
    return DataLoader(
        pictures, batch_size, shuffle=True, num_workers=workers, pin_memory=pinned, persistent_workers=workers > 0
    )


class AuthorsTrainer:
    """A training of theirs, epoch by epoch.

    Args:
        model: on its device.
        split: the training images.
        eps, lam: radius and lam_max.
        epochs: of the whole training, over which the rate rises to ``rate`` and falls to 0.
        batch_size, rate: theirs are 128 and 0.2.
        workers: processes of the DataLoader; theirs is 4.
    """

    def __init__(
        self,
        model: nn.Module,
        split: Split,
        *,
        eps: float,
        lam: float,
        epochs: int,
        batch_size: int = 128,
        rate: float = 0.2,
        workers: int = 4,
    ) -> None:
        self.model = model
        self.loader = loader(split, batch_size, workers=workers)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        half: Any = epochs * len(self.loader) / 2  # theirs is no integer either
        self.scheduler = torch.optim.lr_scheduler.CyclicLR(
            self.optimizer, base_lr=0, max_lr=rate, step_size_up=half, step_size_down=half
        )
        self.step = AuthorsStep(model, self.optimizer, eps=eps, lam=lam, scheduler=self.scheduler)

    def epoch(self) -> dict[str, float]:
        """Train for one epoch, and return the means of the steps' numbers."""
        self.model.train()
        rows = [self._numbers(x, y) for x, y in self._batches()]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.loader:
            yield x.to(self.device), y.to(self.device)

    def _numbers(self, x: Tensor, y: Tensor) -> dict[str, float]:
        self.step(x, y)
        return {**self.step.loss.numbers, "lin_err": self.step.loss.rule.history[-1]}
