"""setup.py: what it builds with which tools at hand, what it says, and what a source archive and a wheel hold."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detcore.device import native
from tests import emulation

ROOT = Path(__file__).parents[1]
PROGRAMS = emulation.programs()
CLASS_LIST = "dataprep/openimages_mlperf_classes.txt"


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup.py as a module on a machine with a C++ compiler and no CUDA; it works on a copy of the sources."""
    for name in PROGRAMS:
        shutil.copytree(ROOT / name / "csrc", tmp_path / "src" / name / "csrc")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "KERNELS", "CXX"):
        monkeypatch.setenv(name, "")  # so that what setup.py sets is undone after the test
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    script(tmp_path / "bin" / "g++", "echo g++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    spec = importlib.util.spec_from_file_location("setup_of_the_project", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path / "src")
    monkeypatch.setattr(module, "sys", SimpleNamespace(path=[], argv=["setup.py", "build_ext", "--inplace"]))
    module.said = []
    monkeypatch.setattr(module, "say", module.said.append)
    monkeypatch.setattr(module, "Path", lambda *parts: tmp_path if parts == ("/usr/local/cuda",) else Path(*parts))
    return module


def script(file: Path, body: str) -> Path:
    """An executable shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def toolkit(home: Path, version: str = torch.version.cuda or "13.0", libraries: str = "lib64/libcudart.so") -> Path:
    """A folder that looks like CUDA; returns its nvcc."""
    for file in (home / "include" / "cuda_runtime.h", home / libraries):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return script(home / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.88'")


def sources(arguments: dict) -> set[str]:
    return {Path(source).suffix for extension in arguments["ext_modules"] for source in extension.sources}


def test_without_a_compiler_nothing_is_built(setup, monkeypatch):
    monkeypatch.setenv("CXX", "clang++-99 -stdlib=libc++")
    assert setup.extensions() == {}
    assert "no C++ compiler (clang++-99), so no kernels are built" in setup.said[-1]


def test_without_torch_nothing_is_built(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup.extensions() == {}
    assert "torch can't be imported here" in setup.said[-1]


def test_without_nvcc_the_cpu_code_is_built(setup):
    arguments = setup.extensions()
    assert [extension.name for extension in arguments["ext_modules"]] == [f"{p}._kernels" for p in PROGRAMS]
    assert sources(arguments) == {".cpp"}
    assert "no nvcc" in (told := setup.said[-1]) and "only the CPU code is built" in told


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
@pytest.mark.parametrize("place", ["CUDA_HOME", "CUDA_PATH", "PATH", "wheels"])
def test_nvcc_is_found(setup, monkeypatch, tmp_path, place):
    home = tmp_path / ("site/nvidia/cu13" if place == "wheels" else "toolkit")
    nvcc = toolkit(home)
    if place == "wheels":
        setup.sys.path.append(str(tmp_path / "site"))
    else:
        value = f"{home / 'bin'}:{os.environ['PATH']}" if place == "PATH" else str(home)
        monkeypatch.setenv(place, value)
    arguments = setup.extensions()
    assert sources(arguments) == {".cpp", ".cu"} and os.environ["CUDA_HOME"] == str(home)
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == setup.ARCHITECTURES
    assert f"{nvcc} (CUDA {torch.version.cuda}), for 8.0;9.0;10.0+PTX" in setup.said[-1]
    for extension in arguments["ext_modules"]:
        assert "-Werror=all-warnings" in extension.extra_compile_args["nvcc"]
        assert "-Werror" in extension.extra_compile_args["cxx"]


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_the_chosen_architectures_are_kept(setup, monkeypatch, tmp_path):
    toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    setup.extensions()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a" and "for 9.0a" in setup.said[-1]


@pytest.mark.parametrize(
    ("version", "torch_cuda", "message"),
    [
        ("11.8", "13.0", "is CUDA 11.8, but torch wants 13.0 (set CUDA_HOME): only the CPU code"),
        ("", "13.0", "is CUDA unknown, but torch wants 13.0"),
        ("13.0", None, "this torch has no CUDA: only the CPU code"),
    ],
)
def test_an_nvcc_that_does_not_fit_is_left_alone(setup, monkeypatch, tmp_path, version, torch_cuda, message):
    toolkit(tmp_path / "toolkit", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert sources(setup.extensions()) == {".cpp"}
    assert message in setup.said[-1]


def test_kernels_cpu_leaves_nvcc_alone(setup, monkeypatch, tmp_path):
    toolkit(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv("KERNELS", "cpu")
    assert sources(setup.extensions()) == {".cpp"}
    assert "KERNELS=cpu: only the CPU code" in setup.said[-1]


@pytest.fixture
def in_place(setup, monkeypatch) -> list[Path]:
    """KERNELS=cpu python setup.py build_ext --inplace, where the first library is the CPU's, the others have CUDA."""
    monkeypatch.setenv("KERNELS", "cpu")
    setup.sys.argv = ["setup.py", "build_ext", "--inplace"]
    monkeypatch.setattr(setup, "loads", lambda program: True)
    libraries = [setup.ROOT / program / "_kernels.so" for program in PROGRAMS]
    for i, library in enumerate(libraries):
        library.write_bytes(b"\x7fELF .nv_fatbin" if i else b"\x7fELF")
    (setup.ROOT / "setup.py").touch()
    os.utime(setup.ROOT / "setup.py", (0, 0))
    return libraries


def built(setup) -> list[str]:
    return [extension.name.removesuffix("._kernels") for extension in setup.extensions()["ext_modules"]]


def test_kernels_cpu_leaves_a_current_library_with_cuda_code_alone(setup, in_place):
    assert built(setup) == PROGRAMS[:1]
    assert f"KERNELS=cpu: {PROGRAMS[1]}/_kernels.so is current and has code for GPUs too: left as it is" in setup.said
    os.utime(setup.ROOT / PROGRAMS[2] / "csrc", (0, 0))
    in_place[0].write_bytes(in_place[1].read_bytes())
    assert built(setup) == []


def test_kernels_cpu_replaces_what_is_old_or_can_not_be_loaded(setup, in_place, monkeypatch):
    os.utime(in_place[1], (0, 0))
    assert built(setup) == PROGRAMS[:2]
    monkeypatch.setattr(setup, "loads", lambda program: False)
    assert built(setup) == PROGRAMS


def test_only_kernels_cpu_in_place_keeps_libraries(setup, in_place, monkeypatch):
    setup.sys.argv = ["setup.py", "bdist_wheel"]
    assert built(setup) == PROGRAMS, "a wheel holds every library"
    setup.sys.argv = ["setup.py", "build_ext", "--inplace"]
    monkeypatch.delenv("KERNELS")
    assert built(setup) == PROGRAMS


def test_whether_a_library_can_be_loaded_is_asked_elsewhere(setup, monkeypatch):
    monkeypatch.setattr(setup, "ROOT", ROOT)
    setup.sys.executable = sys.executable
    assert setup.loads("detcore") == (not native.load("detcore")) and not setup.loads("no_such_program")


def test_a_toolkit_without_headers_is_none(setup, monkeypatch, tmp_path):
    nvcc = toolkit(tmp_path / "toolkit")
    (tmp_path / "toolkit/include/cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(nvcc.parents[1]))
    assert setup.find_nvcc() is None


def test_the_runtime_of_wheels_gets_the_name_that_the_linker_wants(setup, tmp_path):
    assert setup.cuda_libraries(toolkit(tmp_path / "toolkit")) == []
    nvcc = toolkit(tmp_path / "wheels", libraries="lib/libcudart.so.13")
    for _ in range(2):  # a link of an earlier build is replaced
        (folder,) = setup.cuda_libraries(nvcc)
        assert (Path(folder) / "libcudart.so").resolve() == tmp_path / "wheels/lib/libcudart.so.13"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what is in the repository, with nothing built."""
    leave = shutil.ignore_patterns(".*", "build", "results", "tests", "docs", "__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=leave)
    return tmp_path / "checkout"


def run(checkout: Path, *argv: str) -> None:
    done = subprocess.run(
        [sys.executable, *argv], cwd=checkout, text=True, capture_output=True, env=os.environ | {"KERNELS": "cpu"}
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_source_archive_holds_every_source(checkout, tmp_path):
    run(checkout, "setup.py", "-q", "sdist", "-d", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {path.relative_to(ROOT).as_posix() for p in PROGRAMS for path in (ROOT / p / "csrc").iterdir()}
    assert wanted | {"setup.py", "detcore/ops/normalize.py", CLASS_LIST} <= names


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_does_not_take_a_failed_build_for_done(checkout):
    """It tries again the next time; `make ops` fails."""
    (checkout / ".venv").symlink_to(sys.prefix)

    def make(target: str) -> subprocess.CompletedProcess:
        command = ["make", "-o", ".venv/.ready", target]
        environment = os.environ | {"CXX": "no-such-compiler"}
        return subprocess.run(command, cwd=checkout, text=True, capture_output=True, env=environment)

    for _ in range(2):
        done = make("build/.kernels")
        assert done.returncode == 0 and "make: no C++ compiler (no-such-compiler)" in done.stdout
        assert "the PyTorch references run instead" in done.stderr
        assert not (checkout / "build/.kernels").exists()
    for line in (checkout / "Makefile").read_text().splitlines():
        assert not line.startswith("KERNELS"), "make would pass its own value on, instead of the user's KERNELS=cpu"
    done = make("ops")
    assert done.returncode and "no C++ compiler (no-such-compiler)" in done.stdout
    assert "make: the kernels were not built" in done.stderr and not (checkout / "build/.kernels").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_a_wheel_holds_the_libraries_and_they_load(checkout, tmp_path):
    run(
        checkout,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(tmp_path),
        ".",
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert {*(f"{program}/_kernels.so" for program in PROGRAMS), CLASS_LIST} <= set(opened.namelist())
        opened.extractall(tmp_path / "installed")
    test = f"from detcore.device import native; print([native.load(program) for program in {PROGRAMS}])"
    installed = {"cwd": tmp_path / "installed", "env": os.environ | {"PYTHONPATH": "."}}
    done = subprocess.run([sys.executable, "-c", test], text=True, capture_output=True, check=True, **installed)
    assert done.stdout.strip() == str([""] * len(PROGRAMS)), done.stderr
