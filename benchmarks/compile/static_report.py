"""What the compiler makes of every kernel, read from its machine code; needs no GPU.

    python -m benchmarks.compile.static_report --out benchmarks/results/static_report.json
    python -m benchmarks.compile.static_report --targets sm_90 --only "pack l2"

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

from torch import Tensor

from benchmarks.compile.machine_code import (
    Step,
    read_amd_resources,
    read_amdgcn,
    read_resources,
    read_sass,
)
from benchmarks.compile.triton_cases import loss_cases, pack_cases
from elle_fast._core.files import write_atomically
from elle_fast.backends import triton_host
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
    _, source, options = _specialise(variant, "sm_90")
    # Triton for AMD compiles in whether a tensor is larger than 2 GiB.
    large = [isinstance(value, Tensor) and value.numel() * value.itemsize >= 1 << 31 for value in variant.arguments]
    return f"{variant.kernel.__name__} {source.signature} {source.constants} {source.attrs} {options} {large}"


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
    if triton_host.interpreted():
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
    return ["python", "-m", "benchmarks.compile.static_report", *chosen, "--out", path.name]


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
