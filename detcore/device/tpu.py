"""TPUs: Google's torch-tpu, else torch-xla 2.9.

With torch-tpu (device `tpu`) each operation runs when it is called; with torch-xla (device `xla`) they gather in a
graph, which `flush` compiles and starts. Both compile for fixed shapes, so that a batch of another shape is an error
here instead of minutes of compiling at every step. Docs: docs/tpu.md.
"""

import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detcore import UserError
from detcore.data.ahead import one_ahead
from detcore.data.batch import Batch
from detcore.device.base import Backend

INSTALL = (
    "Install torch-tpu on a TPU machine (pip install .[tpu]); where it does not load, torch-xla 2.9 in an environment "
    "of its own (docs/tpu.md)"
)
_EAGER = "the compiler of the TPU fuses them"


@dataclass(frozen=True)
class TpuBackend(Backend):
    """A core of a TPU by torch-tpu. Gradients are summed over the links between cores; what else processes exchange
    goes over gloo, on the host."""

    @property
    def name(self) -> str:
        with warnings.catch_warnings():  # says that it is experimental
            warnings.simplefilter("ignore", UserWarning)
            name = torch.get_device_module(self.device).get_device_name()
        return f"{name} (torch-tpu {importlib.metadata.version('torch-tpu')})"

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a model to the device; its batch normalisation computes and learns in float32 whatever the precision.

        bf16 has 8 bits: a moving average in it stands still, and the sums behind mean and variance lose most of what
        they add. Autocast leaves the input of a normalisation as it is on some devices.
        """
        model = model.to(self.device)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        learns = not norms or self._learns_statistics()
        for norm in norms:
            norm.register_forward_pre_hook(_in_float32)
            if not learns:
                norm.register_forward_pre_hook(_learn_statistics)
        return model

    def _learns_statistics(self) -> bool:
        """Whether the device's batch normalisation keeps its running statistics up; torch-tpu 0.2.0 leaves them."""
        norm = nn.BatchNorm1d(1).to(self.device)
        norm(torch.tensor([[1.0], [3.0]]).to(self.device))
        return norm.running_mean.item() != 0

    def parallel(self, model: nn.Module, world_size: int) -> nn.Module:
        """The model itself, since `reduce_gradients` averages the gradients. Each core keeps its own running statistics
        until an evaluation or a checkpoint takes those of rank 0."""
        return model

    @torch.no_grad()
    def reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """The mean of the gradients over all cores, in one all-reduce."""
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        self.all_reduce_sum(together)
        together /= dist.get_world_size()
        for gradient, mean in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def all_reduce_sum(self, values: Tensor) -> None:
        """The sum of a tensor over all cores, in place, by the links between them."""
        dist.all_reduce(values, group=_core_group())

    def to_device(self, batch: Batch) -> Batch:
        """Copies a batch to the device as it is, the images as bytes; padding too, since shapes must not change."""
        return batch.map(lambda t: t.to(self.device))

    def prefetch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches on the device, each fetched and sent one step before it is asked for, while the device works."""
        return one_ahead(batches, lambda source: self.to_device(next(source)), lambda sent: sent)

    def prepare_eager_step(self, step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        """The step for batches of one shape, that of the first: another raises UserError."""
        first: list[dict[str, str]] = []

        def run(batches: Sequence[Batch]) -> dict[str, Tensor]:
            for batch in batches:
                shapes = {name: _shape(tensor) for name, tensor in zip(Batch._fields, batch, strict=True)}
                if not first:
                    first.append(shapes)
                changed = [
                    f"{name} was {old}, is {shapes[name]}" for name, old in first[0].items() if old != shapes[name]
                ]
                if changed:
                    raise UserError(
                        f"the shape of the batches changed ({'; '.join(changed)}): a TPU would compile the step again, "
                        "which takes minutes. Batches must keep one shape: one --batch-size and --max-boxes"
                    )
            return step(batches)

        return run

    def flush(self) -> None:
        """Nothing: work starts when it is asked for."""

    def synchronize(self) -> None:
        torch.accelerator.synchronize()

    def peak_memory_gib(self) -> float:
        with warnings.catch_warnings():  # an emulation knows no such numbers, and says so
            warnings.simplefilter("ignore")
            return torch.accelerator.max_memory_allocated() / 2**30 or super().peak_memory_gib()

    def _device_rng_state(self) -> Tensor:
        return self._generator().get_state().cpu()

    def _set_device_rng_state(self, state: Tensor) -> None:
        self._generator().set_state(state)

    def _generator(self) -> torch.Generator:
        return torch.get_device_module(self.device).default_generators[torch.accelerator.current_device_index()]


@dataclass(frozen=True)
class XlaBackend(TpuBackend):
    """A core of a TPU by torch-xla, or, with PJRT_DEVICE=CPU, the same program on the CPU."""

    @property
    def name(self) -> str:
        import torch_xla
        from torch_xla import runtime

        return f"{runtime.device_type()} (torch-xla {torch_xla.__version__})"

    def _learns_statistics(self) -> bool:
        return True

    def to_device(self, batch: Batch) -> Batch:
        """As with torch-tpu; sent at once, not with the graph that uses it."""
        from torch_xla.core import xla_model

        if batch.images.device.type == self.device.type:
            return batch
        with torch.inference_mode(False):  # torch-xla can't make views of tensors of that mode
            return Batch(*xla_model.send_cpu_data_to_device(list(batch), self.device))

    def all_reduce_sum(self, values: Tensor) -> None:
        from torch_xla.core import xla_model

        xla_model.all_reduce(xla_model.REDUCE_SUM, [values])

    def flush(self) -> None:
        import torch_xla

        torch_xla.sync()

    def compile_inference(self, infer: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Inference of one batch as one program; outside of inference mode, as `to_device`."""

        def run(batch: Batch) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                found = infer(batch)
            self.flush()
            return found

        return run

    def prepare_eager_step(self, step: Callable, optimizer: torch.optim.Optimizer) -> Callable:
        """Momentum begins as the zeros it stands for, so that the first step is the same program as all others."""
        for group in optimizer.param_groups:
            if group.get("momentum") and not group.get("dampening"):
                for parameter in group["params"]:
                    optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        self.flush()
        return super().prepare_eager_step(step, optimizer)

    def synchronize(self) -> None:
        from torch_xla.core import xla_model

        self.flush()
        xla_model.wait_device_ops()

    def peak_memory_gib(self) -> float:
        from torch_xla.core import xla_model

        try:
            return xla_model.get_memory_info(self.device)["peak_bytes_used"] / 2**30
        except (RuntimeError, KeyError):  # the CPU counts none
            return super(TpuBackend, self).peak_memory_gib()

    def _device_rng_state(self) -> Tensor:
        from torch_xla.core import xla_model

        seed = xla_model.get_rng_state().to_bytes(8, "little")  # of 64 bits without a sign
        return torch.tensor(list(seed), dtype=torch.uint8)

    def _set_device_rng_state(self, state: Tensor) -> None:
        from torch_xla.core import xla_model

        xla_model.set_rng_state(int.from_bytes(bytes(state.tolist()), "little"))


def found() -> bool:
    """Whether torch itself sees a TPU, which torch-tpu makes it do."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == "tpu"


def open_core(precision: str, local_rank: int = 0, local_size: int = 1) -> Backend:
    """The TPU core of this process: by torch-tpu if that has loaded, else by torch-xla.

    precision: "auto" and "bf16", or "fp32" and "tf32", which are both exact: by itself a TPU would multiply in bf16.
    Raises UserError for fp16, and where there is no TPU.
    """
    if precision == "fp16":
        raise UserError("--precision fp16 wants a GPU; on a TPU use bf16 or fp32")
    precision = {"auto": "bf16", "tf32": "fp32"}.get(precision, precision)
    accelerator = torch.accelerator.current_accelerator()  # after torch-tpu has loaded: on a TPU it does so by itself
    if accelerator is not None and accelerator.type == "tpu":
        torch.set_float32_matmul_precision("highest")
        if local_size > 1:
            torch.accelerator.set_device_index(local_rank % max(torch.accelerator.device_count(), 1))
        return TpuBackend(torch.device("tpu"), precision, eager=_EAGER)
    return _open_xla_core(precision, local_rank, local_size)


def before_launch(processes: int) -> None:
    """Sets the environment variables that torch-tpu needs before the processes of several cores are started."""
    if found():
        importlib.import_module("torch.tpu.distributed").set_tpu_launch_env(nproc_per_node=processes)


def _open_xla_core(precision: str, local_rank: int, local_size: int) -> Backend:
    missing = f"--device tpu: torch-tpu is {_state_of('torch-tpu')}, torch-xla is {_state_of('torch-xla')}"
    try:
        torch_xla = importlib.import_module("torch_xla")
    except (ImportError, OSError) as error:
        raise UserError(f"{missing}. {INSTALL}") from error
    from torch_xla import runtime
    from torch_xla.backends import set_mat_mul_precision

    asked = os.environ.get("PJRT_DEVICE", "")
    if local_size > 1:
        # What torch_xla.launch calls in each process that it starts; here torchrun has started them.
        importlib.import_module("torch_xla._internal.pjrt").initialize_multiprocess(local_rank, local_size)
    if runtime.device_type() != "TPU" and not asked:
        raise UserError(
            f"{missing}, and no TPU is there (it sees {runtime.device_type()}). PJRT_DEVICE=CPU runs the same program "
            f"on the CPU, to try it out. {INSTALL}"
        )
    device = torch_xla.device()  # before the first backward pass on the CPU: autograd counts the devices then
    logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns at the first call of calling it twice
    set_mat_mul_precision("highest")
    return XlaBackend(device, precision, eager=_EAGER)


@cache
def _core_group() -> dist.ProcessGroup:
    return dist.new_group(backend="tpu_dist")


def _state_of(package: str) -> str:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return f"{version} and sees no TPU" if package == "torch-tpu" else version


def _in_float32(norm: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32)),)


@torch.no_grad()
def _learn_statistics(norm: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor]) -> None:
    """What torch's batch normalisation does to its running statistics in training."""
    if not norm.training or norm.running_mean is None:
        return
    values = inputs[0]
    variance, mean = torch.var_mean(values, [axis for axis in range(values.ndim) if axis != 1], correction=1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance, norm.momentum)


def _shape(tensor: Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"
