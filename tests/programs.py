"""Training programs in processes of their own, to be looked at or killed in the middle: for all benchmarks.

`python -m a.program` spends seconds on importing torch, more than on most of what a test wants to see. So each process
of the tests has one server that has imported what programs import, and forks: the child becomes `python -m a.program`,
in a session of its own, with its own environment, command line and output, and ends as every interpreter does.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["torch._dynamo", "torchvision", *(f"{path.parent.name}.train" for path in sorted(ROOT.glob("*/train.py")))]


def environment(**variables: str) -> dict[str, str]:
    """One thread: runs are compared bit for bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def whole_lines(path: Path) -> list[str]:
    """The lines that are written to their end; none of a file that is not there."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Program:
    """A program that runs in the root of the checkout: one at a time.

    command: [python, "-m", module, word, ...]. out, err: files for its output.
    """

    def __init__(self, command: Sequence[object], out: str, err: str, **variables: str) -> None:
        assert command[1] == "-m"
        request = {"words": list(map(str, command[2:])), "out": out, "err": err, "environ": environment(**variables)}
        self.server = server()
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        self.pid, self.returncode = int(self.server.stdout.readline()), None

    def poll(self, timeout: float | None = 0.0) -> int | None:
        """The exit code, negative for a signal, or None if it runs for longer than these seconds (None: for ever)."""
        if self.returncode is None and select.select([self.server.stdout], [], [], timeout)[0]:
            self.returncode = int(self.server.stdout.readline())
        return self.returncode

    def kill(self) -> None:
        """Kills it and all that it started, unless it has ended."""
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
            os.killpg(self.pid, signal.SIGKILL)
        self.poll(None)  # else its end would be read as the next one's


def run(command: Sequence[object], timeout: float = 400.0, **variables: str) -> subprocess.CompletedProcess:
    """A program with further environment variables, run to its end as by subprocess.run(capture_output=True)."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        program = Program(command, *map(str, files), **variables)
        try:
            assert program.poll(timeout) is not None, f"no end within {timeout:g} s: {files[1].read_text()[-3000:]}"
        finally:
            program.kill()
        return subprocess.CompletedProcess(command, program.returncode, *(file.read_text() for file in files))


def kill_at(command: Sequence[str], out: Path, step: int) -> None:
    """Starts a run and kills it, and all it started, as soon as it has itself reported that step or a later one.

    out: its output folder. The run must log every step.
    """
    progress = out / "progress.jsonl"
    old = len(whole_lines(progress)) if "--resume" in command else 0
    if not old:
        progress.unlink(missing_ok=True)
    program = Program(command, os.devnull, os.devnull)
    try:
        while program.poll() is None:
            steps = [json.loads(line)["step"] for line in whole_lines(progress)[old:] if '"kind": "step"' in line]
            if steps and steps[-1] >= step:
                break
            time.sleep(0.01)
        assert program.poll() is None, "the run ended before it could be killed"
    finally:
        program.kill()


@functools.cache
def server() -> subprocess.Popen:
    """This process's own; it ends with it."""
    command = [sys.executable, "-m", "tests.programs"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}  # what is read is never more than said
    return subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)


def serve() -> dict:
    """Forks for each request, a line, and answers with two: the child's process id and, at its end, its exit code.

    Returns the request in the child.
    """
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def become(words: Sequence[str], out: str, err: str, environ: dict[str, str]) -> None:
    """This process becomes `python -m` of the words; it does not return."""
    os.setsid()
    for number, name in enumerate((os.devnull, out, err)):
        file = os.open(name, (os.O_WRONLY | os.O_CREAT) if number else os.O_RDONLY)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[1:] = words[1:]
    sys.modules.pop(words[0], None)  # it is imported as __main__ alone
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    gc.freeze()  # the children's collections leave it alone
    become(**serve())
