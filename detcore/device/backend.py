"""The one file that knows devices: where tensors live, in which precision, what the device tells about itself."""

import platform
import resource
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detcore import UserError
from detcore.data.ahead import one_ahead
from detcore.data.batch import Batch
from detcore.device import graphs
from detcore.device.graph_recorder import GraphRecorder
from detcore.device.sync_norm import synchronised
from detcore.processes import distributed

DEVICES = ("auto", "cpu", "cuda", "tpu")
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
GRAPHS = ("auto", "on", "off")
LEAD = 3  # batches that the host may be ahead of a GPU: a longer lead only takes memory


@dataclass(frozen=True)
class Backend:
    """A device and the precision to compute in. Made by `select`.

    recorder: what records inference on this device, and training steps unless `eager` gives a reason why not; None
    where both run as they are written.
    """

    device: torch.device
    precision: str
    recorder: graphs.Recorder | None = None
    eager: str = ""

    @property
    def is_gpu(self) -> bool:
        """True on a GPU, where fused optimizers and channels_last pay."""
        return self.device.type == "cuda"

    @property
    def own(self) -> torch.device | None:
        """The GPU of this process, for `distributed.init`; None on the CPU."""
        return self.device if self.is_gpu else None

    @property
    def exchange(self) -> torch.device:
        """Where processes put what they tell each other, but for gradients: on a GPU its own memory, else the host."""
        return self.device if self.is_gpu else torch.device("cpu")

    @property
    def name(self) -> str:
        """The device in words."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else f"CPU, {torch.get_num_threads()} threads"

    @property
    def steps(self) -> str:
        """How training steps run, for the user."""
        return "recorded once and replayed" if self.records_steps else f"not recorded ({self.eager or 'not asked for'})"

    @property
    def records_steps(self) -> bool:
        """Whether training steps are recorded."""
        return self.recorder is not None and not self.eager

    @property
    def warms_up(self) -> bool:
        """Whether the first steps are slower: a GPU tries its algorithms out, connects to the others, allocates."""
        return self.is_gpu or self.records_steps

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

        With recorded steps the wrapper is made where they are recorded: what it hooks into the backward pass runs on
        the stream that it was made on, and PyTorch's documentation asks for one aside.
        """
        if world_size == 1:
            return model
        # It copies the gradients of 1x1 convolutions, whose two layouts are one; every rank would say so.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        buffers = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        with self.recorder.aside() if self.records_steps else nullcontext():
            with warnings.catch_warnings():  # newer torch announces another name for broadcast_buffers
                warnings.simplefilter("ignore", FutureWarning)
                own = [self.device] if self.is_gpu else None
                parallel = DistributedDataParallel(
                    model, device_ids=own, broadcast_buffers=buffers, gradient_as_bucket_view=True
                )
            distributed.settle_buckets(parallel)
        return parallel

    def sync_batch_norm(self, model: nn.Module) -> nn.Module:
        """Batch statistics over all processes instead of each one's own. Raises UserError on a TPU."""
        if self.device.type == "cpu":
            return synchronised(model)
        if not self.is_gpu:
            raise UserError("--sync-bn wants GPUs or processors: there is none for TPUs; leave it out")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def to_device(self, batch: Batch) -> Batch:
        """Copies a batch to the device, on a GPU without waiting for the copy (the loader pins the memory)."""
        if not self.is_gpu:
            return batch
        return batch.map(lambda t: t.to(self.device, non_blocking=True))

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device, each copied one step before it is asked for; on the CPU the stream itself.

        Fetching and copying (from pinned memory) run in a thread and on a stream of their own, beside the computation:
        so does what a loader launches there. A batch belongs to the stream that is current when it is asked for; that
        stream waits for the copy, not the host. Its memory is used again only after what was launched there until it
        was dropped, pinned memory only after its copy. Time waited in `next` is time waited for the loader, or for the
        device where the host is LEAD batches ahead of it: each of them keeps its memory. Errors and the end come with
        their own batch; closing closes the stream.
        """
        if not self.is_gpu:
            return batches
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
            if len(asked) == LEAD:
                asked.popleft().synchronize()
            asked.append(torch.cuda.Event(blocking=True))
            asked[-1].record(using)
            using.wait_event(copied)
            for tensor in batch:
                tensor.record_stream(using)
            return batch

        return one_ahead(batches, send, receive, in_thread=True)

    def largest_batch(self, try_batch: Callable[[int], object], start: int, limit: int) -> int:
        """The largest of start, 2 start, 4 start, ... up to `limit` that try_batch(size) gets through.

        start itself is taken without a trial. On the CPU, where memory does not end with an error, it is start. Any
        RuntimeError of a trial ends the search, and a line says so: for want of memory, because no algorithm or no
        32-bit index goes so far. Raises UserError if the process has lost its GPU by it.
        """
        size, failure = start, ""
        while self.is_gpu and not failure and 2 * size <= limit:
            try:
                try_batch(2 * size)
                self.synchronize()  # what a kernel did wrong shows here at the latest
                size *= 2
            except RuntimeError as error:
                failure = _first_line(error)
        if failure:  # only here, outside the handler, is what the trial held free
            self._still_works(f"evaluation batches of {2 * size} failed ({failure})", f"--eval-batch-size {size}")
            torch.cuda.empty_cache()
            said = f"evaluation batches of {2 * size} do not fit, so that {size} are taken: {failure}"
            print(said, file=sys.stderr, flush=True)
        return size

    def _still_works(self, after: str, instead: str) -> None:
        """Raises UserError if the process has lost its GPU, which fails then whatever is asked of it."""
        try:
            self.synchronize()
        except RuntimeError as error:
            raise UserError(
                f"{after}, and since then the GPU refuses this process all work ({_first_line(error)}). Start again "
                f"with {instead}; where that fails too, with --ops reference."
            ) from error

    def compile_step(self, step: Callable, example: Sequence[Batch]) -> Callable:
        """A training step as this device runs it best, warmed up on the batches of `example`: recorded, or unchanged.

        step(batches) -> {name: scalar}. The warm-up runs it for good on `example`: see `State.unchanged`.
        """
        batches = [self.to_device(batch) for batch in example]
        if not self.records_steps:
            for _ in range(graphs.WARM_UPS):
                step(batches)
            return step
        return graphs.recorded(step, self.recorder, batches, graphs.STEP_WARM_UPS)

    def ready(self, step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        """A step that is not recorded, as this device wants it: unchanged, but on a TPU, where shapes are fixed."""
        return step

    def flush(self) -> None:
        """Starts the work asked for so far where a device gathers it first, between forward passes and after steps."""

    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Averages gradients over the processes where `parallel` does not see to it."""

    def to_host(self, contents: Any) -> Any:
        """A copy of a checkpoint's contents, dictionaries and lists of tensors and numbers, that training leaves as it
        is; the tensors in host memory, so that it can be read anywhere."""
        if isinstance(contents, Tensor):
            return contents.detach().to("cpu", copy=True)
        if isinstance(contents, dict):
            return {key: self.to_host(value) for key, value in contents.items()}
        return [self.to_host(value) for value in contents] if isinstance(contents, list | tuple) else contents

    def compile_inference(self, infer: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """A function of a batch on the device that changes nothing: recorded at first use, or unchanged."""
        return graphs.recorded_by_shape(infer, self.recorder) if self.recorder else infer

    def close(self) -> None:
        """Gives back what was recorded. Before the process group goes: NCCL waits for recordings of its own calls."""
        if self.recorder:
            self.recorder.close()

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """A point in the work of a GPU, for `seconds`; None on the CPU, which does its work when it is asked to."""
        if not self.is_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[tuple[Any, Any]]) -> float:
        """How long a GPU was at work from the first to the second of each pair of marks that it has passed; 0 on the
        CPU."""
        return sum(start.elapsed_time(end) for start, end in marks) / 1e3 if self.is_gpu else 0.0

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

    def set_rng_state(self, state: Tensor) -> bool:
        """Restores what `rng_state` returned; whether it was of this kind of device, whose own generator else stays."""
        size, known = torch.get_rng_state().numel(), len(state) == len(self.rng_state())
        torch.set_rng_state(state[:size].clone())
        if known and len(state) > size:
            self._set_own_rng_state(state[size:].clone())
        return known

    def _set_own_rng_state(self, state: Tensor) -> None:  # what of a state is not the host's
        torch.cuda.set_rng_state(state, self.device)

    def describe(self) -> dict[str, str]:
        """The machine in words, for reports: python, torch, device, processor."""
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


def select(
    device: str, precision: str, local_rank: int = 0, graphs: str = "off", world_size: int = 1, local_size: int = 1,
    benchmark_limit: int | None = None,
) -> Backend:  # fmt: skip
    """Chooses the device of this process and sets the global precision switches.

    device: one of DEVICES; "auto" takes the GPU with the index local_rank if there is one, else a TPU that torch sees,
    else the CPU. precision: one of PRECISIONS; "auto" as `resolve` has it.
    graphs: one of GRAPHS, what a GPU records: "auto" inference, and steps if it is the only GPU of the run.
    benchmark_limit: algorithms that cuDNN tries for each convolution, 0 for all; None leaves torch's own number.
    Raises UserError for a device that is not there, and for graphs "on" where there is no GPU. To be called before the
    process group is made, whose library reads its variables then.
    """
    from detcore.device import tpu as backend_tpu

    device, precision = resolve(device, precision)
    eager = _why_eager(device, graphs, world_size)
    if device == "tpu":
        return backend_tpu.select(precision, local_rank, local_size)
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        local_rank = 0 if count == 1 else local_rank  # the launcher gave each process a GPU of its own
        if local_rank >= count:
            raise UserError(
                f"--device cuda: process {local_rank} of this machine has no GPU, torch sees {count}. "
                "Start fewer processes, check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES, or use --device cpu."
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # shapes are fixed, so that trying the convolutions out pays
        if benchmark_limit is not None:
            torch.backends.cudnn.benchmark_limit = benchmark_limit
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 wants a GPU; on the CPU use fp32 or bf16.")
    # These set torch's older and newer switches alike. After the newer alone torch refuses to read the older, which
    # parts of torch.compile do.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    recorder = GraphRecorder(chosen, steps=not eager) if device == "cuda" and graphs != "off" else None
    return Backend(chosen, precision, recorder, eager)


def resolve(device: str, precision: str) -> tuple[str, str]:
    """Both with what "auto" stands for: bf16 on GPU and TPU, fp16 on a GPU that only emulates bf16, fp32 on the CPU."""
    from detcore.device import tpu as backend_tpu

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "tpu" if backend_tpu.found() else "cpu"
    if precision == "auto":
        old = device == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)
        precision = "fp32" if device == "cpu" else "fp16" if old else "bf16"
    return device, precision


def _why_eager(device: str, graphs: str, world_size: int) -> str:
    """Why steps are not recorded; "" if they are."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []  # not Linux: the architecture is all that is known without a subprocess
    return names[0] if names else platform.processor() or platform.machine()
