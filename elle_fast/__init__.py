"""elle_fast: ELLE and ELLE-A, a regulariser against catastrophic overfitting in single-step adversarial training.

The paper is Abad Rocamora et al., "Efficient local linearity regularization to overcome catastrophic overfitting",
ICLR 2024, arXiv 2401.11618.
"""

from elle_fast import attacks, functional
from elle_fast.adaptive import AdaptiveLambda
from elle_fast.auto import AutoLambda
from elle_fast.guard import CollapseGuard
from elle_fast.linearity import LocalLinearity
from elle_fast.loss import ELLELoss
from elle_fast.step.capture import capture
from elle_fast.step.step import TrainingStep

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
]
__version__ = "0.1.0"
