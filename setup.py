"""The build of the native extension; pyproject.toml has all the rest. Whatever fails here, the install succeeds.

What failed is written to elle_fast/_build_failure.txt, which `elle-fast info` shows. Variables: ELLE_FAST_NATIVE=0 (no
extension) or 1 (a build that fails is an error), ELLE_FAST_CUDA=0|1|"8.0;9.0" (CUDA kernels for no architecture, for
all, for these; by default for the GPUs that are here), TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CXXFLAGS, LDFLAGS.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import setuptools
from setuptools.command.build_ext import build_ext

BINDINGS = [f"csrc/bindings/{name}.cpp" for name in ("module", "dispatch", "pack_points", "elle_loss")]
ONCE = [*BINDINGS, "csrc/cpu/parallel.cpp"]
PER_ISA = ["csrc/cpu/pack_points.cpp", "csrc/cpu/elle_loss.cpp"]
CUDA = ["csrc/cuda/pack_points.cu", "csrc/cuda/elle_loss.cu"]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
X86 = {"avx512": AVX512, "avx2": "-mavx2 -mfma -mf16c"}
# Over Python's own. Without contraction to fused multiply-adds the points are the reference's to the bit.
FLAGS = "-std=c++17 -O3 -g0 -fno-wrapv -fPIC -fvisibility=hidden -Wall -Wextra"
FLAGS += " -fno-math-errno -fno-trapping-math -ffp-contract=off"
# Nothing but the module's entry: the templates of the standard library would come out too, and meet those of others.
EXPORTS = "-Wl,-exported_symbol,_PyInit__C" if sys.platform == "darwin" else "-Wl,--version-script=csrc/exports"
LAST_LINES = 15  # of what a compiler that fails says
NVCC_FLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0"  # the last one that nvcc knows also as PTX, for those to come
NO_NVCC = "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
HOW = "ELLE_FAST_CUDA=0 builds no CUDA kernels, 1 those of all architectures (minutes), '8.0;9.0' those of some"


class BuildExtension(build_ext):  # type: ignore[misc]
    """A command for each source and instruction set: setuptools has the same flags for all."""

    compiler: Any
    inplace: Any

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # a temporary folder, which would leave nothing to the next build
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def run(self) -> None:
        asked, built, before = os.environ.get("ELLE_FAST_CUDA", ""), False, (self.compiler, self.inplace)
        nvcc = None if asked == "0" else find_nvcc()
        why = "ELLE_FAST_CUDA=0" if asked == "0" else NO_NVCC if nvcc is None else "nvidia-smi shows no GPU"
        failure = f"ELLE_FAST_CUDA={asked}, but there is {NO_NVCC}" if asked not in ("", "0") and nvcc is None else ""
        for self.nvcc in [nvcc, None] if nvcc else [None]:
            try:
                self.architectures = cuda_architectures(self.nvcc, asked) if self.nvcc else []
                cuda = " ".join(self.architectures) or f"none ({why})"
                print(f"elle_fast: building CPU kernels; CUDA kernels: {cuda}. {HOW}", flush=True)
                super().run()
                built = True
                break
            except Exception as error:
                (self.compiler, self.inplace), failure, why = before, str(error) or repr(error), "their build failed"
        library = Path(self.get_ext_fullpath("elle_fast._C"))
        record = library.with_name("_build_failure.txt")
        for stale in [record] if built else [record, library]:
            stale.unlink(missing_ok=True)
        if failure and os.environ.get("ELLE_FAST_NATIVE") == "1":
            raise RuntimeError(f"ELLE_FAST_NATIVE=1, and the build failed: {failure}")
        if failure:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(failure + "\n", encoding="utf-8")
            self.warn(f"built without {'CUDA' if built else 'the extension'}: {failure}")

    def build_extension(self, ext: Any) -> None:
        import pybind11  # here, as an sdist needs none

        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("MSVC lacks the vector extensions of GCC and Clang")
        edges: dict[str, tuple[str, list[str]]] = {}

        def add(source: str, command: list[str], suffix: str = ".o") -> None:
            made = f"{Path(self.build_temp).as_posix()}/{source.replace('/', '_')}{suffix}"
            edges[made] = (source, [*command, "-MD", "-MF", made + ".d", "-c", source, "-o", made])

        includes = [f"-I{path}" for path in [pybind11.get_include(), *self.include_dirs]]
        defines = [*includes, f'-DELLE_VERSION="{self.distribution.get_version()}"']
        isas, libraries = {"baseline": ""}, []
        if self.plat_name.endswith(("x86_64", "amd64")):
            isas, defines = {**X86, **isas}, [*defines, "-DELLE_X86"]
        if self.nvcc and self.architectures:
            libraries = cuda_libraries(self.nvcc)
            defines += ["-DELLE_CUDA", f'-DELLE_CUDA_ARCHITECTURES="{" ".join(self.architectures)}"']
            for source in CUDA:
                add(source, nvcc_command(self.nvcc, self.architectures))
        once = ".cuda.o" if self.architectures else ".o"  # both are kept, as a build that fails goes on without CUDA
        cpp, own = [*self.compiler.compiler_so_cxx, *FLAGS.split()], shlex.split(os.environ.get("CXXFLAGS", ""))
        for source in ONCE:
            add(source, [*cpp, *defines, *own], once)
        for isa, flags in isas.items():
            for source in PER_ISA:
                add(source, [*cpp, *flags.split(), f"-DELLE_ISA={isa}", *own], f".{isa}.o")
        compile_all(self.build_temp, edges)
        cxx, linker = shlex.split(os.environ.get("CXX", "")), self.compiler.linker_so_cxx
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        run([*(cxx or linker[:1]), *linker[1:], *edges, EXPORTS, *libraries, "-o", str(library)])


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


def cuda_architectures(nvcc: str, asked: str) -> list[str]:
    """Those asked for in ELLE_FAST_CUDA or TORCH_CUDA_ARCH_LIST, such as ``["8.0", "9.0+PTX"]``; else the GPUs' own."""
    given = asked if asked not in ("", "1") else os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if architectures := re.findall(r"[^;,\s]+", given):
        if not all(re.fullmatch(r"\d+\.?\d[af]?(\+PTX)?", arch) for arch in architectures):
            raise ValueError(f"ELLE_FAST_CUDA: expected 0, 1 or architectures such as '8.0;9.0', got {given!r}")
        return architectures
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)$", said, re.MULTILINE))
    if asked == "1":
        usable = [arch for arch in ARCHITECTURES.split() if int(arch.replace(".", "")) in known]
        return [*usable[:-1], usable[-1] + "+PTX"]
    # A GPU newer than nvcc gets PTX of the newest one that nvcc knows, which the driver compiles.
    wanted = {min((int(gpu.replace(".", "")), ""), (known[-1], "+PTX")) for gpu in compute_capabilities()}
    return [f"{number // 10}.{number % 10}{ptx}" for number, ptx in sorted(wanted)]


def compute_capabilities() -> list[str]:
    """Of each GPU, as nvidia-smi says: ``9.0``. torch, which could tell too, is not there in an isolated build."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\d+\.\d$", said, re.MULTILINE)


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


if __name__ == "__main__":
    native = [setuptools.Extension("elle_fast._C", [*ONCE, *PER_ISA], optional=True)]
    unwanted = os.environ.get("ELLE_FAST_NATIVE") == "0"
    setuptools.setup(ext_modules=[] if unwanted else native, cmdclass={"build_ext": BuildExtension})
