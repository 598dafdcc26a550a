"""What the programs of all benchmarks do before they train."""

import os
import sys
from collections.abc import MutableMapping, Sequence

from detcore import UserError
from detcore.device import tpu
from detcore.processes.launcher import discover


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
    tpu.before_launch(processes)
    environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1")
    environ.setdefault("PET_SHUTDOWN_TIMEOUT", "300")
    environ.setdefault("OMP_NUM_THREADS", "1")  # they share the processor's cores
    together = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-m", "torch.distributed.run", *together, "-m", module, *argv], dict(environ)
    )
