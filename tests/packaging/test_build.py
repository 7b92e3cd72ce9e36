"""The build: sdist and wheel, with and without a compiler, and what the extension needs of the system it is put on.

Everything is built offline in copies of the checkout, and installed into folders of its source.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What a checkout has and a copy of it needs.
PARTS = ("csrc", "elle_fast", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no compiler")


def python(*arguments: object, cwd: Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run Python; a variable that is None is taken away."""
    # Without optimisation, as nothing here asks how fast the kernels are: for nvcc a fifth of the time.
    fixed = {"ELLE_FAST_CUDA": "0", "CXXFLAGS": "-O0", "NVCC_APPEND_FLAGS": "-Xcicc -O0 -Xptxas -O0"}
    fixed |= {"PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    environment = {**os.environ, **fixed, **variables}
    for name in ("ELLE_FAST_NATIVE", "ELLE_FAST_ISA", "ELLE_FAST_EXTENSION", "TRITON_INTERPRET"):
        if name not in variables:
            environment[name] = None
    kept = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True)


def succeeds(*arguments: object, cwd: Path, **variables: str | None) -> str:
    done = python(*arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def copy_of_the_checkout(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "_build_failure.txt", "__pycache__")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignore)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / part)
    return folder


def only(files: Iterable[Path]) -> Path:
    (file,) = files
    return file


def wheel_of(source: Path, out: Path, **variables: str | None) -> Path:
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-deps", "--no-build-isolation")
    succeeds(*pip, "--wheel-dir", out, source, cwd=source.parent, **variables)
    return only(out.glob("*.whl"))


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def info(installed: Path, **variables: str | None) -> str:
    return succeeds("-m", "elle_fast", "info", cwd=installed, PYTHONPATH=str(installed), **variables)


def extension_in(folder: Path) -> Path:
    return only((folder / "elle_fast").glob("_C.*.so"))


class Built(NamedTuple):
    sdist: Path
    source: Path  # the sdist, unpacked: all that the builds here have
    wheel: Path
    installed: Path


def build_in(folder: Path) -> None:
    checkout = copy_of_the_checkout(folder / "checkout")
    (checkout / "elle_fast" / "_C.cpython-0.so").write_bytes(b"left by an editable install")
    (checkout / "elle_fast" / "_build_failure.txt").write_text("left by an editable install")
    succeeds("setup.py", "-q", "sdist", "--dist-dir", folder / "sdist", cwd=checkout)
    with tarfile.open(only((folder / "sdist").glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    wheel = wheel_of(only((folder / "unpacked").iterdir()), folder / "wheel")
    unpacked(wheel, folder / "installed")


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Built:
    """Built once, by whichever of pytest-xdist's processes comes first."""
    folder: Path = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "built").exists():
            build_in(folder / "building")
            (folder / "building").rename(folder / "built")
    folder = folder / "built"
    sdist, source = only((folder / "sdist").iterdir()), only((folder / "unpacked").iterdir())
    return Built(sdist, source, only((folder / "wheel").iterdir()), folder / "installed")


@pytest.fixture
def sdist(built) -> Path:
    return Path(built.sdist)


@pytest.fixture
def wheel(built) -> Path:
    return Path(built.wheel)


@pytest.fixture
def installed(built) -> Path:
    return Path(built.installed)


@pytest.fixture
def source(built, tmp_path) -> Path:
    """A copy with what was compiled, for a test to change."""
    return Path(shutil.copytree(built.source, tmp_path / "source"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_sdist_has_the_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    checked_in = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert checked_in
    assert checked_in <= names
    assert {"setup.py", "pyproject.toml", "elle_fast/_C.pyi", "elle_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_failure.txt"))]


@needs_compiler
def test_a_wheel_from_the_sdist_alone(wheel, tmp_path):
    names = contents(wheel)
    assert {"elle_fast/_C.pyi", "elle_fast/py.typed"} <= names
    assert not [name for name in names if name.startswith("csrc") or name.endswith("_build_failure.txt")]
    assert len([name for name in names if name.endswith(".so")]) == 1
    # In an environment that holds the wheel and, by way of the path, torch.
    environment = tmp_path / "environment"
    succeeds("-m", "venv", "--without-pip", environment, cwd=tmp_path)
    inside = environment / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "--python", inside, "install", "-q", "--no-deps", wheel)
    succeeds(*pip, cwd=tmp_path)
    script = (
        "import sys, elle_fast; from elle_fast.backends import extension\n"
        "assert elle_fast.__file__.startswith(sys.prefix), elle_fast.__file__\n"
        "print(extension.cpp_why_not(), extension.load().isa())"
    )
    torch_at = str(Path(importlib.util.find_spec("torch").origin).parents[1])  # type: ignore[union-attr, arg-type]
    # Last on the path: an elle_fast there would come after the wheel's.
    script = f"import sys; sys.path.append({torch_at!r})\n{script}"
    done = subprocess.run([inside, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("None "), done.stderr


@needs_compiler
def test_info_names_compiler_and_instruction_set(installed):
    said = info(installed)
    assert re.search(r"^extension +\d+\.\d+.*, (GCC|Clang) .* for .*baseline$", said, re.MULTILINE), said
    assert re.search(r"^extension isa +(avx512|avx2|baseline)$", said, re.MULTILINE), said
    assert re.search(r"^extension cuda +the extension was built without CUDA; ", said, re.MULTILINE), said


MANYLINUX_LIBRARIES = re.compile(r"lib(c|m|dl|pthread|rt)\.so\.\d+|libstdc\+\+\.so\.6|libgcc_s\.so\.1|ld-linux.*")
# Tag: the newest symbols that it allows (PEP 600 and auditwheel's policies).
MANYLINUX = {
    "manylinux_2_28": {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0)},
    "manylinux_2_34": {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11, 0)},
    "manylinux_2_39": {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0)},
}


def manylinux_tag(symbols: str) -> str | None:
    """The oldest tag whose systems have every symbol that objdump lists."""
    newest: dict[str, tuple[int, ...]] = {}
    for name, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_(\d+(?:\.\d+)+)", symbols):
        newest[name] = max(newest.get(name, ()), tuple(map(int, number.split("."))))
    return next((tag for tag, has in MANYLINUX.items() if all(has[name] >= newest[name] for name in newest)), None)


def test_the_tag_is_that_of_the_newest_symbol():
    assert manylinux_tag("GLIBC_2.2.5 GLIBC_2.28 GLIBCXX_3.4.9") == "manylinux_2_28"
    assert manylinux_tag("GLIBC_2.2.5 GLIBC_2.28 GLIBCXX_3.4.26") == "manylinux_2_34"
    assert manylinux_tag("GLIBC_2.40") is None


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("objdump") is None, reason="needs objdump and ELF")
def test_dynamic_symbols(installed, record_property):
    file = extension_in(installed)

    def objdump(option: str) -> str:
        return subprocess.run(["objdump", option, file], capture_output=True, text=True, check=True).stdout

    libraries = re.findall(r"^ +NEEDED +(\S+)", objdump("-p"), re.MULTILINE)
    assert libraries
    assert all(MANYLINUX_LIBRARIES.fullmatch(name) for name in libraries), libraries
    assert "RUNPATH" not in objdump("-p")
    assert "RPATH" not in objdump("-p")
    symbols = objdump("-T").splitlines()
    exported = [line.split()[-1] for line in symbols if re.match(r"[0-9a-f]{8}", line) and "*UND*" not in line]
    assert exported == ["PyInit__C"]
    tag = manylinux_tag("\n".join(symbols))
    record_property("manylinux", tag)
    assert tag is not None, "newer than every tag known here"


@needs_compiler
def test_only_what_changed_is_compiled_again(source):
    ninja = shutil.which("ninja") or shutil.which("ninja", path=Path(sys.executable).parent)
    if ninja is None:
        pytest.skip("there is no ninja")
    (plan,) = source.glob("build/temp.*/build.ninja")

    def to_do():
        command = [ninja, "-n", "-f", plan.relative_to(source)]
        return subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout

    assert "no work to do" in to_do()
    header = source / "csrc" / "cpu" / "parallel.h"
    header.write_text(header.read_text() + "// changed\n")
    again = re.findall(r"compiling \S+/(\S+)\.o", to_do())
    assert "csrc_cpu_parallel.cpp" in again
    assert "csrc_bindings_dispatch.cpp" not in again


def test_a_compiler_that_fails(source, tmp_path):
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nfor i in $(seq 30); do echo "complaint $i about $0"; done >&2\nexit 1\n')
    script.chmod(0o755)
    broken = wheel_of(source, tmp_path / "wheel", CXX=str(script))
    names = contents(broken)
    assert "elle_fast/_build_failure.txt" in names
    assert not [name for name in names if name.endswith(".so")]
    installed = unpacked(broken, tmp_path / "installed")
    lines = (installed / "elle_fast" / "_build_failure.txt").read_text().splitlines()
    # The command, then the last of what it said.
    assert lines[0].startswith(str(script))
    assert " -c csrc/" in lines[0]
    assert lines[1:] == [f"complaint {i} about {script}" for i in range(16, 31)]
    said = info(installed)
    assert "extension            not available: the extension is not built; with g++ or clang++ in place" in said
    assert f"complaint 30 about {script}\n" in said


@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler"])
@pytest.mark.parametrize("ninja", [True, False])
def test_no_compiler_in_place(source, tmp_path, compiler, ninja):
    out = tmp_path / "lib"
    stale = out / "elle_fast" / ("_C" + EXTENSION_SUFFIXES[0])
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an older build")
    hidden = "" if ninja else "import shutil; shutil.which = lambda name, **more: None; "
    script = f"{hidden}import runpy, sys; sys.argv[:] = ['setup.py', 'build_ext', '--build-lib', {str(out)!r}]"
    succeeds("-c", f"{script}; runpy.run_path('setup.py', run_name='__main__')", cwd=source, CXX=compiler)
    record = (out / "elle_fast" / "_build_failure.txt").read_text()
    assert compiler in record
    assert not stale.exists()


@needs_compiler
def test_an_editable_install_that_fails_and_is_put_right(source, tmp_path):
    target = tmp_path / "target"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-build-isolation")
    install = (*pip, "--target", target, "--upgrade", "--editable", source)
    record = source / "elle_fast" / "_build_failure.txt"
    succeeds(*install, cwd=tmp_path, CXX="/bin/false")
    assert record.exists()
    assert not list((source / "elle_fast").glob("_C.*.so"))
    succeeds(*install, cwd=tmp_path)
    assert not record.exists()
    assert extension_in(source).exists()


def test_without_the_extension(source, tmp_path):
    pure = wheel_of(source, tmp_path / "wheel", ELLE_FAST_NATIVE="0", CXX="/bin/false")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(pure) if name.endswith((".so", "_build_failure.txt"))]


def test_a_build_that_fails_is_an_error_where_that_is_asked_for(source, tmp_path):
    build = ("setup.py", "build_ext", "--build-lib", tmp_path / "lib")
    done = python(*build, cwd=source, ELLE_FAST_NATIVE="1", CXX="/bin/false")
    assert done.returncode != 0
    assert "RuntimeError: ELLE_FAST_NATIVE=1, and the build failed: " in done.stderr
    assert not (tmp_path / "lib").exists()


@needs_compiler
def test_cuda_without_nvcc(source, tmp_path):
    setup = source / "setup.py"
    without = 'def find_nvcc():\n    return None\n\n\nif __name__ == "__main__":\n'
    setup.write_text(setup.read_text().replace('if __name__ == "__main__":\n', without))
    out = tmp_path / "lib"
    succeeds("setup.py", "build_ext", "--build-lib", out, cwd=source, ELLE_FAST_CUDA="1")
    assert extension_in(out).exists()
    record = (out / "elle_fast" / "_build_failure.txt").read_text()
    assert record.startswith("ELLE_FAST_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")


def with_nvidia_smi(folder: Path, script: str) -> str:
    """PATH with an nvidia-smi in front."""
    file = folder / "bin" / "nvidia-smi"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return f"{file.parent}{os.pathsep}{os.environ['PATH']}"


@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_no_cuda_without_a_gpu(source, tmp_path):
    out, path = tmp_path / "lib", with_nvidia_smi(tmp_path, "exit 9")
    build = ("setup.py", "build_ext", "--build-lib", out)
    said = succeeds(*build, cwd=source, ELLE_FAST_CUDA=None, TORCH_CUDA_ARCH_LIST=None, PATH=path)
    assert "elle_fast: building CPU kernels; CUDA kernels: none (nvidia-smi shows no GPU). ELLE_FAST_CUDA=0 " in said
    assert said.count("elle_fast: building") == 1
    assert "csrc/cuda" not in said
    assert extension_in(out).exists()
    assert not (out / "elle_fast" / "_build_failure.txt").exists()


@pytest.mark.long
@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_cuda_that_fails_leaves_the_cpu(source, tmp_path):
    out = tmp_path / "lib"
    build = ("setup.py", "build_ext", "--build-lib", out)
    said = succeeds(*build, cwd=source, ELLE_FAST_CUDA="1.0")
    assert "; CUDA kernels: 1.0. " in said
    assert "; CUDA kernels: none (their build failed). " in said
    assert extension_in(out).exists()
    record = (out / "elle_fast" / "_build_failure.txt").read_text()
    assert "compute_10" in record
    assert "Unsupported gpu architecture" in record


LAUNCH = """
from elle_fast import _C
print(_C.cuda_built(), _C.facts()["cuda"])
options = dict.fromkeys(("batch", "part", "channels", "plane", "triplets"), 1)
options |= dict.fromkeys(("sample_offset", "norm", "points", "alpha", "x_type", "given_type", "points_type"), 0)
options |= dict.fromkeys(("clamp", "start", "project", "normalize", "x_last", "given_last", "points_last"), False)
options |= {"eps": 0.1, "step_size": 0.1, "radius": 0.0, "low": 0.0, "high": 1.0, "adv": 1}
try:
    _C.Pack(**options).pack("cuda", 8, 8, 8, 8, 0, 8, 8, 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.long
@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_cuda_for_the_gpus_that_are_there(source, tmp_path):
    out = tmp_path / "installed"
    build = ("setup.py", "build_ext", "--build-lib", out)
    path = with_nvidia_smi(tmp_path, "printf '9.0\\n9.0\\n'")
    said = succeeds(*build, cwd=source, ELLE_FAST_CUDA=None, TORCH_CUDA_ARCH_LIST=None, PATH=path)
    assert "elle_fast: building CPU kernels; CUDA kernels: 9.0. ELLE_FAST_CUDA=0 " in said
    assert not (out / "elle_fast" / "_build_failure.txt").exists()
    shutil.copytree(source / "elle_fast", out / "elle_fast", dirs_exist_ok=True)
    # No device is visible: the launch comes back with CUDA's error, whatever the machine has.
    launched = succeeds("-c", LAUNCH, cwd=out, PYTHONPATH=str(out), CUDA_VISIBLE_DEVICES="").splitlines()
    assert launched[0] == "True 9.0"
    assert launched[1].startswith("CUDA: ")


def test_setup_is_short():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 200


def test_the_oldest_torch_tested_is_the_one_declared():
    declared = re.search(r'^dependencies = \["torch>=([\d.]+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    tested = re.search(r"^torch==([\d.]+)$", (ROOT / "requirements-oldest.txt").read_text(), re.MULTILINE)
    assert declared is not None
    assert tested is not None
    assert tested[1] == declared[1] + ".0"
