"""The build of the native extension; pyproject.toml has all the rest. Whatever fails here, the install succeeds.

What failed is written to elle_fast/_build_failure.txt, which `elle-fast info` shows. Variables: ELLE_FAST_NATIVE=0 (no
extension), ELLE_FAST_CUDA=0|1 (default: if nvcc is found), TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX, CXXFLAGS, LDFLAGS.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))

from csrc.compilation import EXPORTS, compile_all, cuda_architectures, cuda_libraries, find_nvcc, nvcc_command, run

ONCE = ["csrc/module.cpp", "csrc/cpu/parallel.cpp", "csrc/cpu/dispatch.cpp"]
PER_ISA = ["csrc/cpu/pack_points.cpp", "csrc/cpu/elle_loss.cpp"]
CUDA = ["csrc/cuda/pack_points.cu", "csrc/cuda/elle_loss.cu"]
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
X86 = {"avx512": AVX512, "avx2": "-mavx2 -mfma -mf16c"}
# Over Python's own. Without contraction to fused multiply-adds the points are the reference's to the bit.
FLAGS = "-std=c++17 -O3 -g0 -fno-wrapv -fPIC -fvisibility=hidden -Wall -Wextra"
FLAGS += " -fno-math-errno -fno-trapping-math -ffp-contract=off"


class BuildExtension(build_ext):  # type: ignore[misc]
    """A command for each source and instruction set: setuptools has the same flags for all."""

    compiler: Any
    inplace: Any

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # a temporary folder, which would leave nothing to the next build
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def run(self) -> None:
        asked, built, failure = os.environ.get("ELLE_FAST_CUDA"), False, ""
        before = self.compiler, self.inplace
        nvcc = None if asked == "0" else find_nvcc()
        if asked == "1" and nvcc is None:
            failure = "ELLE_FAST_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
        for self.nvcc in [nvcc, None] if nvcc else [None]:
            try:
                super().run()
                built = True
                break
            except Exception as error:
                (self.compiler, self.inplace), failure = before, str(error) or repr(error)
        library = Path(self.get_ext_fullpath("elle_fast._C"))
        record = library.with_name("_build_failure.txt")
        for stale in [record] if built else [record, library]:
            stale.unlink(missing_ok=True)
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
        if self.nvcc:
            architectures, libraries = cuda_architectures(self.nvcc), cuda_libraries(self.nvcc)
            defines += ["-DELLE_CUDA", f'-DELLE_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
            for source in CUDA:
                add(source, nvcc_command(self.nvcc, architectures))
        once = ".cuda.o" if self.nvcc else ".o"  # both are kept, as a build that fails with CUDA goes on without
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


NATIVE = [Extension("elle_fast._C", [*ONCE, *PER_ISA], optional=True)]
setup(ext_modules=[] if os.environ.get("ELLE_FAST_NATIVE") == "0" else NATIVE, cmdclass={"build_ext": BuildExtension})
