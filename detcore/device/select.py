"""Which device a process computes on, and in which precision."""

import os

import torch

from detcore import UserError
from detcore.device import cuda, tpu
from detcore.device.base import Backend
from detcore.device.cpu import CpuBackend
from detcore.device.threads import adaptive_threads


def select_backend(
    device: str, precision: str, local_rank: int = 0, graphs: str = "off", world_size: int = 1, local_size: int = 1,
    benchmark_limit: int | None = None,
) -> Backend:  # fmt: skip
    """Chooses the device of this process and sets the global precision switches.

    device: one of DEVICES; "auto" takes the GPU with the index local_rank if there is one, else a TPU that torch sees,
    else the CPU. precision: one of PRECISIONS; "auto" as `resolve` has it.
    graphs: one of GRAPHS, what a GPU records: "auto" inference, and steps if it is the only GPU of the run.
    benchmark_limit: algorithms that cuDNN tries for each convolution, 0 for all; None leaves torch's own number.
    Raises UserError for a device that is not there, for a precision that it does not have, and for graphs "on" where
    there is no GPU. To be called before the process group is made, whose library reads its variables then.
    """
    device, precision = resolve(device, precision)
    eager = why_eager(device, graphs, world_size)
    if device == "tpu":
        return tpu.open_core(precision, local_rank, local_size)
    if device == "cuda":
        backend: Backend = cuda.open_gpu(precision, local_rank, graphs, eager, benchmark_limit)
    elif precision == "fp16":
        raise UserError("--precision fp16 wants a GPU; on the CPU use fp32 or bf16.")
    else:
        threads = adaptive_threads(os.environ, local_size)
        backend = CpuBackend(torch.device(device), precision, eager=eager, threads=threads)
    # These set torch's older and newer switches alike. After the newer alone torch refuses to read the older, which
    # parts of torch.compile do.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return backend


def resolve(device: str, precision: str) -> tuple[str, str]:
    """Both with what "auto" stands for: bf16 on GPU and TPU, fp16 on a GPU that only emulates bf16, fp32 on the CPU."""
    if device == "auto":
        device = "cuda" if cuda.found() else "tpu" if tpu.found() else "cpu"
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "fp16" if device == "cuda" and cuda.emulates_bf16() else "bf16"
    return device, precision


def why_eager(device: str, graphs: str, world_size: int) -> str:
    """Why steps are not recorded; "" if they are. Raises UserError where they are asked for and can't be."""
    if device != "cuda":
        if graphs == "on":
            raise UserError("--graphs on: only a GPU can record steps; leave it out")
        return "only a GPU can record them"
    if graphs == "auto" and world_size > 1:
        return (
            "recording the exchange between GPUs has not been tried on a machine with several yet; where a GPU has few "
            "images, below about 16, it then waits for the processor in every step. --graphs on records"
        )
    return "--graphs off" if graphs == "off" else ""
