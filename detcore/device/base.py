"""What training and inference ask of a device: the interface that `cpu`, `cuda` and `tpu` implement."""

import platform
import resource
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detcore import UserError
from detcore.data.batch import Batch
from detcore.device import graphs
from detcore.processes import distributed

DEVICES = ("auto", "cpu", "cuda", "tpu")
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
GRAPHS = ("auto", "on", "off")
MAX_IN_FLIGHT = 3  # batches that the host may be ahead of a device: more only take memory


@dataclass(frozen=True)
class Backend(ABC):
    """A device and the precision to compute in, made by `detcore.device.select.select_backend`.

    recorder: records inference on this device, and training steps unless `eager` gives a reason why not; None where
    both run as they are written.
    """

    device: torch.device
    precision: str
    recorder: graphs.Recorder | None = None
    eager: str = ""

    collective_backend: ClassVar[str] = "gloo"
    """The torch.distributed backend for tensors on `collective_device`."""
    fused_optimizers: ClassVar[bool] = False
    """Whether optimizers that update all weights in one kernel pay."""
    decodes_images: ClassVar[bool] = False
    """Whether loaders can decode JPEG on the device."""
    probes_batch_size: ClassVar[bool] = False
    """Whether `largest_batch` tries sizes out: memory ends with an error that can be caught."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The device in words."""

    @property
    def loader_device(self) -> torch.device:
        """The device that a loader decodes on, or pins host memory for; the CPU: neither."""
        return torch.device("cpu")

    @property
    def collective_device(self) -> torch.device:
        """Where tensors must lie for the process group's collectives."""
        return torch.device("cpu")

    @property
    def records_steps(self) -> bool:
        """Whether training steps are recorded."""
        return self.recorder is not None and not self.eager

    @property
    def step_execution(self) -> str:
        """How training steps run, for the user."""
        return "recorded once and replayed" if self.records_steps else f"not recorded ({self.eager or 'not asked for'})"

    @property
    def warms_up(self) -> bool:
        """Whether the first steps are slower than the rest."""
        return self.records_steps

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
        """Moves a model to the device, in the memory layout that is fastest there."""
        return model.to(self.device)

    def parallel(self, model: nn.Module, world_size: int) -> nn.Module:
        """Wraps a placed model for data-parallel training; returned unchanged for one process.

        Buffers are broadcast only where training changes them (trainable batch normalisation): then every rank starts
        each step from rank 0's running statistics, which are also the ones that a checkpoint keeps.

        With recorded steps the wrapper is made on the recorder's stream: what it hooks into the backward pass runs on
        the stream that it was made on, and PyTorch's documentation asks for a side stream.
        """
        if world_size == 1:
            return model
        # It copies the gradients of 1x1 convolutions, whose two layouts are one; every rank would say so.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        buffers = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        with self.recorder.side_stream() if self.records_steps else nullcontext():
            with warnings.catch_warnings():  # newer torch announces another name for broadcast_buffers
                warnings.simplefilter("ignore", FutureWarning)
                parallel = DistributedDataParallel(
                    model, device_ids=self._ddp_devices(), broadcast_buffers=buffers, gradient_as_bucket_view=True
                )
            distributed.rebuild_ddp_buckets(parallel)
        return parallel

    def _ddp_devices(self) -> list[torch.device] | None:
        """DistributedDataParallel's device_ids: None for modules on the CPU."""
        return None

    @abstractmethod
    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Averages gradients over the processes where what `parallel` returns does not."""

    def sync_batch_norm(self, model: nn.Module) -> nn.Module:
        """Batch statistics over all processes instead of one process. Raises UserError where torch has none."""
        raise UserError("--sync-bn wants GPUs: torch synchronises batch statistics only there; leave it out")

    @abstractmethod
    def to_device(self, batch: Batch) -> Batch:
        """Copies a batch to the device; asynchronously where the device can."""

    @abstractmethod
    def prefetch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device, each fetched and copied while the one before it is used, where that is possible.

        Errors and the end come with their own batch; closing closes `batches`.
        """

    def largest_batch(self, try_batch: Callable[[int], object], start: int, limit: int) -> int:
        """The largest of start, 2 start, 4 start, ... up to `limit` for which try_batch(size) raises no RuntimeError;
        start where `probes_batch_size` is False."""
        return start

    def adapt_threads(self, images_per_s: float = 0.0) -> str:
        """Fits the number of CPU threads to what other programs leave free; a note for the progress line, or "".

        Called before the first step without a rate, then with that of each logging interval.
        """
        return ""

    def compile_step(self, step: Callable, example: Sequence[Batch]) -> Callable:
        """A training step as this device runs it best, warmed up on the batches of `example`: recorded, or unchanged.

        step(batches) -> {name: scalar}. The warm-up trains on `example`: `State.unchanged` undoes that.
        """
        batches = [self.to_device(batch) for batch in example]
        if not self.records_steps:
            for _ in range(graphs.WARM_UPS):
                step(batches)
            return step
        return graphs.recorded(step, self.recorder, batches, graphs.STEP_WARM_UPS)

    def prepare_eager_step(self, step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        """A step that is not recorded, with what the device demands of it added."""
        return step

    @abstractmethod
    def flush(self) -> None:
        """Starts the work asked for so far where a device gathers it first, between forward passes and after steps."""

    def compile_inference(self, infer: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """A function of a batch on the device that changes nothing: recorded at first use, or unchanged."""
        return graphs.recorded_by_shape(infer, self.recorder) if self.recorder else infer

    def close(self) -> None:
        """Frees what was recorded. To be called before the process group ends: NCCL waits for recorded collectives."""
        if self.recorder:
            self.recorder.close()

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""

    def record_event(self) -> Any:
        """A point in the device's work, for `seconds_between`; None where work is done when it is asked for."""
        return None

    def seconds_between(self, events: Sequence[tuple[Any, Any]]) -> float:
        """The sum of the seconds between each pair of events, which the device has passed; 0 without events."""
        return 0.0

    def peak_memory_gib(self) -> float:
        """Peak memory so far in GiB: allocated device memory, or the process's resident memory."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def to_host(self, contents: Any) -> Any:
        """A deep copy of a checkpoint's contents (dictionaries and lists of tensors and numbers) with the tensors in
        host memory, so that training does not change it and it can be read anywhere."""
        if isinstance(contents, Tensor):
            return contents.detach().to("cpu", copy=True)
        if isinstance(contents, dict):
            return {key: self.to_host(value) for key, value in contents.items()}
        return [self.to_host(value) for value in contents] if isinstance(contents, list | tuple) else contents

    def rng_state(self) -> Tensor:
        """The state of the random generators that training draws from, uint8 [n] on the CPU: the host's, then the
        device's."""
        return torch.cat([torch.get_rng_state(), self._device_rng_state()])

    def set_rng_state(self, state: Tensor) -> bool:
        """Restores what `rng_state` returned. False if it came from another kind of device: then the device's own
        generator stays as it is."""
        size, known = torch.get_rng_state().numel(), len(state) == len(self.rng_state())
        torch.set_rng_state(state[:size].clone())
        if known and len(state) > size:
            self._set_device_rng_state(state[size:].clone())
        return known

    @abstractmethod
    def _device_rng_state(self) -> Tensor:
        """The state of the device's own generator, uint8 [n] on the CPU; empty where it has none."""

    @abstractmethod
    def _set_device_rng_state(self, state: Tensor) -> None:
        """Restores what `_device_rng_state` returned, where that was not empty."""

    def describe(self) -> dict[str, str]:
        """The machine in words, for reports: versions, device, precision, processor, system."""
        import torchvision

        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "device": self.name,
            "precision": self.precision,
            "processor": _processor_name(),
            "system": f"{platform.system()} {platform.release()}",
        }


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []  # not Linux: the architecture is all that is known without a subprocess
    return names[0] if names else platform.processor() or platform.machine()
