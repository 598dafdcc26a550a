"""Who this process is among the others, from the variables of whatever started it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

from detcore import UserError

_DEFAULT_PORT = 29500


class World(NamedTuple):
    """This process' place: rank of size in all, local_rank of local_size on its host; master is rank 0's host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: str = "127.0.0.1"


def discover(environ: Mapping[str, str]) -> tuple[World, int]:
    """This process' place and the rendezvous port.

    From torchrun's variables, else Slurm's, else Open MPI's; without any, one process alone. Raises `UserError` for
    variables that are missing, malformed or contradict each other.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        launcher, names = "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        # Enroot's PyTorch hook sets all but this one from Slurm's variables.
        local_size = environ.get("LOCAL_WORLD_SIZE") or _slurm_local_size(environ)
    elif "SLURM_PROCID" in environ and (environ.get("SLURM_NTASKS", "1") != "1" or "SLURM_STEP_ID" in environ):
        launcher, names = "srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if "SLURM_STEP_ID" not in environ:
            raise UserError(
                f"SLURM_NTASKS={environ['SLURM_NTASKS']} but SLURM_STEP_ID is missing: this process was started in a "
                "batch script without srun. Start it with srun or torchrun; for one process: env -u SLURM_PROCID"
            )
        local_size = _slurm_local_size(environ)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        launcher, names = "mpirun", tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK"))
        local_size = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    else:
        return World(), _DEFAULT_PORT
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(f"{launcher} variables are incomplete: {', '.join(missing)} missing; start with {launcher}")
    rank, size, local_rank = (_number(name, environ[name]) for name in names)
    local_size = size if local_size is None else _number("the number of processes on this host", local_size)
    if not (rank < size and local_rank < local_size <= size):
        given = ", ".join(f"{name}={environ[name]}" for name in names)
        raise UserError(f"{launcher} variables contradict each other: {given}, {local_size} processes on this host")
    if size == 1:
        return World(), _DEFAULT_PORT
    if launcher == "torchrun" and not environ.get("MASTER_PORT"):
        raise UserError("MASTER_PORT is missing although WORLD_SIZE is set; start with torchrun, or set it")
    port = _number("MASTER_PORT", environ.get("MASTER_PORT") or str(_DEFAULT_PORT))
    master = environ.get("MASTER_ADDR") or _first_host(environ, launcher, local_size == size)
    return World(rank, size, local_rank, local_size, master), port


def spread(processes: int, module: str, argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Goes on as `processes` processes of `python -m module argv` on this machine, through torchrun in place of this
    process; does nothing where they are there already, and for 0.

    As through run_and_time.sh, torchrun hands signals on and makes exit code 1 of every failure. Raises `UserError`
    where a launcher has started another number.
    """
    world, _ = discover(environ)
    if processes in (0, world.local_size):
        return
    if world.size > 1 or "RANK" in environ:
        raise UserError(
            f"--num-cores {processes}: a launcher has started {world.local_size} processes on this machine already; "
            "leave the option out, or start the program once"
        )
    from detcore import backend_tpu

    backend_tpu.before_launch(processes)
    environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1")
    environ.setdefault("PET_SHUTDOWN_TIMEOUT", "300")
    environ.setdefault("OMP_NUM_THREADS", "1")  # they share the processor's cores
    together = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-m", "torch.distributed.run", *together, "-m", module, *argv], dict(environ)
    )


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}={text!r} is not valid, expected a whole number")
    return int(text)


def _slurm_local_size(environ: Mapping[str, str]) -> str | None:
    """This node's entry in Slurm's list of tasks a node, such as "4(x2),3"; None where it cannot be told."""
    per_node = []
    for part in (environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        tasks, _, times = part.partition("(x")
        per_node += [tasks] * int(times.rstrip(")") or 1) if re.fullmatch(r"\d+(\(x\d+\))?", part) else []
    node = environ.get("SLURM_NODEID", "0")
    return per_node[int(node)] if node.isdecimal() and int(node) < len(per_node) else None


def _first_host(environ: Mapping[str, str], launcher: str, one_host: bool) -> str:
    """Rank 0's host where MASTER_ADDR does not say it."""
    if one_host:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if launcher == "srun" and nodes and "[" not in nodes:
        return nodes.split(",")[0]
    if launcher == "srun" and nodes and shutil.which("scontrol"):
        answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    raise UserError("MASTER_ADDR is missing: set it to the name of the host of rank 0, before the processes start")
