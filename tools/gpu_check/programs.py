"""The parts `build` and `sanitizer`, and how a part starts other programs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from detcore.device import native
from tools import gpu_carry
from tools.gpu_check.machine import place
from tools.gpu_check.state import ROOT, Context, Job, OutOfTime, Row, Skip
from tools.gpu_check.tests import gpu_test_files, pytest_command


def start(context: Context, command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in the checkout, its output in the log. Raises OutOfTime, having ended it and its children."""
    print("$", " ".join(command), flush=True)
    limit = max(context.left() - 1, 1.0)
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            print(said, flush=True)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime(f"stopped after {limit:.0f} s, the part's time is over") from None
            raise
    print(said, flush=True)
    return subprocess.CompletedProcess(command, process.returncode, said)


def last_words(said: str) -> str:
    """The line that says what went wrong, or the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output")[
        :300
    ]


def build(context: Context) -> Iterable[Job]:
    """The libraries, for this card alone unless TORCH_CUDA_ARCH_LIST says more; without a card for the CPU alone.

    Those that tools/gpu_carry.py has compiled are taken instead if they are of these sources and for this card.
    """

    def run() -> Row:
        if context.carried and not unfit(context):
            return described(gpu_carry.manifest(context.carried)["architectures"] + ", carried")
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if context.gpu and not chosen:
            chosen = "{}.{}".format(*torch.cuda.get_device_capability())
        environment = {"TORCH_CUDA_ARCH_LIST": chosen} if chosen else {}
        if not context.gpu:
            environment = {"KERNELS": "cpu"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = start(context, command, **environment)
        impossible = [line for line in done.stdout.splitlines() if "so no kernels are built" in line]
        if done.returncode and not impossible:
            return {"error": last_words(done.stdout)}
        programs = gpu_carry.programs()
        built = [program for program in programs if native.library_file(program).is_file()]
        if built != programs:
            raise Skip(impossible[0] if impossible else last_words(done.stdout))
        return described((chosen or "default") if context.gpu else "the CPU")

    def described(architectures: str) -> Row:
        programs = gpu_carry.programs()
        said = native.describe(programs[-1], context.device)
        row = {"libraries": ", ".join(programs), "ops": said}
        lacking = context.gpu and "because" in said
        return row | {"architectures": architectures} | ({"error": f"no code for this GPU: {said}"} if lacking else {})

    yield "build_ext --inplace", run


def unfit(context: Context) -> str:
    """Why the carried libraries do not serve here, or ""."""
    if wrong := gpu_carry.in_place(context.carried):
        return wrong
    compiled = gpu_carry.manifest(context.carried)["architectures"]
    card = "{}.{}".format(*torch.cuda.get_device_capability()) if context.gpu else compiled
    return "" if card == compiled else f"they are for {compiled}, this card is {card}"


def sanitizer(context: Context) -> Iterable[Job]:
    """compute-sanitizer over the ops' own gpu tests, a job for each tool and file: memcheck of all of them first."""
    binary = place("compute-sanitizer")

    def case(tool: str, file: str) -> Callable[[], Row]:
        def run() -> Row:
            if not context.gpu or not binary:
                raise Skip("no compute-sanitizer on this machine" if context.gpu else "compute-sanitizer wants a GPU")
            # Without caching every tensor is an allocation of its own, so that a step past its end is seen.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
            command = [binary, "--tool", tool, "--error-exitcode", "9"]
            command += [*pytest_command(context.work / "tmp" / "pytest"), "-x", "-m", "gpu", file]
            done = start(context, command, **environment)
            if "Device not supported" in done.stdout:
                raise Skip("compute-sanitizer says that it does not support this device (a virtual machine's limit)")
            found = re.search(r"(?:ERROR SUMMARY: |hazards? displayed \()(\d+) error", done.stdout)
            row = {"errors": int(found[1]) if found else None}
            return row | ({"error": last_words(done.stdout)} if done.returncode or not found or row["errors"] else {})

        return run

    files = [file for file in gpu_test_files() if "/ops/" in file]
    for tool in ("memcheck", "racecheck", "synccheck"):
        for file in files:
            yield f"{tool} {file.removeprefix('tests/')}", case(tool, file)
