"""NVIDIA GPUs: streams beside the computation, pinned memory, CUDA graphs."""

import gc
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detcore import UserError
from detcore.data.ahead import one_ahead
from detcore.data.batch import Batch
from detcore.device.base import MAX_IN_FLIGHT, Backend


@dataclass(frozen=True)
class CudaBackend(Backend):
    """One GPU."""

    collective_backend = "nccl"
    fused_optimizers = decodes_images = probes_batch_size = True
    warms_up = True  # the first steps try algorithms out, connect to the other GPUs and allocate

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    @property
    def loader_device(self) -> torch.device:
        return self.device

    @property
    def collective_device(self) -> torch.device:
        return self.device

    def place(self, model: nn.Module) -> nn.Module:
        """With 4-D weights in channels_last: tensor cores want it."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def _ddp_devices(self) -> list[torch.device]:
        return [self.device]

    def sync_batch_norm(self, model: nn.Module) -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Nothing: DistributedDataParallel averages them."""

    def to_device(self, batch: Batch) -> Batch:
        """Without waiting for the copy where the loader has pinned the memory."""
        return batch.map(lambda t: t.to(self.device, non_blocking=True))

    def prefetch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device, each copied one step before it is asked for.

        Fetching and copying (from pinned memory) run in a thread and on a stream of their own, beside the computation:
        so does what a loader launches there. A batch belongs to the stream that is current when it is asked for; that
        stream waits for the copy, not the host. Its memory is used again only after what was launched there until it
        was dropped, pinned memory only after its copy. Time waited in `next` is time waited for the loader, or for the
        device where the host is MAX_IN_FLIGHT batches ahead of it.
        """
        side = torch.cuda.Stream(self.device)
        asked: deque[torch.cuda.Event] = deque()  # one for each of the last batches: what came before it is done

        def send(source: Iterator[Batch]) -> tuple[Batch, torch.cuda.Event]:
            torch.cuda.set_device(self.device)  # a thread begins with the first GPU, and would open a context there
            with torch.cuda.stream(side):
                batch = next(source)
                batch = batch.map(lambda t: t.pin_memory() if t.device.type == "cpu" and not t.is_pinned() else t)
                return self.to_device(batch), side.record_event()

        def receive(sent: tuple[Batch, torch.cuda.Event]) -> Batch:
            batch, copied = sent
            using = torch.cuda.current_stream(self.device)
            if len(asked) == MAX_IN_FLIGHT:
                asked.popleft().synchronize()
            asked.append(torch.cuda.Event(blocking=True))
            asked[-1].record(using)
            using.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(using)
            return batch

        return one_ahead(batches, send, receive, in_thread=True)

    def largest_batch(self, try_batch: Callable[[int], object], start: int, limit: int) -> int:
        """start itself is not tried. Any RuntimeError of a trial ends the search, and a line says so: for want of
        memory, because no algorithm or no 32-bit index goes so far. Raises UserError if the process has lost its GPU
        by it."""
        size, failure = start, ""
        while not failure and 2 * size <= limit:
            try:
                try_batch(2 * size)
                self.synchronize()  # what a kernel did wrong shows here at the latest
                size *= 2
            except RuntimeError as error:
                failure = _first_line(error)
        if failure:  # only here, outside the handler, is what the trial held free
            self._check_alive(f"evaluation batches of {2 * size} failed ({failure})", f"--eval-batch-size {size}")
            torch.cuda.empty_cache()
            message = f"evaluation batches of {2 * size} do not fit, so that {size} are taken: {failure}"
            print(message, file=sys.stderr, flush=True)
        return size

    def _check_alive(self, after: str, instead: str) -> None:
        """Raises UserError if the process has lost its GPU, which then fails whatever is asked of it."""
        try:
            self.synchronize()
        except RuntimeError as error:
            raise UserError(
                f"{after}, and since then the GPU refuses this process all work ({_first_line(error)}). Start again "
                f"with {instead}; where that fails too, with --ops reference."
            ) from error

    def flush(self) -> None:
        """Nothing: work starts when it is asked for."""

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def record_event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, events: Sequence[tuple[Any, Any]]) -> float:
        return sum(start.elapsed_time(end) for start, end in events) / 1e3

    def peak_memory_gib(self) -> float:
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def _device_rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def _set_device_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self.device)


class GraphRecorder:
    """`graphs.Recorder` by CUDA graphs.

    One stream for warm-up and capture, as the gradients' nodes remember theirs, and one memory pool: what is captured
    later reuses the temporary memory of what was captured before. That is sound because replays follow one another on
    one stream and their outputs are cloned before the next.
    """

    def __init__(self, device: torch.device, *, steps: bool):
        """steps: whether training steps are recorded too, and with them the collectives of NCCL."""
        if steps:
            # PyTorch's documentation for NCCL in graphs; `detcore.processes.watchdog` sees a rank that hangs.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        # Said in the warm-up of an optimizer that can be captured.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)

    def record(self, work: Callable) -> Callable:
        gc.collect()  # torch no longer does: what only cycles hold would keep its memory beside the recording's
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads (NCCL's, the loader's that pins memory) may go on meanwhile: thread_local.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(f"the step can't be recorded ({reason}); --graphs off runs it as it is") from error
        self._graphs.append(graph)

        def replay():
            graph.replay()
            return outputs

        return replay

    def close(self) -> None:
        while self._graphs:
            self._graphs.pop().reset()


def open_gpu(
    precision: str, local_rank: int, graphs: str, eager: str, benchmark_limit: int | None = None
) -> CudaBackend:
    """The GPU of this process, its own switches set; arguments as of `select_backend`, eager: why steps are not
    recorded. Raises UserError if it is not there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UserError(
            "--device cuda: torch sees no GPU on this machine; check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, "
            "or use --device cpu."
        )
    local_rank = 0 if count == 1 else local_rank  # the launcher gave each process a GPU of its own
    if local_rank >= count:
        raise UserError(
            f"--device cuda: process {local_rank} of this machine has no GPU, torch sees {count}. "
            "Start fewer processes, or check CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank)
    torch.backends.cudnn.benchmark = True  # shapes are fixed, so that trying the convolutions out pays
    if benchmark_limit is not None:
        torch.backends.cudnn.benchmark_limit = benchmark_limit
    device = torch.device("cuda", local_rank)
    recorder = GraphRecorder(device, steps=not eager) if graphs != "off" else None
    return CudaBackend(device, precision, recorder, eager)


def found() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def emulates_bf16() -> bool:
    """Whether there is a GPU that computes bf16 only by other operations, slowly."""
    return found() and not torch.cuda.is_bf16_supported(False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
