"""elle_fast: ELLE and ELLE-A, a regulariser against catastrophic overfitting in single-step adversarial training.

The paper is Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting",
ICLR 2024, arXiv 2401.11618.
"""

from typing import TYPE_CHECKING

from elle_fast import attacks, functional
from elle_fast._core.kept_memory import keep_freed_memory
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.auto import AutoLambda
from elle_fast.guard import CollapseGuard
from elle_fast.linearity import LocalLinearity
from elle_fast.loss import ELLELoss
from elle_fast.step.capture import capture
from elle_fast.step.step import TrainingStep

if TYPE_CHECKING:
    import os

    import torch

__all__ = [
    "AdaptiveLambda",
    "AutoLambda",
    "CollapseGuard",
    "ELLELoss",
    "LocalLinearity",
    "TrainingStep",
    "attacks",
    "capture",
    "functional",
    "keep_freed_memory",
    "load",
]
__version__ = "0.1.0"


def load(
    path: "str | os.PathLike[str]", *, device: "str | torch.device" = "cpu", model: "str | None" = None
) -> "torch.nn.Module":
    """A trained model in eval mode: float32 pixels [B, C, H, W] in [0, 1] -> logits [B, classes].

    The normalisation is inside::

        model = elle_fast.load("runs/cifar10")
        classes = model(pixels).argmax(dim=1)

    Args:
        path: a run's folder (the best weights if there are such, else the last), one of its checkpoints (``.pt``), or
            what ``elle-fast export`` wrote (``.safetensors``, ``.pt2``).
        device: where the module goes.
        model: the name of the network, where it is ``package.module:callable``; a file alone may name only code of the
            current folder, as one from somebody else could name any function.

    No pickle is loaded: a checkpoint is read with ``weights_only=True``. ``torch.export.load`` would unpickle and
    evaluate parts of a ``.pt2`` file, so a program with anything but plain tensors, ATen operators, simple names and
    sizes is refused before torch reads it. A ``.pt2`` program is fixed in eval mode; attacks on it work.

    Raises:
        FileNotFoundError: if nothing is there, or a folder holds no run.
        ValueError: for a file that is damaged or none of these, a run that has not finished an epoch, a network that
            is code of another folder and not named by ``model``, or a device that is not there.
        ImportError: naming the extra to install, if a library is missing.
        TypeError: for an argument of another type.
    """
    from elle_fast.recipes import loading

    return loading.load(path, device=device, model=model)
