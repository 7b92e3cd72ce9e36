"""Training methods by name: each is a criterion ``(model, x, target) -> loss`` with ``stats``."""

from elle_fast.methods.table import LEVERS, METHODS, NAMES, Method, build, find

__all__ = ["LEVERS", "METHODS", "NAMES", "Method", "build", "find"]
