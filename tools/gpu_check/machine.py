"""What a check says of the machine and the checkout: what is installed, versions, clocks, commit."""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from tools.gpu_check.state import ROOT, Row, words

CUDA = "/usr/local/cuda"
WITHOUT = {
    "gcc": "no torch.compile, no Triton",
    "Python.h": "no torch.compile, no Triton",
    "ptxas": "no torch.compile, no Triton",
    "nvcc": "nothing is compiled: only carried libraries",
    "compute-sanitizer": "the part sanitizer is left out",
    "git": "the commit is that of --carried, or unknown",
}
"""What the parts want of the machine beside Python packages: what is left out without it."""


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def preflight() -> dict[str, str]:
    """{each of WITHOUT: its path, "" if it is missing}."""
    return {name: place(name) for name in WITHOUT}


def place(name: str) -> str:
    """Where a program, or Python.h, is; "" if nowhere. CUDA's are looked for in its own folder too, and ptxas, which
    Triton brings, in that package."""
    if name == "Python.h":
        candidates = [Path(sysconfig.get_paths()["include"]) / name]
    else:
        homes = [os.environ.get("CUDA_HOME"), CUDA]
        candidates = [Path(home) / "bin" / name for home in homes if home]
        triton = find_spec("triton") if name == "ptxas" else None
        if triton and triton.origin:
            candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    found = None if name == "Python.h" else shutil.which(name)
    return found or next((str(path) for path in candidates if path.is_file()), "")


def told(found: dict[str, str]) -> str:
    """preflight() on one line."""
    there = ", ".join(name for name, path in found.items() if path) or "nothing"
    missing = "; ".join(f"{name} ({WITHOUT.get(name, '?')})" for name, path in found.items() if not path)
    return f"found: {there}" + (f"; missing: {missing}" if missing else "")


def clocks(when: str) -> Row:
    """Clocks, temperature, power and used memory of the first GPU as nvidia-smi tells them; {} where it does not."""
    fields = {"card": "name", "driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem",
              "temperature_c": "temperature.gpu", "power_w": "power.draw", "used_mib": "memory.used"}  # fmt: skip
    query = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"when": when, "missing": words(error)}
    return {
        "when": when,
        **dict(zip(fields, (value.strip() for value in said.splitlines()[0].split(",")), strict=False)),
    }


def commit() -> str:
    """The checkout's commit, with +changes and a hash of them if tracked files differ from it; unknown without git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changes = subprocess.run(
            [*git, "diff", "HEAD"], capture_output=True, text=True, errors="replace", check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")
    return head.strip() + (f"+changes-{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else "")


def machine(gpu: bool) -> Row:
    """The machine and the versions, in words."""
    import torch
    import torchvision

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor)
    row = {
        "device": "cpu",
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if gpu:
        about = torch.cuda.get_device_properties(0)
        row |= {
            "device": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "sms": about.multi_processor_count,
        }
        row |= {"capability": f"{about.major}.{about.minor}", "cudnn": torch.backends.cudnn.version()}
    return row
