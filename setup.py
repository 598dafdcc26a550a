"""Builds each program's csrc/ into its _kernels.so: CUDA and CPU code where nvcc is there, else CPU code alone.

    make ops      the same as: python setup.py build_ext --inplace

TORCH_CUDA_ARCH_LIST chooses the GPUs as torch reads it; by default 8.0, 9.0, 10.0 and PTX of the last. A build serves
torch 2.11 to 2.15 (stable ABI). Without a compiler, or without torch, nothing is built: the programs then run their
PyTorch references.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ARCHITECTURES = "8.0;9.0;10.0+PTX"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def say(message: str) -> None:
    print(f"setup.py: {message}", file=sys.stderr, flush=True)


def find_nvcc() -> Path | None:
    """The nvcc of CUDA_HOME, /usr/local/cuda, PATH or the package nvidia-cuda-nvcc, if its toolkit is around it."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    homes += [Path("/usr/local/cuda"), *([Path(on_path).resolve().parents[1]] if on_path else [])]
    homes += [Path(p) / "nvidia" / "cu13" for p in sys.path]
    found = (home / "bin" / "nvcc" for home in homes if (home / "include" / "cuda_runtime.h").is_file())
    return next((nvcc for nvcc in found if nvcc.is_file()), None)


def extension(program: str, nvcc: Path | None):
    """The library of one program, from all of its csrc/."""
    from torch.utils import cpp_extension

    folder = ROOT / program / "csrc"
    sources = sorted(str(file.relative_to(ROOT)) for file in folder.glob("*.cpp"))
    common = ["-O3", f"-DOPS={program}", *STABLE_ABI]
    for path in cpp_extension.include_paths():
        common += ["-isystem", path]  # torch's own headers have warnings
    flags = {"cxx": [*common, "-ffp-contract=off", "-fvisibility=hidden", *WARNINGS]}
    kind = cpp_extension.CppExtension
    if nvcc:
        sources += sorted(str(file.relative_to(ROOT)) for file in folder.glob("*.cu"))
        host = ",".join(["-fvisibility=hidden", *WARNINGS])
        flags["nvcc"] = ["-DUSE_CUDA", *common, "--threads=2", "-Werror=all-warnings", f"-Xcompiler={host}"]
        kind = cpp_extension.CUDAExtension
    return kind(
        f"{program}._kernels", sources, include_dirs=[str(ROOT / "detcore" / "csrc")], extra_compile_args=flags,
        depends=[str(f) for f in (*(ROOT / "detcore" / "csrc").glob("*.h"), *folder.glob("*.h"))], py_limited_api=True,
    )  # fmt: skip


def extensions() -> dict:
    """The arguments of `setup` that build the libraries; none, with a line that says why, where that can't be done."""
    programs = sorted(folder.parent.name for folder in ROOT.glob("*/csrc"))
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not shutil.which(compiler):
        say(f"no C++ compiler ({compiler}), so no kernels are built; the PyTorch references run instead")
        return {}
    nvcc = None if os.environ.get("KERNELS") == "cpu" else find_nvcc()
    if nvcc:
        os.environ["CUDA_HOME"] = str(nvcc.parents[1])  # read when torch.utils.cpp_extension is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        say(f"torch can't be imported here ({error}), so no kernels are built; later: make ops")
        return {}
    if nvcc and torch.version.cuda is None:
        say(f"this torch ({torch.__version__}) has no CUDA: only the CPU code is built")
        nvcc = None
    elif nvcc:
        say(f"{nvcc}, for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    else:
        say("no nvcc (looked at CUDA_HOME, /usr/local/cuda, PATH): only the CPU code is built, none for GPUs")
    return {
        "ext_modules": [extension(program, nvcc) for program in programs],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


setup(**extensions())
