"""Training methods by name: ``methods.build("gradalign", eps=8/255)`` is a criterion ``(model, x, target) -> loss``.

Every criterion has ``stats`` (the numbers worth logging), ``output`` (the logits at the points trained on) and
``state_dict()``.
"""

from elle_fast.methods.base import Criterion, Method
from elle_fast.methods.elle import LEVERS
from elle_fast.methods.table import NAMES, TABLE, build, find

__all__ = ["LEVERS", "NAMES", "TABLE", "Criterion", "Method", "build", "find"]
