"""The one file that knows devices: where tensors live, in which precision, what the device tells about itself."""

import platform
import resource
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detcore import UserError
from detcore.data import Batch

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")


@dataclass(frozen=True)
class Backend:
    """A device and the precision to compute in. Made by `select`; holds no other state."""

    device: torch.device
    precision: str

    @property
    def is_gpu(self) -> bool:
        """True on a GPU, where fused optimizers and channels_last pay."""
        return self.device.type == "cuda"

    @property
    def collectives(self) -> str:
        """The torch.distributed backend for tensors of this device."""
        return "nccl" if self.is_gpu else "gloo"

    def autocast(self) -> AbstractContextManager:
        """The mixed-precision context of the forward pass: bf16 or fp16 autocast, nothing for tf32 and fp32."""
        if self.precision not in ("bf16", "fp16"):
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler; it does something in fp16 only, where small gradients would become zero."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model to the device, on a GPU with 4-D weights in channels_last (tensor cores want it)."""
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.is_gpu else model

    def parallel(self, model: nn.Module, world_size: int) -> nn.Module:
        """Wraps a placed model for data-parallel training; returned unchanged for one process.

        Buffers are broadcast only where training changes them (trainable batch normalisation): then every rank starts
        each step from rank 0's running statistics, which are also the ones that a checkpoint keeps.
        """
        if world_size == 1:
            return model
        # It copies the gradients of 1x1 convolutions, whose two layouts are one; every rank would say so.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        learns_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        with warnings.catch_warnings():  # newer torch announces another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            parallel = DistributedDataParallel(
                model,
                device_ids=[self.device] if self.is_gpu else None,
                broadcast_buffers=learns_statistics,
                gradient_as_bucket_view=True,
            )
        _settle_buckets(parallel)
        return parallel

    def sync_batch_norm(self, model: nn.Module) -> nn.Module:
        """Batch statistics over all processes instead of each one's own. Raises UserError where torch has none."""
        if not self.is_gpu:
            raise UserError("--sync-bn wants GPUs: torch synchronises batch statistics only there; leave it out")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def to_device(self, batch: Batch) -> Batch:
        """Copies a batch to the device, on a GPU without waiting for the copy (the loader pins the memory)."""
        if not self.is_gpu:
            return batch
        return Batch(*(t.to(self.device, non_blocking=True) for t in batch))

    def compile_step(self, step: Callable) -> Callable:
        """The hook where a device replaces a training step by a recorded one; every device runs it as it is."""
        return step

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def peak_memory_gib(self) -> float:
        """Peak memory so far in GiB: allocated device memory on a GPU, else the process's resident memory."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def rng_state(self) -> Tensor:
        """The state of the random generators that training draws from, as uint8 [n] on the CPU."""
        states = [torch.get_rng_state()]
        if self.is_gpu:
            states.append(torch.cuda.get_rng_state(self.device))
        return torch.cat(states)

    def set_rng_state(self, state: Tensor) -> None:
        """Restores what `rng_state` returned on the same kind of device."""
        size = torch.get_rng_state().numel()
        torch.set_rng_state(state[:size].clone())
        if self.is_gpu:
            torch.cuda.set_rng_state(state[size:].clone(), self.device)

    def describe(self) -> dict[str, str]:
        """The machine in words, for reports: python, torch, device, processor."""
        import torchvision

        name = torch.cuda.get_device_name(self.device) if self.is_gpu else f"CPU, {torch.get_num_threads()} threads"
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": name,
            "precision": self.precision,
            "processor": _processor_name(),
            "system": f"{platform.system()} {platform.release()}",
        }


def _settle_buckets(parallel: DistributedDataParallel) -> None:
    """Lets DistributedDataParallel group the gradients for their exchange now, with a backward pass of zeros.

    It does so for good after the first backward pass, and how gradients are grouped decides the order of the sums: the
    first step of a resumed run would be rounded unlike the same step of a run that was never stopped.
    """
    model = parallel.module
    # Created last, differentiated first: so the exchange begins with the last parameters, whose gradients come first.
    model.forward = lambda: sum((p * 0).sum() for p in model.parameters() if p.requires_grad)
    parallel().backward()
    del model.forward
    model.zero_grad(set_to_none=True)


def select(device: str, precision: str, local_rank: int = 0) -> Backend:
    """Chooses the device of this process and sets the global precision switches.

    device: one of DEVICES; "auto" takes the GPU with the index local_rank if there is one, else the CPU.
    precision: one of PRECISIONS; "auto" is bf16 on a GPU and fp32 on the CPU.
    Raises UserError for a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 1:
            local_rank = 0  # the launcher gave each process a GPU of its own
        if local_rank >= count:
            raise UserError(
                f"--device cuda: process {local_rank} of this machine has no GPU, torch sees {count}. "
                "Start fewer processes, check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or use --device cpu."
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # shapes are fixed, so that trying the convolutions out pays
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 wants a GPU; on the CPU use fp32 or bf16.")
    fp32 = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = fp32
    torch.backends.cudnn.conv.fp32_precision = fp32
    return Backend(chosen, precision)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.machine()  # not Linux: the architecture is all that is known without a subprocess
    return platform.processor() or platform.machine()
