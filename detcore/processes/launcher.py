"""The rank of this process and the number of processes, from the environment variables of the launcher."""

import re
import shutil
import subprocess
from collections.abc import Mapping
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
