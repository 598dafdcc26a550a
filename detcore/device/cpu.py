"""The processor of this machine: tensors lie in host memory, and work is done when it is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detcore.data.batch import Batch
from detcore.device.base import Backend
from detcore.device.threads import Threads


@dataclass(frozen=True)
class CpuBackend(Backend):
    """The CPU. threads: fits their number to what other programs leave free; None: it stays as it is."""

    threads: Threads | None = None

    @property
    def name(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    def to_device(self, batch: Batch) -> Batch:
        """The batch itself."""
        return batch

    def prefetch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The stream itself: the loader's workers fetch ahead, and there is nothing to copy."""
        return batches

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Nothing: DistributedDataParallel averages them."""

    def adapt_threads(self, images_per_s: float = 0.0) -> str:
        return self.threads.adapt(images_per_s) if self.threads else ""

    def flush(self) -> None:
        """Nothing: work is done when it is asked for."""

    def synchronize(self) -> None:
        """Nothing: work is done when it is asked for."""

    def _device_rng_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def _set_device_rng_state(self, state: Tensor) -> None:
        raise AssertionError("the CPU has no generator but the host's")
