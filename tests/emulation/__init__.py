"""Tests of native ops over every implementation: the CPU's, the GPU's emulated on the CPU, the GPU's on a GPU.

    def test_normalize(implementation):                     # the fixture of tests/conftest.py: runs three times
        images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8, device=implementation.device)
        found = normalize(images, ...)                      # the public op: this implementation, never the reference
        torch.library.opcheck(torch.ops.detcore.normalize.default, (images, ...))

While a test has the fixture, `torch.ops.<program>.<op>` and so the public functions, with their autograd and fakes,
run the implementation; `native.using("native")` is on, so that nothing falls back silently, and float32 is float32 in
a GPU's convolutions, too (no TF32). The oracle is the op's `x_reference`. New tensors hold NaN (or the largest integer)
until they are written, so that a kernel that leaves a hole is found.

"emulated gpu" compiles csrc/*_gpu.cu with g++ and runs each thread of each block as a fiber: see emulated_gpu.h for
what it finds. It runs about 10 million barriers (or returns, or warp primitives) of threads a second, so keep shapes
small. Its libraries are kept in build/emulated; a changed file is compiled anew in about 2 s. Where there is no g++ the
tests skip, except in CI (environment variable CI), where they fail.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from detcore.device import native

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "emulated"
COMPILER = os.environ.get("CXX", "g++").split()[0]
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DEMULATED_GPU"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    "-Wno-sign-compare",  # threadIdx.x is unsigned; nvcc does not mind either,
    *("-fsanitize=alignment,bounds", "-ffp-contract=off"),
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
]


@dataclass(frozen=True)
class Implementation:
    """What the ops of the running test are computed by: "cpu", "emulated gpu" or "cuda", for tensors on `device`."""

    name: str
    device: torch.device


@contextmanager
def running(name: str) -> Iterator[Implementation]:
    """Lets torch.ops.<program> of all programs run an implementation; for the fixture. Skips where it can't be had."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if missing := next(filter(None, map(native.load, programs())), ""):
        unavailable(missing)
    fill = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    overrides = [route_to_emulated(program) for program in programs()] if name == "emulated gpu" else []
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills new tensors
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # on by default
    try:
        with native.using("native"):
            yield Implementation(name, torch.device("cuda" if name == "cuda" else "cpu"))
    finally:
        torch.use_deterministic_algorithms(fill[0], warn_only=fill[1])
        torch.set_float32_matmul_precision(tf32)
        torch.backends.cudnn.allow_tf32 = convolutions
        for library in overrides:
            library._destroy()


def route_to_emulated(program: str) -> torch.library.Library:
    """Until it is destroyed, CPU tensors given to torch.ops.<program>.x go to torch.ops.<program>_emulated.x."""
    override = torch.library.Library(program, "IMPL")
    for op, kernel in emulated_ops(program).items():
        override.impl(op, kernel, "CPU", allow_override=True)
    return override


@lru_cache
def emulated_ops(program: str) -> dict[str, torch._ops.OpOverload]:
    """{name: torch.ops.<program>_emulated.<name>}, compiled if need be."""
    emulated = load(f"{program}_emulated", tuple((ROOT / program / "csrc").glob("*_[cg]pu.c*")))
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ours = [op for space, _, op in names if space == emulated]
    chosen = [op for op in ours if torch._C._dispatch_has_kernel_for_dispatch_key(f"{emulated}::{op}", "CPU")]
    return {op: getattr(getattr(torch.ops, emulated), op).default for op in chosen}


def programs() -> list[str]:
    """The packages with a csrc/."""
    return sorted(folder.parent.name for folder in ROOT.glob("*/csrc"))


def unavailable(why: str) -> None:
    """Ends a test that wants a compiler: a failure in CI, elsewhere a skip."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


def build_cpu_libraries() -> None:
    """Builds <program>/_kernels.so where it is missing or older than its sources: for GPUs too if there is one.

    Called before tests are collected, because packages register their ops when they are imported.
    """
    if not shutil.which(COMPILER):
        return
    shared = [ROOT / "setup.py", *(ROOT / "detcore" / "csrc").glob("*")]
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / "cpu.lock"):
        if all(newer(native.library_file(p), [*shared, *(ROOT / p / "csrc").glob("*")]) for p in programs()):
            return
        environment = os.environ | ({} if torch.cuda.is_available() else {"KERNELS": "cpu"})
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        if done.returncode:
            pytest.exit(f"the kernels can't be built:\n{done.stdout}{done.stderr}", 3)


def newer(file: Path, sources: Iterable[Path]) -> bool:
    """Whether the file exists and none of its sources is younger."""
    return file.is_file() and all(source.stat().st_mtime <= file.stat().st_mtime for source in sources)


@lru_cache
def load(name: str, sources: tuple[Path, ...]) -> str:
    """Compiles sources (.cpp, .cu) for the emulated GPU into the ops torch.ops.<name>; returns name."""
    if not shutil.which(COMPILER):
        unavailable(f"no C++ compiler ({COMPILER}) for the emulated GPU")
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / f"{name}.lock"), ThreadPoolExecutor(2) as workers:
        objects = list(workers.map(lambda source: compiled(name, source), sorted(sources)))
        key = hashlib.sha256(" ".join(file.name for file in objects).encode()).hexdigest()[:16]
        library = BUILD / f"{name}-{key}.so"
        if not library.is_file():
            libraries = Path(torch.__file__).parent / "lib"
            call("-shared", *objects, f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", out=library)
    torch.ops.load_library(library)
    return name


def compiled(name: str, source: Path) -> Path:
    """The object file of one source, made if there is none of just these contents."""
    include = [HERE, source.parent, ROOT / "detcore" / "csrc"]
    key = content_key(name, source, *headers(source, include))
    result = BUILD / f"{name}-{source.name}-{key}.o"
    if not result.is_file():
        ops = BUILD / f"{name}.ops.h"  # not by -D, which would make the precompiled header invalid
        ops.write_text(f"#define OPS {name}\n")
        forced = ["-include", precompiled().with_suffix(""), "-include", ops, "-Winvalid-pch"]
        call(*FLAGS, *search_paths(include), *forced, "-x", "c++", "-c", source, out=result)
    return result


def precompiled() -> Path:
    """kernel.h as g++ has read it, with torch's headers: these are most of what it takes to compile a kernel."""
    include = [HERE, ROOT / "detcore" / "csrc"]
    kernel = ROOT / "detcore" / "csrc" / "kernel.h"
    result = BUILD / f"kernel-{content_key('kernel', kernel, *headers(kernel, include))}.h.gch"
    with locked(BUILD / "kernel.lock"):
        if not result.is_file():
            source = BUILD / "kernel_alone.h"
            source.write_text('#include "kernel.h"\n')
            call(*FLAGS, *search_paths(include), "-x", "c++-header", source, out=result)
    return result


def content_key(name: str, *files: Path) -> str:
    """Other for other contents of the files, flags, torch or compiler."""
    version = subprocess.run([COMPILER, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(" ".join([name, torch.__version__, *FLAGS]).encode() + version)
    for file in files:
        key.update(file.name.encode() + file.read_bytes())
    return key.hexdigest()[:16]


def search_paths(include: list[Path]) -> list[str]:
    """The options by which the compiler finds our headers and torch's."""
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include] + [word for path in include_paths() for word in ("-isystem", path)]


def headers(source: Path, include: list[Path]) -> list[Path]:
    """Our headers that a source includes, directly or through others."""
    found: dict[Path, None] = {}
    new = [source]
    while new:
        for header in re.findall(r'^ *#include "(.+)"', new.pop().read_text(), re.MULTILINE):
            file = next((folder / header for folder in include if (folder / header).is_file()), None)
            if file and file not in found:
                found[file] = None
                new.append(file)
    return sorted(found)


def call(*words: object, out: Path) -> None:
    """Runs the compiler; `out` appears only when it is complete."""
    partial = out.with_suffix(f".{os.getpid()}")
    done = subprocess.run([COMPILER, *map(str, words), "-o", str(partial)], text=True, capture_output=True)
    if done.returncode:
        partial.unlink(missing_ok=True)
        pytest.fail(f"{COMPILER} {' '.join(map(str, words))}\n{done.stderr}", pytrace=False)
    partial.replace(out)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
