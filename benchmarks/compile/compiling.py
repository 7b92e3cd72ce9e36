"""A launch of a Triton kernel, specialised and compiled for a GPU that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compile.machine_code import Step, read_amd_resources, read_amdgcn, read_resources, read_sass

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass
class Variant:
    """One compilation: a kernel with its arguments, and all the cases that come down to it."""

    name: str
    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    also: list[str] = field(default_factory=list)

    @property
    def bound(self) -> dict[str, Any]:
        """The arguments by name."""
        return {**dict(zip(self.kernel.arg_names, self.arguments, strict=True)), **self.keywords}


class Compiled(NamedTuple):
    """The instructions, and what the kernel takes."""

    code: list[Step]
    resources: dict[str, int]


def specialise(variant: Variant, target: str) -> tuple[Any, Any, dict[str, Any]]:
    """Target, source and options, from the code that Triton's launches go through."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    kernel = variant.kernel
    keywords = {**variant.keywords, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*variant.arguments, **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return gpu, ASTSource(kernel, signature, constants, attributes), vars(parsed)


def compiled(variant: Variant, target: str) -> Compiled:
    """Read from the machine code for that target."""
    import triton

    gpu, source, options = specialise(variant, target)
    made = triton.compile(source, target=gpu, options=dict(options))
    shared = {"shared": made.metadata.shared}
    if gpu.backend == "cuda":
        code = read_sass(made.asm["sass"])
        spills = {"spill_instructions": sum(step.kind == "local" for step in code)}
        return Compiled(code, {**read_resources(_resource_usage(made.asm["cubin"])), **spills, **shared})
    text = made.asm["amdgcn"]
    return Compiled(read_amdgcn(text), {**read_amd_resources(text), **shared})


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
