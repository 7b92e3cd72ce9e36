"""Which compilations there are: the launches of the host functions, recorded, each distinct one once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.compile.compiling import Variant, specialise
from benchmarks.compile.triton_cases import loss_cases, pack_cases
from elle_fast.testing import stand_ins

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, keywords


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append((self.kernel, arguments, keywords))


@lru_cache(maxsize=1)
def variants() -> list[Variant]:
    """Every distinct compilation, in the order of the cases."""
    found: dict[str, Variant] = {}
    launches: list[Launch] = []
    with stand_ins(lambda kernel: _Recorder(kernel, launches)):
        for name, call in [*pack_cases(), *loss_cases()]:
            launches.clear()
            call()
            for kernel, arguments, keywords in launches:
                variant = Variant(f"{name} | {kernel.__name__}", kernel, arguments, keywords)
                key = _key(variant)
                if key in found:
                    found[key].also.append(variant.name)
                else:
                    found[key] = variant
    return list(found.values())


def _key(variant: Variant) -> str:
    """Equal for launches that compile to the same thing on every target."""
    _, source, options = specialise(variant, "sm_90")
    # Triton for AMD compiles in whether a tensor is larger than 2 GiB.
    large = [
        isinstance(value, Tensor) and value.numel() * value.itemsize >= 1 << 31
        for value in tree_leaves(variant.arguments)
    ]
    return f"{variant.kernel.__name__} {source.signature} {source.constants} {source.attrs} {options} {large}"
