"""Runs small worlds of tools.preflight, real processes each, all at once; see test_preflight.py.

`python -m tests.tools.preflight_worlds FOLDER`, in the checkout: FOLDER/worlds.json says {world: [[node, folder to be
in, code to run first, options] for each rank]}; a rank without a node is not started. Forks them after one import of
torch. What a rank says goes to FOLDER/<world>.<rank>.out and .err, the exit codes to FOLDER/codes.json.
"""

import json
import os
import socket
import sys
from pathlib import Path

from detcore.cli import run_main
from tools.preflight import __main__ as preflight
from tools.preflight import checks, job, team


def run_rank(name: str, rank: int, size: int, port: int, folder: Path, setting: list) -> None:
    node, place, code, options = setting
    for number, ending in (1, "out"), (2, "err"):
        os.dup2(os.open(folder / f"{name}.{rank}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(place)
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()})
    socket.gethostname = lambda: node
    exec(code, {"team": team, "checks": checks, "job": job, "os": os})
    code = run_main(preflight.main, options)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> None:
    worlds = json.loads((folder / "worlds.json").read_text())
    codes = {name: [None] * len(ranks) for name, ranks in worlds.items()}
    running = {}
    for name, settings in worlds.items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, setting in enumerate(settings):
            if setting[0]:
                pid = os.fork()
                if pid == 0:
                    run_rank(name, rank, len(settings), port, folder, setting)
                running[pid] = (name, rank)
    while running:
        pid, status = os.wait()
        name, rank = running.pop(pid)
        codes[name][rank] = os.waitstatus_to_exitcode(status)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
