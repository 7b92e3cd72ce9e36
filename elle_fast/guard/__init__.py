"""CollapseGuard: any single-step adversarial training, watched for catastrophic overfitting and taken back from it."""

from elle_fast.guard.alarm import ACTIONS, Alarm, CollapsedError
from elle_fast.guard.guard import CollapseGuard

__all__ = ["ACTIONS", "Alarm", "CollapseGuard", "CollapsedError"]
