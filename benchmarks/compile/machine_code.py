"""Machine code as Triton and cuobjdump print it: instructions with their kind and width, and what a kernel takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

# What a kernel should have none of, by the names of its resources.
SPILLS = ("stack", "local", "vector_spills", "scalar_spills", "spill_instructions")


class Step(NamedTuple):
    """One instruction."""

    opcode: str
    kind: str  # load and store (of global memory), local, integer, float or other
    width: int  # bits of a load or store, else 0
    loops: tuple[int, ...]  # the loops it is in, outermost first, each by where it begins


def accesses(code: list[Step]) -> dict[str, dict[int, int]]:
    """How many loads and stores of global memory there are of each width in bits."""
    kinds = {"loads": "load", "stores": "store"}
    return {
        name: dict(sorted(Counter(step.width for step in code if step.kind == kind).items()))
        for name, kind in kinds.items()
    }


def wide(widths: Mapping[int, int]) -> int:
    """The 16-byte pieces; where the compiler makes one access of two, of 32 bytes, it counts twice."""
    return sum(count * (width // 128) for width, count in widths.items())


def narrow(widths: Mapping[int, int]) -> int:
    """The accesses of less than 16 bytes."""
    return sum(count for width, count in widths.items() if width < 128)


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
