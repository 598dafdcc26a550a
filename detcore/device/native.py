"""Which implementation of an op runs: the program's compiled library, or the plain PyTorch reference.

One rule for all ops: native if the library is built and has the op for the tensors' device and dtype, else the
reference. Config field `ops` says auto, reference or native; native raises where auto would take the reference.

Beside it the variants: faster ways to compute the same, each calculated to win and off until a GPU has confirmed it.
Config field `variants` names those to use.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from struct import unpack_from

import torch
from torch import Tensor

from detcore import UserError

POLICIES = ("auto", "reference", "native")
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""What a kernel computes with; float64, for checks of gradients, is the reference's alone."""

VARIANTS = {
    "merged_groups": "grouped convolutions as ones of 64 channels a group, whose weights are block-diagonal",
    "conv_epilogues": "bias, residual and ReLU inside the convolution's own kernel, also where gradients flow",
    "frozen_stage": "the same only in layers that do not train",
    "residual_gradient": "the gradient of the shortcut is added in the kernel that masks it",
    "class_bias": "the class convolution's bias and its gradient inside focal loss and candidates",
    "stem": "the stem's pooling, bias and ReLU in one pass without indices, from images padded to 4 channels",
    "multi_cast": "all folded and narrow copies of the weights made in one pass",
    "small_levels": "the heads' small pyramid levels on a stream of their own",
    "norm_activations": "batch normalisation in training and the activation after it as one op (EfficientDet)",
    "pyramid_nodes": "a node of EfficientDet's pyramid, up to its activation, in one pass",
    "fp8_heads": "the heads' convolutions in 8-bit floating point: other numbers, not only another order",
}
"""What each variant does."""

ROOT = Path(__file__).parents[2]
_policy = "auto"
_variants: frozenset[str] = frozenset()


def choose(policy: str, variants: Collection[str] = ()) -> None:
    """Sets the rule of this process: one of POLICIES, and which of VARIANTS are on."""
    global _policy, _variants
    if policy not in POLICIES:
        raise UserError(f"--ops {policy}: choose one of {', '.join(POLICIES)}")
    if unknown := set(variants) - set(VARIANTS):
        raise UserError(f"--variants {','.join(sorted(unknown))}: choose among {', '.join(VARIANTS)}")
    _policy, _variants = policy, frozenset(variants)


@contextmanager
def using(policy: str, *variants: str) -> Iterator[None]:
    """`choose` for the length of a block."""
    before = _policy, _variants
    choose(policy, variants)
    try:
        yield
    finally:
        choose(*before)


@torch.compiler.assume_constant_result
def variant(name: str) -> bool:
    """Whether one of VARIANTS is on; never with the references alone, which are what the others are measured by."""
    if name not in VARIANTS:
        raise KeyError(name)
    return name in _variants and _policy != "reference"


@torch.compiler.assume_constant_result
def fp8_heads(device: str) -> bool:
    """Whether variant fp8_heads is on. Raises UserError if it is and this type of device has nothing for it: it runs on
    GPUs whose tensor cores take 8-bit numbers, by Triton, and is emulated on the CPU."""
    if not variant("fp8_heads"):
        return False
    if missing := _no_fp8(device):
        raise UserError(f"--variants fp8_heads: {missing}; leave it out")
    return True


@lru_cache
def _no_fp8(device: str) -> str:
    """Why 8-bit convolutions can't run on a type of device; "" if they can."""
    if device == "cpu":
        return ""
    if device != "cuda":
        return f"no code for tensors on {device}"
    if torch.cuda.get_device_capability() < (8, 9):
        return f"{torch.cuda.get_device_name()} computes with 8 bits only from compute capability 8.9 on"
    return "" if find_spec("triton") else "Triton is not installed, which comes with torch's builds for GPUs"


def library_file(program: str) -> Path:
    """Where setup.py puts a program's library, such as single_stage_detector/_kernels.so."""
    return ROOT / program / "_kernels.so"


def libraries(program: str) -> list[str]:
    """The programs whose libraries compute a program's ops: its own, unless it has no kernels, and detcore."""
    own = library_file(program).exists() or (ROOT / program / "csrc").is_dir()
    return list(dict.fromkeys((program, "detcore") if own else ("detcore",)))


@lru_cache
def load(program: str) -> str:
    """Loads the library of a program ("single_stage_detector"); "" if it is there, else the reason why not."""
    file = library_file(program)
    if not file.is_file():
        return f"{file} is not built (make ops)"
    if wrong := _unsafe(file, program):
        return f"{file} {wrong}: build it again (make ops)"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        why = str(error.__cause__ or error).splitlines()[0].removeprefix(f"{file}: ")
        return (
            f"{file} can't be loaded ({why}): perhaps it was built for another version of torch than "
            f"{torch.__version__}, or of CUDA; build it again (make ops)"
        )
    return ""


def _unsafe(file: Path, program: str) -> str:
    """What is wrong with a library that would end the process instead of raising OSError when it is loaded, or "".

    In ELF files of 64 bits the table of sections comes last; the loader maps what is missing before it all the same,
    and reading there is SIGBUS. Ops that another library has defined already are SIGABRT; every library names its
    program, but all name detcore.
    """
    content = file.read_bytes()
    if not content.startswith(b"\x7fELF\x02\x01"):  # all others are refused properly
        return ""
    if len(content) < 64:
        return "is cut off"
    sections, size, count = *unpack_from("<Q", content, 40), *unpack_from("<HH", content, 58)
    if sections + size * count > len(content):
        return "is cut off"
    return "" if f"{program}\0".encode() in content else f"is not the library of {program}"


def loaded(op: str) -> bool:
    """Whether the library is there and has the op, which one from before the op's time has not."""
    program, _, name = op.partition("::")
    return not load(program) and name in _ops(program)


def runs(op: str, *tensors: Tensor, dtypes: Sequence[torch.dtype] = FLOATING) -> bool:
    """Whether the native op ("single_stage_detector::match") shall run on these tensors.

    dtypes: those that the op takes; all floating tensors must have one of them. Raises UserError if ops is native and
    the op can't run.
    """
    if _policy == "reference":
        return False
    missing = _missing(op, tensors, dtypes)
    if missing and _policy == "native":
        raise UserError(f"--ops native: {op} can't run: {missing}; --ops auto takes the reference instead")
    return not missing


def _missing(op: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> str:
    """Why the native op can't run on the tensors; "" if it can."""
    for tensor in tensors:
        if missing := _no_code(op, tensor.device.type):
            return missing
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            return f"no code for {tensor.dtype}"
    return ""


@torch.compiler.assume_constant_result  # torch.compile asks once, instead of tracing how a library is loaded
def _no_code(op: str, device: str) -> str:
    """Why the library has no code of an op for a type of device; "" if it has."""
    program, _, name = op.partition("::")
    missing = load(program)
    if missing or has(op, device):
        return missing
    if name not in _ops(program):
        return f"{library_file(program)} has no op {name}: build it again (make ops)"
    return f"the library has no code for tensors on {device}"


@lru_cache
def has(op: str, device: str) -> bool:
    """Whether an op, also one of torch's own, has code for a type of device."""
    program, _, name = op.partition("::")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    known = key is not None and name in _ops(program)  # torch refuses to be asked about others
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)


@lru_cache
def _ops(program: str) -> frozenset[str]:
    """The names of the ops that a loaded library has."""
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return frozenset(name.partition(".")[0] for library, _, name in names if library == program)


def describe(program: str, device: torch.device) -> str:
    """One line for the user: what computes the ops of a program on a device."""
    if _policy == "reference":
        return "ops: the PyTorch references (--ops reference)"
    wanted = libraries(program)
    missing = list(filter(None, (_all_missing(name, device.type) for name in wanted)))
    if not missing:
        return f"ops: {library_file(program).name}"
    which = "the PyTorch references" if len(missing) == len(wanted) else "some of the PyTorch references"
    warning = "WARNING, slower than the kernels: " if device.type == "cuda" else ""
    return f"ops: {warning}{which}, because {missing[0]}"


def _all_missing(program: str, device: str) -> str:
    """Why a program's library has nothing for a type of device; "" if it has."""
    missing = load(program)
    if not missing and not any(has(f"{program}::{op}", device) for op in _ops(program)):
        missing = f"{library_file(program)} has no code for {device}"
        missing += ": built without nvcc (make ops)" if device == "cuda" else ""
    return missing
