"""What the compiler makes of every kernel, read from its machine code; needs no GPU.

    python benchmarks/static_report.py --out benchmarks/results/static_report.json
    python benchmarks/static_report.py --targets sm_90 --only "pack l2"

The launches are recorded from the host functions themselves, called with tensors that have no data, and specialised by
Triton's own code (alignment, divisibility, 1 and None compiled in). The variants are each value of each option, with
the others at their defaults, and every pair of dtypes for the usual attack: not the product of all options.

Exits with 1, naming the variant, if a bound is broken:

- no spills and no local memory;
- 16 bytes at a time for all data where the tensors allow it: aligned, samples (or rows of logits) a multiple of 16
  bytes long, in the same layout. Allowed to be narrower there: the seed, alpha, the channels' mean and std, and what
  the loss reads once a row (label, its logit, maximum, sum, slope). The reduction reads a few numbers a row: no bound;
- at most 128 registers a thread, see REGISTERS.

A count of instructions is not a measurement. The predicted time of the pack kernels is the larger of bytes / bandwidth
and instructions / (128 lanes a clock and multiprocessor): latencies, waves and tails are not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from elle_fast.ops import triton_support
from elle_fast.ops.elle_loss.validation import LamRule, linearity_options, sizes_of
from elle_fast.ops.pack_points.validation import packing_options
from elle_fast.recipes.files import write_atomically
from elle_fast.recipes.provenance import provenance

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

# Most registers a thread. An NVIDIA multiprocessor has 65,536, so that 128 leave room for 512 threads. Each has at
# least 32 bytes of x and grad on their way, 16 kB together. An H100 moves 3.35 TB/s / 132 SM * 0.7 us = 18 kB while a
# load is under way, and of what the pack kernels move at most a half is loads. On AMD, 128 of a SIMD's 512 leave room
# for 4 waves.
REGISTERS = 128


class Chip(NamedTuple):
    """What a prediction needs of a GPU."""

    name: str
    bandwidth: float  # bytes per second
    multiprocessors: int
    clock: float  # Hz


CHIPS = {"sm_80": Chip("A100", 2.0e12, 108, 1.41e9), "sm_90": Chip("H100", 3.35e12, 132, 1.76e9)}


# --- The variants -----------------------------------------------------------------------------------------------------


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
        return {**dict(zip(self.kernel.arg_names, self.arguments, strict=False)), **self.keywords}


class _Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: self.launches.append((self.kernel, arguments, keywords))


@contextmanager
def _recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Within, the host functions launch nothing; what they would have launched is in the list."""
    from elle_fast.ops.elle_loss import triton as loss_host
    from elle_fast.ops.elle_loss import triton_reduce
    from elle_fast.ops.pack_points import triton as pack_host

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    places = [(pack_host, name) for name in ("pack_cube", "start_cube", "pack_ball", "start_ball")]
    places += [(loss_host, name) for name in ("rows_forward", "rows_backward")]
    places += [(triton_reduce, name) for name in ("reduce_forward", "update_lam")]
    # Launches are kept with their kernels.
    caches = [
        value for host in (pack_host, loss_host) for value in vars(host).values() if hasattr(value, "cache_clear")
    ]
    kept = [getattr(module, name) for module, name in places]
    try:
        for cache in caches:
            cache.cache_clear()
        for (module, name), kernel in zip(places, kept, strict=True):
            setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for (module, name), kernel in zip(places, kept, strict=True):
            setattr(module, name, kernel)
        for cache in caches:
            cache.cache_clear()


@lru_cache(maxsize=1)
def variants() -> list[Variant]:
    """Every distinct compilation, in the order of the cases."""
    found: dict[str, Variant] = {}
    with _recording() as launches:
        for name, call in [*_pack_cases(), *_loss_cases()]:
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
    _, source, options = _specialise(variant, "sm_90")
    # Triton for AMD compiles in whether a tensor is larger than 2 GiB.
    large = [isinstance(value, Tensor) and value.numel() * value.itemsize >= 1 << 31 for value in variant.arguments]
    return f"{variant.kernel.__name__} {source.signature} {source.constants} {source.attrs} {options} {large}"


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALL, LARGE = (128, 3, 32, 32), (128, 3, 224, 224)
CIFAR = {"mean": (0.49, 0.48, 0.45), "std": (0.2, 0.2, 0.2)}

# Options of pack_points beside the attack's defaults, one at a time. "x_adv" gives the points, "none" no first rows.
PACK_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "start": {"start": 1.0},
    "start, project, bounds": {"start": 1.0, "project": True, "bounds": (0.0, 1.0)},
    "project": {"project": True},
    "bounds": {"bounds": (0.0, 1.0)},
    "normalised": CIFAR,
    "elle-2p": {"points": "elle-2p"},
    "five-point": {"points": "five-point"},
    "3 triplets": {"triplets": 3},
    "0 triplets": {"triplets": 0},
    "half the batch": {"fraction": 0.5},
    "alpha half": {"alpha": "half"},
    "alpha given": {"alpha": "given"},
    "x_adv given": {"attack": "x_adv"},
    "no attack": {"attack": "none"},
    "batch of 1": {"shape": (1, 3, 32, 32)},
    "batch of 100": {"shape": (100, 3, 32, 32)},
    "sample_offset 5": {"sample_offset": 5},
    "3x423": {"shape": (128, 3, 423)},
    "features 129": {"shape": (128, 129)},
    "x unaligned": {"unaligned": True},
    "WIDE": {"shape": (1, 3, 1 << 15, 1 << 15)},
    "x channels_last, output contiguous": {"last": (True, False, False)},
    "x contiguous, grad and output channels_last": {"last": (False, True, True)},
    "x and output contiguous, grad channels_last": {"last": (False, True, False)},
}


def _pack_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for shape in (SMALL, LARGE):
        size = f"{shape[1]}x{shape[2]}x{shape[3]}"
        for layout, last in (("contiguous", False), ("channels_last", True)):
            for x_name in DTYPES:
                for grad_name in dict.fromkeys((x_name, "fp32")):
                    for out_name in DTYPES:
                        name = f"pack linf {size} {layout} x {x_name}, grad {grad_name}, output {out_name}"
                        dtypes = (x_name, grad_name, out_name)
                        yield name, _pack("linf", {"shape": shape, "last": (last, last, last)}, dtypes)
                yield (
                    f"start linf {size} {layout} x {x_name}",
                    _start("linf", {"shape": shape, "last": (last, last, last)}, x_name),
                )
    for norm in ("linf", "l2"):
        for option, values in PACK_OPTIONS.items():
            yield f"pack {norm} fp32, {option}", _pack(norm, values, ("fp32",) * 3)
            if option in ("bounds", "3x423", "WIDE", "x unaligned"):
                yield f"start {norm} fp32, {option}", _start(norm, values, "fp32")
        # The layouts and the options whose code depends on them, where elements are narrow.
        for option in ("default", "start, project, bounds", "normalised", "3 triplets", "3x423", "WIDE"):
            yield f"pack {norm} bf16, {option}", _pack(norm, PACK_OPTIONS[option], ("bf16",) * 3)
            if "shape" not in PACK_OPTIONS[option]:
                values = {**PACK_OPTIONS[option], "last": (True, True, True)}
                yield f"pack {norm} bf16 channels_last, {option}", _pack(norm, values, ("bf16",) * 3)
    for dtypes in (
        ("fp16", "fp16", "fp16"),
        ("bf16", "fp32", "bf16"),
        ("fp32", "fp32", "bf16"),
        ("bf16", "bf16", "fp32"),
    ):
        x_name, grad_name, out_name = dtypes
        yield f"pack l2 x {x_name}, grad {grad_name}, output {out_name}", _pack("l2", {}, dtypes)
    yield "pack l2 3x224x224 bf16", _pack("l2", {"shape": LARGE}, ("bf16",) * 3)
    for x_name in DTYPES:
        for layout, last in (("contiguous", False), ("channels_last", True)):
            yield f"start l2 {layout} x {x_name}", _start("l2", {"last": (last, last, last)}, x_name)


def _tensor(shape: Sequence[int], dtype: torch.dtype, last: bool = False, unaligned: bool = False) -> Tensor:
    """A tensor without data."""
    if unaligned:
        return torch.empty(math.prod(shape) + 1, dtype=dtype, device="meta")[1:].view(*shape)
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=form)


def _seed() -> Tensor:
    return torch.empty((), dtype=torch.int64, device="meta")


def _pack(norm: str, values: dict[str, Any], dtypes: Sequence[str]) -> Callable[[], object]:
    """A call of pack_points: some ``values`` describe its tensors, the others are options."""
    options = dict(values)
    shape = options.pop("shape", SMALL)
    x_last, grad_last, out_last = options.pop("last", (False, False, False))
    attack, unaligned = options.pop("attack", "grad"), options.pop("unaligned", False)
    x_type, grad_type, out_type = (DTYPES[name] for name in dtypes)
    form = torch.preserve_format
    if x_last or grad_last or out_last:
        form = torch.channels_last if out_last else torch.contiguous_format
    alpha_given = options.get("alpha") == "given"
    packing = packing_options(eps=8 / 255, norm=norm, dtype=out_type, memory_format=form, **options)

    def call() -> object:
        from elle_fast.ops.pack_points import triton as host

        x = _tensor(shape, x_type, x_last, unaligned)
        given = None if attack == "none" else _tensor(shape, grad_type, grad_last)
        alpha = _tensor((shape[0] * packing.triplets,), torch.float32) if alpha_given else None
        grad, x_adv = (given, None) if attack == "grad" else (None, given)
        statistics = _tensor((2 * shape[1],), torch.float32) if packing.mean is not None else None
        return host.pack_points(x, grad, x_adv, alpha, _seed(), statistics, packing)

    return call


def _start(norm: str, values: dict[str, Any], dtype: str) -> Callable[[], object]:
    """A call of random_start."""
    last = values.get("last", (False,))[0]
    packing = packing_options(eps=8 / 255, norm=norm, start=1.0, bounds=values.get("bounds"))

    def call() -> object:
        from elle_fast.ops.pack_points import triton as host

        x = _tensor(values.get("shape", SMALL), DTYPES[dtype], last, values.get("unaligned", False))
        return host.random_start(x, _seed(), packing)

    return call


CLASSES = (1, 10, 100, 1000, 32000)
RULE = LamRule(lam_max=4000.0, gamma=0.99, sensitivity=2.0, min_history=0)

LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "soft targets": {"soft": True},
    "soft targets, label smoothing": {"soft": True, "label_smoothing": 0.1},
    "elle-2p": {"points": "elle-2p"},
    "five-point": {"points": "five-point"},
    "abs": {"penalty": "abs"},
    "smooth_l1": {"penalty": "smooth_l1"},
    "3 triplets": {"triplets": 3},
    "of logits": {"of": "logits"},
    "of logits, elle-2p": {"of": "logits", "points": "elle-2p"},
    "of logits, five-point": {"of": "logits", "points": "five-point"},
    "of logits, abs": {"of": "logits", "penalty": "abs"},
    "of logits, smooth_l1": {"of": "logits", "penalty": "smooth_l1"},
    "of logits, 3 triplets": {"of": "logits", "triplets": 3},
    "of logits, soft targets, label smoothing": {"of": "logits", "soft": True, "label_smoothing": 0.1},
    "no first rows": {"first": False},
    "no first rows, of logits": {"first": False, "of": "logits"},
    "lam a tensor": {"lam": "tensor"},
    "lam adaptive": {"lam": "adaptive"},
    "lam adaptive, window": {"lam": "window"},
    "only loss has a gradient": {"upstream": (True, False, False)},
    "only ce has a gradient": {"upstream": (False, True, False)},
    "only e_lin has a gradient": {"upstream": (False, False, True)},
    "batch of 1": {"batch": 1},
    "batch of 100": {"batch": 100},
    "batch of 256": {"batch": 256},
    "batch of 512": {"batch": 512},
    "batch of 1024": {"batch": 1024},
    "batch of 1024, lam adaptive, window": {"batch": 1024, "lam": "window"},
    "batch of 1024, elle-2p, 3 triplets": {"batch": 1024, "points": "elle-2p", "triplets": 3},
    "batch of 1024, of logits, abs": {"batch": 1024, "of": "logits", "penalty": "abs"},
    "rows apart": {"stride": 1008},
    "unaligned": {"unaligned": True},
}


def _loss_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    for dtype in DTYPES:
        for classes in CLASSES:
            yield f"loss {dtype} C {classes}", _loss(dtype, classes, {})
    for option, values in LOSS_OPTIONS.items():
        yield f"loss fp32 C 1000, {option}", _loss("fp32", 1000, values)
    for option in ("soft targets, label smoothing", "of logits", "of logits, five-point"):
        for dtype, classes in (("bf16", 1000), ("fp32", 10), ("bf16", 32000)):
            yield f"loss {dtype} C {classes}, {option}", _loss(dtype, classes, LOSS_OPTIONS[option])
    yield "update_lam", _update(windowed=False)
    yield "update_lam, window", _update(windowed=True)


def _state(windowed: bool) -> list[Tensor]:
    """lam, count, skipped, and mean and deviations or the window: as elle_fast.adaptive has them."""
    lam = torch.empty((), dtype=torch.float32, device="meta")
    mean, spread = (torch.empty((), dtype=torch.float64, device="meta") for _ in range(2))
    count, skipped = (torch.empty((), dtype=torch.int64, device="meta") for _ in range(2))
    if windowed:
        return [lam, count, skipped, torch.empty(500, dtype=torch.float64, device="meta")]
    return [lam, count, skipped, mean, spread]


def _loss(dtype: str, classes: int, values: dict[str, Any]) -> Callable[[], object]:
    """A call of elle_loss and one of its backward."""
    names = ("points", "triplets", "of", "penalty", "label_smoothing")
    options = linearity_options(**{name: value for name, value in values.items() if name in names})
    batch, first, lam_kind = values.get("batch", 128), values.get("first", True), values.get("lam", "number")
    first = first or options.points == "elle-2p"

    def call() -> object:
        from elle_fast.ops import layout
        from elle_fast.ops.elle_loss import triton as host

        rows = (batch if first else 0) + layout.BLOCKS[options.points] * batch * options.triplets
        logits = _tensor((rows, values.get("stride", classes)), DTYPES[dtype], unaligned=values.get("unaligned", False))
        logits = logits[:, :classes]
        target = torch.empty((batch,), dtype=torch.int64, device="meta")
        if values.get("soft"):
            target = torch.empty((batch, classes), device="meta")
        alpha = torch.empty(batch * options.triplets, device="meta")
        sizes = sizes_of(logits, target, alpha, options, first=first)
        lam: float | Tensor = torch.empty((), device="meta") if lam_kind == "tensor" else 5000.0
        state = _state(lam_kind == "window") if lam_kind in ("adaptive", "window") else []
        *_, saved = host.elle_loss(logits, target, alpha, lam, state, RULE, sizes, options)
        loss, ce, e_lin = (
            torch.empty((), device="meta") if given else None for given in values.get("upstream", (True,) * 3)
        )
        return host.elle_loss_backward(logits, target, alpha, saved, loss, ce, e_lin, sizes, options)

    return call


def _update(windowed: bool) -> Callable[[], object]:
    def call() -> object:
        from elle_fast.ops.elle_loss import triton as host

        return host.update_lam(torch.empty((), device="meta"), _state(windowed), RULE)

    return call


# --- Compiling --------------------------------------------------------------------------------------------------------


def _specialise(variant: Variant, target: str) -> tuple[Any, Any, dict[str, Any]]:
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


def inspect(variant: Variant, target: str) -> dict[str, Any]:
    """Compile for the target and say what came out, and which bounds it breaks."""
    import triton

    gpu, source, options = _specialise(variant, target)
    compiled = triton.compile(source, target=gpu, options=dict(options))
    if gpu.backend == "cuda":
        code = read_sass(compiled.asm["sass"])
        resources = read_resources(_resource_usage(compiled.asm["cubin"]))
    else:
        code = read_amdgcn(compiled.asm["amdgcn"])
        resources = read_amd_resources(compiled.asm["amdgcn"])
    found: dict[str, Any] = {
        **resources,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": len(code),
        "loads": dict(sorted(Counter(step.width for step in code if step.kind == "load").items())),
        "stores": dict(sorted(Counter(step.width for step in code if step.kind == "store").items())),
    }
    if gpu.backend == "cuda":
        found["spill_instructions"] = sum(step.kind == "local" for step in code)
        found.update(per_element(variant, code, target))
    data = data_accesses(variant, gpu.warp_size)
    found["data"] = asdict(data)
    found["broken"] = broken_bounds(found, data)
    return found


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# --- Reading machine code ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One instruction."""

    opcode: str
    kind: str  # load and store (of global memory), local, integer, float or other
    width: int  # bits of a load or store, else 0
    loops: tuple[int, ...]  # the loops it is in, outermost first, each by where it begins


# Opcodes by how they begin; U is the unit that computes what is equal in all lanes, V and H the same on halves.
INTEGER = re.compile(
    r"IMAD|LOP|IADD|SHF|SHL|SHR|ISETP|LEA|UIMAD|ULOP|UIADD|USHF|UISETP|ULEA|VIADD|UVIADD|IABS|UIABS|PRMT|"
    r"UPRMT|BMSK|SGXT|IMNMX|UIMNMX|VIMNMX|UVIMNMX|SEL|USEL|POPC|FLO|IDP"
)
FLOAT = re.compile(
    r"FADD|FMUL|FFMA|FSETP|FSEL|FMNMX|FSET|FCHK|FRND|I2F|F2F|F2I|MUFU|HADD|HMUL|HFMA|HSET|HMNMX|DADD|DMUL|"
    r"DFMA|DSETP|UI2F|UF2F|UF2I|UFADD|UFMUL|UFFMA|UFSETP|UFSEL"
)

_SASS_LINE = re.compile(r"^[^\t]+\t(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^\n]*)$")


def read_sass(text: str) -> list[Step]:
    """The instructions of Triton's listing, without the padding after the end."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.endswith(":") and "\t" not in line:
            labels[line[:-1]] = len(found)
        elif match := _SASS_LINE.match(line):
            found.append((match[1], match[2]))
    goes_to = {place: _branch_target(opcode, operands, labels) for place, (opcode, operands) in enumerate(found)}
    ranges = [(begin, end) for end, begin in goes_to.items() if begin is not None and begin < end]
    steps = []
    for place, (opcode, _) in enumerate(found):
        if goes_to[place] == place or opcode == "NOP":
            continue
        # Several branches back to one place are one loop.
        loops = tuple(sorted({begin for begin, end in ranges if begin <= place <= end}))
        steps.append(Step(opcode, _sass_kind(opcode), _sass_width(opcode), loops))
    return steps


def _branch_target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    """Where a branch goes: a label, or an address where Triton knew no label to put; 16 bytes an instruction."""
    if not opcode.startswith("BRA"):
        return None
    if label := re.search(r"\bLBB\d+", operands):
        return labels.get(label[0])
    address = re.search(r"\b0x([0-9a-f]+)\s*;?\s*$", operands)
    return int(address[1], 16) // 16 if address else None


def _sass_kind(opcode: str) -> str:
    base = opcode.split(".")[0]
    if base in ("LDL", "STL"):
        return "local"
    if base in ("LDG", "LD", "LDGSTS"):
        return "load"
    if base in ("STG", "ST"):
        return "store"
    # F2FP and I2FP too: the names end in what they convert to.
    if FLOAT.match(base):
        return "float"
    return "integer" if INTEGER.match(base) else "other"


def _sass_width(opcode: str) -> int:
    if _sass_kind(opcode) not in ("load", "store"):
        return 0
    parts = opcode.split(".")
    for name, width in (("256", 256), ("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8), ("S8", 8)):
        if name in parts:
            return width
    return 32


def read_resources(text: str) -> dict[str, int]:
    """Registers, stack and local memory from cuobjdump's report."""
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    return {name: int(re.findall(rf"\b{label}:(\d+)", text)[-1]) for name, label in names.items()}


_AMD_LINE = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_[a-z0-9_]+)")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_WIDTH = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def read_amdgcn(text: str) -> list[Step]:
    """The instructions of an assembly listing; which are in a loop is not looked at."""
    steps = []
    for line in text.splitlines():
        if not (match := _AMD_LINE.match(line)):
            continue
        opcode, kind, width = match[1], "other", 0
        if opcode.startswith("scratch_"):
            kind = "local"
        elif access := _AMD_ACCESS.match(opcode):
            kind = access[1]
            width = _AMD_WIDTH.get(access[2], 8 if "byte" in access[2] else 16)
        steps.append(Step(opcode, kind, width, ()))
    return steps


def read_amd_resources(text: str) -> dict[str, int]:
    """Registers, spills and private memory from the metadata of an assembly listing."""
    names = {
        "registers": "vgpr_count",
        "scalar_registers": "sgpr_count",
        "local": "private_segment_fixed_size",
        "vector_spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count",
    }
    found = {}
    for name, label in names.items():
        values = re.findall(rf"^\s+\.{label}:\s+(\d+)", text, re.MULTILINE)
        found[name] = int(values[-1])
    found["spill_instructions"] = sum(step.kind == "local" for step in read_amdgcn(text))
    return found


# --- Bounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """What a thread has to access in a variant, in the code as written once: loops counted once.

    ``loads`` and ``stores`` are the 16-byte pieces of data; ``narrow_loads`` and ``narrow_stores`` how many narrower
    ones may be beside them. ``why`` is empty on the fast path, else why no width is asked for.
    """

    why: str
    loads: int = 0
    stores: int = 0
    narrow_loads: int = 0
    narrow_stores: int = 0


def data_accesses(variant: Variant, lanes: int) -> Data:
    """What the widths of a variant are held to."""
    bound, name = variant.bound, variant.kernel.__name__
    if name in ("reduce_forward", "update_lam"):
        return Data("a few numbers a row, by one program")
    block = bound.get("ROWS", 1) * bound["BLOCK"]
    elements = block // (lanes * bound["num_warps"])
    if name.startswith("rows_"):
        return _loss_data(bound, elements, name == "rows_forward")
    tensors = [bound["x_ptr"]]
    tensors += [bound["points_ptr"], bound["grad_ptr"]] if "points_ptr" in bound else [bound["start_ptr"]]
    used = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.storage_offset() * tensor.itemsize % 16 for tensor in used):
        return Data("a tensor is not aligned")
    length = math.prod(used[0].shape[1:])
    if any(length * tensor.itemsize % 16 for tensor in used):
        return Data("samples are not a multiple of 16 bytes long")
    if elements * min(tensor.itemsize for tensor in used) < 16:
        return Data(f"a tile gives each of {lanes} lanes less than 16 bytes")

    def pieces(tensor: Tensor | None) -> int:
        return 0 if tensor is None else elements * tensor.itemsize // 16

    if "start_ptr" in bound:
        return Data("", pieces(bound["x_ptr"]), pieces(bound["start_ptr"]), narrow_loads=1)
    first, ball = bound["FIRST"] != 0, name == "pack_ball"
    # The l2 kernel reads the gradient for its length, and both again for the projection.
    again = ball and bound["FIRST"] == 1
    x_passes, grad_passes = 1 + (again and bound["PROJECT"]), first + again * (1 + bound["PROJECT"])
    narrow = 1 + (bound["ALPHA"] == 2) + 2 * elements * bound["NORMALISE"]
    wide = 0
    for tensor, same, passes in (("x_ptr", "X_SAME", x_passes), ("grad_ptr", "GRAD_SAME", grad_passes)):
        if bound[same]:
            wide += passes * pieces(bound[tensor])
        else:
            narrow += passes * elements  # read across its layout, an element at a time
    return Data("", wide, (first + bound["BLOCKS"]) * pieces(bound["points_ptr"]), narrow, narrow_stores=1)


def _loss_data(bound: dict[str, Any], elements: int, forward: bool) -> Data:
    """The same for the kernels over logits."""
    logits, target = bound["logits_ptr"], bound["target_ptr"]
    if bound["ALIGN"] * logits.itemsize < 16 or (bound["SOFT"] and bound["TARGET_ALIGN"] * target.itemsize < 16):
        return Data("rows of logits are not a multiple of 16 bytes long")
    if logits.storage_offset() * logits.itemsize % 16:
        return Data("a tensor is not aligned")
    if elements * logits.itemsize < 16:
        return Data("a tile gives each lane less than 16 bytes")
    pieces = elements * logits.itemsize // 16
    soft = elements * target.itemsize // 16 if bound["SOFT"] else 0
    residual = (5 if bound["POINTS"] == 2 else 3) * pieces if bound["OF_LOGITS"] else 0
    # A thread may meet as many rows as it has pieces. Of each: label, its logit, alpha (forward); label, maximum, sum
    # of exponentials, sum of targets, slope, alpha (backward), and there lam and three upstream gradients once.
    rows = min(pieces, bound["ROWS"])
    if forward:
        passes = 1 + (bound["SOFT"] or bound["SMOOTH"])
        return Data("", passes * pieces + soft + residual, 0, narrow_loads=3 * rows, narrow_stores=5 * rows)
    stores = (1 + (bound["BLOCKS"] if bound["OF_LOGITS"] else 0)) * pieces
    return Data("", pieces + soft + residual, stores, narrow_loads=6 * rows + 4)


def broken_bounds(found: dict[str, Any], data: Data) -> list[str]:
    """The bounds that do not hold, in words."""
    broken = []
    for name in ("stack", "local", "vector_spills", "scalar_spills", "spill_instructions"):
        if found.get(name, 0):
            broken.append(f"{name}: expected 0, got {found[name]}")
    if found["registers"] > REGISTERS:
        broken.append(f"registers: expected at most {REGISTERS}, got {found['registers']}")
    if data.why:
        return broken
    for kind, least, most in (
        ("loads", data.loads, data.narrow_loads),
        ("stores", data.stores, data.narrow_stores),
    ):
        widths = {int(width): count for width, count in found[kind].items()}
        wide = sum(count * (width // 128) for width, count in widths.items() if width >= 128)
        narrow = sum(count for width, count in widths.items() if width < 128)
        if wide < least:
            broken.append(f"{kind}: expected {least} of 128 bits, got {wide} and {narrow} narrower")
        if narrow > most:
            broken.append(f"{kind}: expected at most {most} narrower than 128 bits, got {narrow}")
    return broken


def per_element(variant: Variant, code: list[Step], target: str) -> dict[str, Any]:
    """Instructions per element of x, and what bounds a pack kernel by that count; nothing for the others.

    The linf kernel goes over its triplets in a loop, or has the code of one; the l2 kernel goes over its tiles in
    innermost loops, which count, and what is outside of them does not.
    """
    bound, name = variant.bound, variant.kernel.__name__
    if name not in ("pack_cube", "pack_ball", "start_cube", "start_ball"):
        return {}
    elements = bound.get("ROWS", 1) * bound["BLOCK"] / (32 * bound["num_warps"])
    # Where no triplet is wanted, the l2 kernel still passes once, for the first rows.
    triplets = max(bound.get("triplets", 1), int(name.endswith("ball")))
    outer = {begin for step in code for begin in step.loops[:-1]}
    counts: Counter[str] = Counter()
    for step in code:
        times = triplets if step.loops else 1
        if name.endswith("ball"):
            innermost = bool(step.loops) and step.loops[-1] not in outer
            times = (triplets if len(step.loops) > 1 else 1) if innermost else 0
        counts["all"] += times
        counts[step.kind] += times
    each = {kind: round(counts[kind] / elements, 1) for kind in ("all", "integer", "float")}
    found: dict[str, Any] = {"per_element": each}
    if chip := CHIPS.get(target):
        memory = _bytes_per_element(bound) / chip.bandwidth * 1e12
        issue = each["all"] / (128 * chip.multiprocessors * chip.clock) * 1e12
        found["predicted"] = {
            "chip": chip.name,
            "bytes_per_element": _bytes_per_element(bound),
            "memory_ns_per_1000": round(memory, 2),
            "issue_ns_per_1000": round(issue, 2),
            "bound": "memory" if memory >= issue else "issue",
        }
    return found


def _bytes_per_element(bound: dict[str, Any]) -> float:
    """x and the gradient read once, each point written once."""
    x: Tensor = bound["x_ptr"]
    if "start_ptr" in bound:
        return 2 * x.itemsize
    points: Tensor = bound["points_ptr"]
    given = bound["grad_ptr"]
    read = x.itemsize + (0 if given is None else given.itemsize)
    return read + points.itemsize * points.shape[0] / x.shape[0]


# --- The command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the file; 1 if a bound is broken."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if triton_support.interpreted():
        parser.error("TRITON_INTERPRET=1 is set, with which Triton compiles nothing: unset it for this command")
    began = time.perf_counter()
    places = [place for place, variant in enumerate(variants()) if _wanted(variant, options.only)]
    if not places:
        parser.error(f"--only: expected parts of variants' names, got {', '.join(map(repr, options.only))}")
    if options.list:
        print("\n".join(variants()[place].name for place in places))
        return 0
    work = [(place, target) for target in options.targets for place in places]
    if options.jobs == 1:
        results = [_inspect(*item) for item in work]
    else:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(_inspect, *zip(*work, strict=True), chunksize=4))
    reports: dict[str, dict[str, Any]] = {target: {} for target in options.targets}
    for (place, target), result in zip(work, results, strict=True):
        reports[target][variants()[place].name] = result
    if options.out is not None:
        _write(options.out, options.targets, [variants()[place] for place in places], reports)
    for line in table(reports):
        print(line)
    failures = [
        f"{target}: {name}: {reason}"
        for target, results_of in reports.items()
        for name, result in results_of.items()
        for reason in result["broken"]
    ]
    print(f"{len(places)} variants on {', '.join(options.targets)} in {time.perf_counter() - began:.0f} s")
    for failure in failures:
        print(f"broken bound: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _inspect(place: int, target: str) -> dict[str, Any]:
    """For a process of its own, which makes the list of variants anew; a failed compilation is a result, too."""
    try:
        return inspect(variants()[place], target)
    except Exception as error:
        # Triton's messages quote the source and end in what is wrong with it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
        return {"broken": [f"does not compile: {type(error).__name__}: {' / '.join(lines[-2:])[-300:]}"]}


def _wanted(variant: Variant, parts: list[str]) -> bool:
    return any(part in name for part in parts for name in (variant.name, *variant.also))


def _write(path: Path, targets: list[str], chosen: list[Variant], reports: dict[str, dict[str, Any]]) -> None:
    """JSON with a line for each variant and result, so that a change of one shows as one line."""
    facts = {"note": (__doc__ or "").split("\n", 1)[0], **provenance(_command(path, targets)), "registers": REGISTERS}
    lines = [json.dumps(facts, indent=2)[:-2] + ","]
    lines.append('  "variants": {')
    lines += _entries({variant.name: {"also": variant.also} for variant in chosen}, 4)
    lines += ["  },", '  "results": {']
    for target in targets:
        lines.append(f'    "{target}": {{')
        lines += [*_entries(reports[target], 6), "    }" + ("," if target != targets[-1] else "")]
    lines += ["  }", "}", ""]

    def write(file: BinaryIO) -> None:
        file.write("\n".join(lines).encode())

    write_atomically(path, write)


def _entries(values: dict[str, Any], indent: int) -> list[str]:
    lines = [f"{' ' * indent}{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    return [line + "," for line in lines[:-1]] + lines[-1:]


def _command(path: Path, targets: list[str]) -> list[str]:
    chosen = [] if targets == list(TARGETS) else ["--targets", *targets]
    return ["python", "benchmarks/static_report.py", *chosen, "--out", path.name]


def table(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Per kernel and target: the most of everything over its variants, and the pack kernels' prediction."""
    head = f"{'target':7} {'kernel':15} {'variants':>8} {'regs':>5} {'shared':>7} {'spills':>6} {'instr':>6}"
    lines = [f"{head} {'fast path':>9} {'per element: int':>17} {'float':>6} {'all':>6}  bound"]
    for target, results in reports.items():
        kernels = dict.fromkeys(name.rsplit(" | ", 1)[1] for name in results)
        for kernel in kernels:
            every = [result for name, result in results.items() if name.endswith(f" | {kernel}")]
            own = [result for result in every if "registers" in result]
            if not own:
                lines.append(f"{target:7} {kernel:15} does not compile")
                continue
            spills = sum(
                result.get(name, 0)
                for result in own
                for name in ("stack", "local", "vector_spills", "scalar_spills", "spill_instructions")
            )
            fast = sum(not result["data"]["why"] for result in own)
            line = f"{target:7} {kernel:15} {len(own):8} {_most(own, 'registers'):5} {_most(own, 'shared'):7}"
            line += f" {spills:6} {_most(own, 'instructions'):6} {fast:9}"
            each = [result["per_element"] for result in own if "per_element" in result]
            if each:
                line += f" {_range(each, 'integer'):>17} {_range(each, 'float'):>6} {_range(each, 'all'):>6}"
            bounds = Counter(result["predicted"]["bound"] for result in own if "predicted" in result)
            lines.append(f"{line}  {', '.join(f'{name} {count}' for name, count in bounds.items())}".rstrip())
    return lines


def _most(results: list[dict[str, Any]], name: str) -> int:
    return max(int(result[name]) for result in results)


def _range(values: list[dict[str, float]], name: str) -> str:
    numbers = [value[name] for value in values]
    return f"{min(numbers):.0f}-{max(numbers):.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="default: all")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="SUBSTRING", help="only variants whose name has one of these"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the variants and compile nothing")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
