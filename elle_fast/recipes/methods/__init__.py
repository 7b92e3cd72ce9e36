"""Training methods by name: each is a criterion ``(model, x, target) -> loss`` with ``stats``."""

from elle_fast.recipes.methods.registry import ALIASES, METHODS, NAMES, Method, build, find

# For benchmarks that take a method's points as its definition has them.
CLAMPED = tuple(name for name in (*NAMES, *ALIASES) if find(name).clamped)

__all__ = ["CLAMPED", "METHODS", "NAMES", "Method", "build", "find"]
