"""What setup.py needs of the compilers: running them, several at a time and only for what has changed, and nvcc."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Nothing but the module's entry: the templates of the standard library would come out too, and meet those of others.
EXPORTS = "-Wl,-exported_symbol,_PyInit__C" if sys.platform == "darwin" else "-Wl,--version-script=csrc/exports"
LAST_LINES = 15  # of what a compiler that fails says
NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0"  # the last one that nvcc knows also as PTX, for those to come


def run(command: list[str]) -> None:
    """Run a command; RuntimeError with the command that failed, perhaps one of ninja's, and its last lines."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, end="")
    if done.returncode:
        # Ninja writes "FAILED: <target>", on the next lines the command and what it said, then how others went on.
        failed = re.search(r"^FAILED: .*\n(.*)\n((?s:.*?))^(?:\[\d+/|FAILED: |ninja: )", done.stdout, re.MULTILINE)
        line, said = failed.groups() if failed else (shlex.join(command), done.stdout)
        raise RuntimeError("\n".join([line, *said.splitlines()[-LAST_LINES:]]))


def compile_all(folder: str, edges: dict[str, tuple[str, list[str]]]) -> None:
    """Run the commands of edges, ``{object: (source, command)}``, whose headers are listed in ``<object>.d``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, [command for _, command in edges.values()]))
        return
    escape = str.maketrans({"$": "$$", " ": "$ ", ":": "$:"})
    lines = [f"builddir = {folder}", "rule compile", " command = $line", " description = compiling $out"]
    lines += [" depfile = $out.d", " deps = gcc"]
    for target, (source, command) in edges.items():
        lines += [f"build {target.translate(escape)}: compile {source}"]
        lines += [" line = " + shlex.join(command).replace("$", "$$")]
    Path(folder, "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run([ninja, "-f", f"{folder}/build.ninja"])


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, else of PATH, else of /usr/local/cuda."""
    for home in filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]):
        if nvcc := shutil.which("nvcc", path=Path(home, "bin")):
            return nvcc
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_architectures(nvcc: str) -> list[str]:
    """As TORCH_CUDA_ARCH_LIST says, such as ``["8.0", "9.0+PTX"]``; else the usual ones that nvcc knows."""
    if given := os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split():
        return given
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    usable = [arch for arch in ARCHITECTURES.split() if "compute_" + arch.replace(".", "") in known]
    return [*usable[:-1], usable[-1] + "+PTX"]


def nvcc_command(nvcc: str, architectures: list[str]) -> list[str]:
    """nvcc with all its flags but the files."""
    command = [nvcc, *NVCC_FLAGS.split()]
    if "CXX" in os.environ:
        compiler = [word for word in shlex.split(os.environ["CXX"]) if not word.startswith("-")]
        command += ["-ccbin", compiler[-1]]
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        ptx = f",compute_{number}" if arch.endswith("+PTX") else ""
        command.append(f"-gencode=arch=compute_{number},code=[sm_{number}{ptx}]")
    return command


def cuda_libraries(nvcc: str) -> list[str]:
    """What links the CUDA runtime in, so that no version of it has to be installed."""
    # Asked, not guessed from nvcc's own path, which may be a link or a script elsewhere.
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    folders = dict.fromkeys(re.findall(r'-L[^\s"]+', plan))
    return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
