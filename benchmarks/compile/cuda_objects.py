"""What nvcc makes of the kernels in csrc/cuda, read from their machine code; needs nvcc, no GPU.

    python -m benchmarks.compile.cuda_objects --out benchmarks/results/cuda_objects.json
    python -m benchmarks.compile.cuda_objects --architectures 9.0 --only pack_points

Exits with 1, naming kernel and architecture, if a bound is broken:

- no stack, no local memory, no spills;
- at most 128 registers a thread, as in static_report.py;
- 16 bytes at a time in the kernels for aligned tensors: as many such loads and stores as the source has places for
  them, and no narrower store of data. Narrower loads stay there for tensors in another layout, the channels' mean and
  std, and the few numbers that a row has.

A kernel's flags and name are those of the build: setup.py. An instruction in a loop counts once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import setup
from benchmarks.compile.bounds import REGISTERS
from benchmarks.compile.machine_code import SPILLS, accesses, narrow, read_resources, read_sass, wide
from benchmarks.harness.program import ROOT, command, listed, parser, write_lines
from elle_fast.recipes.provenance import provenance

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class Accesses(NamedTuple):
    """What a kernel is held to: least number of 16-byte loads and stores, and the most narrower stores."""

    loads: int = 0
    stores: int = 0
    narrow_stores: int | None = None  # None: no bound


def expected(kernel: str) -> Accesses:
    """The accesses of a kernel, from its template's arguments."""
    name, arguments = parts(kernel)
    if name in ("pack_cube", "pack_ball"):
        # Of a type of 4 bytes a vector is one piece; of one of 2 bytes, two of float32 and one of each 2-byte type.
        read, written = (1, 1) if arguments[0] == "4" else (4, 2)
        writes = 7  # x_adv, x_a, x_b and x_c of "elle", x_c of "elle-2p", x_c and x_b of "five-point"
        if name == "pack_ball":  # x twice and the gradient three times; both paths are in one kernel
            return Accesses(5 * read, writes * written)
        groups = 1 if arguments[1] == "true" else 2
        alpha = 1
        return Accesses(2 * groups * read, writes * groups * written, alpha) if arguments[2] == "true" else Accesses()
    if name == "rows_forward" and arguments[1] != "1":
        return Accesses(loads=1)
    if name == "rows_backward" and arguments[1] != "1":
        return Accesses(1, 1, 0)
    return Accesses()


def parts(kernel: str) -> tuple[str, list[str]]:
    """``"pack_cube<4, false, true>"`` -> ``"pack_cube", ["4", "false", "true"]``."""
    name, _, arguments = kernel.partition("<")
    return name, [argument.strip() for argument in arguments.rstrip(">").split(",")]


def cuobjdump() -> str | None:
    """NVIDIA's tool: the one that Triton carries, or else that of PATH or beside nvcc."""
    try:
        from triton import knobs

        return str(knobs.nvidia.cuobjdump.path)
    except Exception:  # no Triton, or one without the tool
        nvcc = setup.find_nvcc()
        return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=Path(nvcc).parent) if nvcc else None)


def inspect(source: Path, architecture: str, nvcc: str, tool: str) -> dict[str, dict[str, Any]]:
    """Compile a file for an architecture, such as ``"9.0"``: each kernel with what came out and the broken bounds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "object.cubin"
        _run(*setup.nvcc_command(nvcc, [architecture]), "-cubin", str(source), "-o", str(file))
        resources = _by_function(_run(tool, "--dump-resource-usage", str(file)), r"^\s*Function (\S+):$")
        code = _by_function(_run(tool, "--dump-sass", str(file)), r"^\s*Function : (\S+)$")
    names = dict(zip(resources, _demangled(resources), strict=True))
    return {
        names[symbol]: _kernel(names[symbol], resources[symbol], code[symbol])
        for symbol in sorted(resources, key=names.__getitem__)
    }


def _kernel(name: str, resources: str, code: str) -> dict[str, Any]:
    steps = read_sass(_as_listing(code))
    found: dict[str, Any] = {
        **read_resources(resources),
        "instructions": len(steps),
        "spill_instructions": sum(step.kind == "local" for step in steps),
        **accesses(steps),
    }
    found["broken"] = broken_bounds(found, expected(name))
    return found


def broken_bounds(found: dict[str, Any], wanted: Accesses) -> list[str]:
    """Each bound that a kernel breaks, in words."""
    broken = [f"{name}: expected 0, got {found[name]}" for name in SPILLS if found.get(name, 0)]
    if found["registers"] > REGISTERS:
        broken.append(f"registers: expected at most {REGISTERS}, got {found['registers']}")
    for name, least in (("loads", wanted.loads), ("stores", wanted.stores)):
        if wide(found[name]) < least:
            broken.append(f"{name}: expected {least} of 128 bits, got {found[name]}")
    narrower = narrow(found["stores"])
    if wanted.narrow_stores is not None and narrower > wanted.narrow_stores:
        broken.append(f"stores: expected at most {wanted.narrow_stores} narrower than 128 bits, got {narrower}")
    return broken


def _by_function(text: str, heading: str) -> dict[str, str]:
    """The parts of a tool's output that follow each function's heading."""
    pieces = re.split(heading, text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def _as_listing(code: str) -> str:
    """cuobjdump's lines as read_sass takes them, without addresses and encodings."""
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?;)", code, re.MULTILINE)
    return "".join(f"-\t{instruction}\n" for instruction in instructions)


def _demangled(symbols: Sequence[str] | dict[str, str]) -> list[str]:
    """Names without namespaces, return types and parameters."""
    lines = _run("c++filt", *symbols).splitlines()
    plain = [re.sub(r"\b[\w:]*\(anonymous namespace\)::|\belle_fast::(cuda::)?", "", line) for line in lines]
    return [re.sub(r"\(.*", "", line.removeprefix("void ")) for line in plain]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def table(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One line for each kernel: the most that any architecture takes."""
    kernels = dict.fromkeys(name for found in results.values() for name in found)
    lines = [f"{'kernel':48} registers  instructions  loads and stores of 128 bits"]
    for kernel in kernels:
        own = [found[kernel] for found in results.values() if kernel in found]
        most = {name: max(result[name] for result in own) for name in ("registers", "instructions")}
        wide = [min(result[kind].get(128, 0) for result in own) for kind in ("loads", "stores")]
        lines.append(f"{kernel:48} {most['registers']:9} {most['instructions']:13} {wide[0]:6} {wide[1]:6}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the file; 1 if a bound is broken."""
    options_of = parser("benchmarks.compile.cuda_objects", __doc__)
    usual = tuple(setup.ARCHITECTURES.split())
    options_of.add_argument(
        "--architectures", type=listed(str), default=usual, metavar="X.Y,X.Y", help="default: those of the build"
    )
    options_of.add_argument(
        "--only", action="append", metavar="TEXT", help="files whose name has it; may be given several times"
    )
    options_of.add_argument("--out", type=Path, help="the JSON file")
    options_of.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (default: one a core)"
    )
    options = options_of.parse_args(arguments)
    nvcc, tool = setup.find_nvcc(), cuobjdump()
    if nvcc is None or tool is None:
        options_of.error(f"expected nvcc and cuobjdump (Triton's package has it), found {nvcc} and {tool}")
    sources = [source for source in SOURCES if any(part in source.name for part in options.only or [""])]
    if not sources:
        options_of.error(f"--only: expected parts of {', '.join(source.name for source in SOURCES)}")
    work = [(source, architecture) for architecture in options.architectures for source in sources]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda item: inspect(item[0], item[1], nvcc, tool), work))
    results: dict[str, dict[str, dict[str, Any]]] = {architecture: {} for architecture in options.architectures}
    for (_, architecture), kernels in zip(work, found, strict=True):
        results[architecture].update(kernels)
    if options.out is not None:
        compiler = _run(nvcc, "--version").strip().splitlines()[-1]
        facts = {"compiler": compiler, "flags": setup.NVCC_FLAGS, "registers_at_most": REGISTERS}
        write_lines(options.out, {**provenance(command(options_of, options)), **facts, "results": results}, depth=3)
    print("\n".join(table(results)))
    failures = [
        f"{architecture}: {kernel}: {reason}"
        for architecture, kernels in results.items()
        for kernel, result in kernels.items()
        for reason in result["broken"]
    ]
    for failure in failures:
        print(f"broken bound: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
