"""Builds each program's csrc/ into its _kernels.so: CUDA and CPU code where nvcc is there, else CPU code alone.

    make ops      the same as: python setup.py build_ext --inplace

TORCH_CUDA_ARCH_LIST chooses the GPUs as torch reads it; by default 8.0, 9.0, 10.0 and PTX of the last. CUDA_HOME
chooses the toolkit. KERNELS=cpu builds no CUDA code, and in place leaves a library alone that has some and is current:
machines with and without GPUs may share a checkout. A build serves torch 2.11 to 2.15 (stable ABI). Without a compiler,
or without torch, nothing is built, and build_ext itself fails: the programs then run their PyTorch references.

pip builds in an environment of its own, without torch: pip install --no-build-isolation . builds the kernels too.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
EXACT = "-ffp-contract=off"  # a * b + c is rounded twice everywhere, so that every processor gives the same
VECTORS = "-fno-trapping-math"  # GCC makes vector instructions of a division that is left out for some; same values


def say(message: str) -> None:
    print(f"setup.py: {message}", file=sys.stderr, flush=True)


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, /usr/local/cuda, PATH or the wheel nvidia-cuda-nvcc, if its toolkit is around it."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    homes += [Path("/usr/local/cuda"), *([Path(on_path).resolve().parents[1]] if on_path else [])]
    homes += [Path(p) / "nvidia" / "cu13" for p in sys.path]
    found = (home / "bin" / "nvcc" for home in homes if (home / "include" / "cuda_runtime.h").is_file())
    return next((nvcc for nvcc in found if nvcc.is_file()), None)


def cuda_version(nvcc: Path) -> str:
    """Such as 13.0; "unknown" if nvcc does not run."""
    try:
        told = subprocess.run([nvcc, "--version"], text=True, capture_output=True).stdout
    except OSError:
        told = ""
    release = re.search(r"release (\d+\.\d+)", told)
    return release[1] if release else "unknown"


def cuda_libraries(nvcc: Path) -> list[str]:
    """Folders where the linker finds -lcudart beyond those that torch names.

    Wheels have lib/libcudart.so.13 where toolkits have lib64/libcudart.so; the shorter name is made in build/.
    """
    home = nvcc.parents[1]
    versions = sorted(home.glob("lib/libcudart.so.*"))
    if (home / "lib64" / "libcudart.so").exists() or not versions:
        return []
    folder = ROOT / "build" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(versions[-1].resolve())
    return [str(folder)]


def extension(program: str, nvcc: Path | None):
    """The library of one program, from all of its csrc/."""
    from torch.utils import cpp_extension

    folder = ROOT / program / "csrc"
    sources = sorted(str(file.relative_to(ROOT)) for file in folder.glob("*.cpp"))
    common = ["-O3", f"-DOPS={program}", *STABLE_ABI]
    for path in cpp_extension.include_paths():
        common += ["-isystem", path]  # torch's own headers have warnings
    flags = {"cxx": [*common, "-fvisibility=hidden", EXACT, VECTORS, *WARNINGS]}
    kind = cpp_extension.CppExtension
    if nvcc:
        sources += sorted(str(file.relative_to(ROOT)) for file in folder.glob("*.cu"))
        host = ",".join(["-fvisibility=hidden", EXACT, *WARNINGS])
        nvcc_alone = ["--fmad=false", "--threads=2", "-Werror=all-warnings"]  # fmad: EXACT for GPUs
        flags["nvcc"] = ["-DUSE_CUDA", *common, *nvcc_alone, f"-Xcompiler={host}"]
        kind = cpp_extension.CUDAExtension
    return kind(
        f"{program}._kernels", sources, include_dirs=[str(ROOT / "detcore" / "csrc")], extra_compile_args=flags,
        library_dirs=cuda_libraries(nvcc) if nvcc else [], py_limited_api=True,
    )  # fmt: skip


def kept(program: str) -> bool:
    """Whether the library in the checkout has CUDA code, is younger than all it is made of, and can be loaded here."""
    library = ROOT / program / "_kernels.so"
    if not library.is_file() or b".nv_fatbin" not in library.read_bytes():
        return False
    made_of = [ROOT / "setup.py", *ROOT.glob("detcore/csrc/*"), *ROOT.glob(f"{program}/csrc/*")]
    return max(file.stat().st_mtime for file in made_of) <= library.stat().st_mtime and loads(program)


def loads(program: str) -> bool:
    """Whether the library in the checkout can be loaded; tried in a process of its own."""
    test = f"import sys; from detcore.device import native; sys.exit(bool(native.load({program!r})))"
    return subprocess.run([sys.executable, "-c", test], cwd=ROOT, capture_output=True).returncode == 0


def usable(nvcc: Path | None, torch_cuda: str | None) -> Path | None:
    """nvcc if it can compile for this torch; says what will be built."""
    if os.environ.get("KERNELS") == "cpu":
        say("KERNELS=cpu: only the CPU code is built, none for GPUs")
    elif nvcc is None:
        say("no nvcc (looked at CUDA_HOME, /usr/local/cuda, PATH, nvidia-cuda-nvcc): only the CPU code is built")
    elif torch_cuda is None:
        say(f"{nvcc} is there, but this torch has no CUDA: only the CPU code is built")
    elif (found := cuda_version(nvcc)).split(".")[0] != torch_cuda.split(".")[0]:
        say(f"{nvcc} is CUDA {found}, but torch wants {torch_cuda} (set CUDA_HOME): only the CPU code is built")
    else:
        say(f"{nvcc} (CUDA {found}), for {os.environ['TORCH_CUDA_ARCH_LIST']}")
        return nvcc
    return None


def extensions() -> dict:
    """The arguments of `setup` that build the libraries; none, with a line that says why, where that can't be done."""
    programs = sorted(folder.parent.name for folder in ROOT.glob("*/csrc"))
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not shutil.which(compiler):
        say(f"no C++ compiler ({compiler}), so no kernels are built; the PyTorch references run instead")
        return {}
    nvcc = find_nvcc()
    if nvcc:
        os.environ["CUDA_HOME"] = str(nvcc.parents[1])  # read when torch.utils.cpp_extension is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        say(f"torch can't be imported here ({error}), so no kernels are built; later: make ops")
        return {}
    if os.environ.get("KERNELS") == "cpu" and {"--inplace", "-i"} & set(sys.argv):
        for program in filter(kept, list(programs)):
            say(f"KERNELS=cpu: {program}/_kernels.so is current and has code for GPUs too: left as it is")
            programs.remove(program)
    nvcc = usable(nvcc, torch.version.cuda) if programs else None
    return {
        "ext_modules": [extension(program, nvcc) for program in programs],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"build_ext": {"force": True}},  # what is new is for ninja to say, which sees headers and flags too
    }


if __name__ == "__main__":
    arguments = extensions()
    setup(**arguments)
    if not arguments and "build_ext" in sys.argv:
        sys.exit("setup.py: nothing was built")
