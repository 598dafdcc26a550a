"""Runs small worlds of real processes under the watchdog, one for each scenario, all at once; see test_watchdog.py.

`python ranks.py FOLDER SCENARIO...`: forks the ranks of every scenario after one import of torch. What a rank prints
goes to FOLDER/<scenario>/<rank>.err, the exit codes (negative: the signal) to FOLDER/codes.json.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist

from detcore.cli import run_main
from detcore.processes import distributed, watchdog

DEAD_S, HANG_S, BAD_STEP = 4.0, 7.0, 5


def misbehave(scenario: str, rank: int, dog) -> None:
    culprit = int(scenario[-1])
    what = scenario[:-1]
    if rank == culprit:
        published = dog._exchanges + 4
        while dog._exchanges < published and what != "alone_asleep":
            time.sleep(0.1)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what in ("asleep", "alone_asleep", "behind"):
            sleeping_for_ever()
        if what == "raising":
            raise ValueError("boom")
        if what == "in_c":
            ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock
    elif what == "behind":
        dog.beat("evaluation", 0)
        distributed.all_reduce_max([0])


def sleeping_for_ever() -> None:
    while True:
        time.sleep(3600)


def work(scenario: str, world, folder: Path) -> int:
    hang_s = HANG_S if scenario[:-1].removeprefix("alone_") in ("asleep", "behind", "late") else 1000
    with watchdog.Watchdog(world, hang_s, DEAD_S, folder, quick_hang_s=5.0) as dog:
        if "late" in scenario:
            late = world.rank == int(scenario[-1])
            for step in range(70 if late else 3):
                dog.beat("data", step)
                time.sleep(0.2)
            return 0
        if scenario.startswith("familiar"):
            for step in range(60):
                dog.beat("step", step)
                time.sleep(0.01)
            if world.rank == int(scenario[-1]):
                sleeping_for_ever()
            dog.beat("other", 60)  # never seen before: 1000 s for it
            distributed.all_reduce_max([0])
        for step in range(BAD_STEP + 1):
            dog.beat("data", step)
            if step == BAD_STEP:
                misbehave(scenario, world.rank, dog)
            dog.beat("step", step)
            distributed.all_reduce_max([step])
        if world.size > 1:
            dist.all_reduce(torch.ones(1))
    return 0


def run_rank(scenario: str, rank: int, size: int, port: int, folder: Path) -> None:
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = distributed.init("gloo", 600, {name: str(value) for name, value in names.items()})
    code = run_main(lambda argv: work(scenario, world, folder), [])
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path, scenarios: list[str]) -> None:
    codes: dict[str, list] = {}
    running = {}
    for scenario in scenarios:
        (folder / scenario).mkdir()
        size = 1 if scenario.startswith("alone") else 3 if scenario.startswith("killed") else 2
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        codes[scenario] = [None] * size
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                run_rank(scenario, rank, size, port, folder / scenario)
            running[pid] = (scenario, rank)
    while running:
        pid, status = os.wait()
        scenario, rank = running.pop(pid)
        codes[scenario][rank] = os.waitstatus_to_exitcode(status)
        left = [pid for pid, (name, _) in running.items() if name == scenario]
        if scenario.startswith("stopped"):  # the others are through: wake it up, it must end by itself
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGCONT)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
