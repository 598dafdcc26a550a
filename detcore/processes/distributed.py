"""Joining the other processes of the job, and the collectives of training.

With one process there is no process group, and every function here works without one.
"""

import faulthandler
import os
import secrets
import signal
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from detcore import UserError
from detcore.processes.launcher import World, discover

_MASK = 2**64 - 1


def init(
    backend: str, timeout_s: float, environ: Mapping[str, str] = os.environ, device: torch.device | None = None
) -> World:
    """Join the other processes that the launcher started; with one process, do nothing.

    `backend` is torch.distributed's ("gloo", "nccl"); a collective that takes longer than `timeout_s` fails. `device`:
    where collectives run; on an accelerator they are set up now, not at the first use. From here on SIGQUIT prints the
    stacks of this process. Raises `UserError` for missing or contradictory variables and when the processes do not find
    each other in time.
    """
    world, port = discover(environ)
    if world.size == 1:
        return world
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # shows where this process stands, to whoever asks
    # torchrun's agent itself opens the port, which only env:// knows about; otherwise rank 0 opens it.
    method = "env://" if "TORCHELASTIC_RUN_ID" in environ else f"tcp://{world.master}:{port}"
    try:
        dist.init_process_group(
            backend,
            init_method=method,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=None if device is None or device.type == "cpu" else device,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {world.rank} of {world.size} could not join the others at {world.master}:{port} "
            f"({str(error).strip().splitlines()[0][:200]}). Check that all {world.size} processes were started, that "
            "MASTER_ADDR is rank 0's host, and that MASTER_PORT is free there"
        ) from error
    return world


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_buffers(model: torch.nn.Module, device: torch.device | str = "cpu") -> None:
    """Give every rank the buffers of rank 0's model, such as the running statistics of its normalisation.

    device: where the process group takes them.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            value = buffer.to(device)
            dist.broadcast(value, src=0)
            buffer.copy_(value)


def choose_seed(seed: int | None, device: torch.device | str = "cpu") -> int:
    """The seed of the run, equal on all ranks: rank 0's `seed`, or, where that is None, 31 bits from the system."""
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not valid, expected a whole number from 0 to 2**63 - 1")
    chosen = torch.tensor([secrets.randbits(31) if seed is None else seed], dtype=torch.int64, device=device)
    if dist.is_initialized():
        dist.broadcast(chosen, src=0)
    return int(chosen)


def derive_seed(seed: int, *stream: int) -> int:
    """A seed of 63 bits for one purpose, named by numbers such as (epoch, rank): the same on every machine, and another
    one for other numbers.

    Folds the numbers (0 to 2**63 - 1) into the state of splitmix64 (Steele, Lea, Flood 2014).
    """
    state = _splitmix64(seed)
    for number in stream:
        state = _splitmix64(state ^ number)
    return state >> 1


def all_reduce_max(values: list[int], device: torch.device | str = "cpu") -> list[int]:
    """The largest of each value over all ranks, on every rank, by one all-reduce on `device`."""
    if not dist.is_initialized():
        return list(values)
    together = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return together.tolist()


def all_reduce_mean(values: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mean of a floating tensor over all ranks, on the device that it came from."""
    if not dist.is_initialized():
        return values
    together = values.to(device)
    dist.all_reduce(together, op=dist.ReduceOp.SUM)
    return (together / dist.get_world_size()).to(values.device)


def gather_rows(rows: torch.Tensor) -> torch.Tensor | None:
    """Rows [n, C] of all ranks, concatenated in rank order, on rank 0; None on the others.

    n may differ from rank to rank and be 0; C and dtype must not. The tensors travel from the device they are on.
    """
    if not dist.is_initialized():
        return rows
    rank, size = dist.get_rank(), dist.get_world_size()
    counts = all_reduce_max([len(rows) if k == rank else 0 for k in range(size)], rows.device)
    if max(counts) == 0:
        return rows if rank == 0 else None
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)] if rank == 0 else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.cat([part[:n] for part, n in zip(parts, counts)])


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def rebuild_ddp_buckets(parallel: DistributedDataParallel) -> None:
    """Has DistributedDataParallel assign gradients to its buckets now, by a backward pass of zeros.

    It rebuilds them once, after the first backward pass, and the buckets decide the order of the sums: the first step
    of a resumed run would be rounded unlike the same step of a run that was never stopped.
    """
    model = parallel.module
    # Created last, differentiated first: so the all-reduce begins with the last parameters, whose gradients come first.
    model.forward = lambda: sum((p * 0).sum() for p in model.parameters() if p.requires_grad)
    parallel().backward()
    del model.forward
    model.zero_grad(set_to_none=True)
