"""The processes of a check's parts: started, watched, ended, and what is said of a bad end."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tools.gpu_check.parts import Part
from tools.gpu_check.state import CONTEXT_LOST, ROOT, Row, load, put, save, status_of

COMMAND = [sys.executable, "-m", "tools.gpu_check"]
GRACE = 6.0
"""Seconds after a part's time in which its process may still write its last row."""
ENDING = 4.0
"""Seconds that ending a process may take."""
CRASHES = 6
"""So many times is a part started again whose process has died; each time without the job that it died in."""
HUNG = 30.0
"""A job that is cut off after so many seconds, and half its part's patience, counts as hung."""
REFRESH = 2.0
"""Seconds between two looks at a part's process, and between two tables."""


class Log:
    """Lines on the console and in gpu_check.log; `quietly` only in the file."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.quietly(text)

    def quietly(self, text: str) -> None:
        self.file.write(text + "\n")
        self.file.flush()


def child_environment(work: Path, site: Path | None = None) -> dict[str, str]:
    """Every cache and temporary file of the parts below the work folder; site: a folder of more packages."""
    cache, temporary = work / "cache", work / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda",
             "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis"}  # fmt: skip
    own = {name: str(cache / folder) for name, folder in names.items()}
    if len(str(temporary)) < 70:  # loader processes make sockets there, whose paths may have 107 characters
        own["TMPDIR"] = str(temporary)
    if site:
        own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return os.environ | own | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def run_part(
    part: Part, seconds: float, options: argparse.Namespace, log: Log, refresh: Callable[[], None],
    cases: tuple[str, ...] = (), first: int = 0,
) -> None:  # fmt: skip
    """Runs a part in processes of its own until it is through or its time is over; leaves its status in the JSON.

    refresh() is called every few seconds meanwhile.
    """
    out, began = options.out, time.monotonic()
    command = [*COMMAND, "--child", part.name, "--out", str(out), "--work", str(options.work)]
    command += ["--quick"] * options.quick + [word for case in cases for word in ("--case", case)]
    for name, folder in (("--data", options.data), ("--carried", options.carried)):
        command += [name, str(folder)] if folder else []
    environment = child_environment(options.work, options.site)
    before = load(out)["parts"].get(part.name, {}).get("seconds", 0)

    def running() -> str | None:
        refresh()
        return load(out)["parts"].get(part.name, {}).get("running")

    for _ in range(CRASHES):
        left = seconds - (time.monotonic() - began)
        words = [*command, "--first", str(first), "--budget", str(left)]
        code, ran = follow(words, left, part.patience, environment, log, running)
        state = load(out)
        entry = state["parts"].setdefault(part.name, {})
        again = judge(entry, code, ran, part.patience)
        entry.update(seconds=round(before + time.monotonic() - began, 1), budget_s=round(before + seconds, 1))
        save(out, state)
        if not again or seconds - (time.monotonic() - began) < ENDING:
            break
    refresh()


def judge(entry: Row, code: int | None, ran: float, patience: float | None) -> bool:
    """Leaves in a part's entry how its process ended; whether it is worth starting again.

    code: its exit code, None if it had to be ended; ran: seconds that its job had run by then.
    """
    key = entry.pop("running", None)
    rows = entry.setdefault("rows", {})
    so_far = {} if key in entry.get("anew", ()) else {k: v for k, v in rows.get(key, {}).items() if k != "unfinished"}
    if code == 0 or entry.pop("through", False):  # what comes after its last word costs nothing
        entry.pop("through", None)
        return False
    if code is None:
        if key is None or ran < min(patience or HUNG, max(HUNG, (patience or 0) / 2)):
            entry.update(status=status_of(rows, False), reason=f"out of time in {key!r}; call again to go on")
            return False
        said = f"no end after {ran:.0f} s: hung, or longer than its part's time; passed over until --case names it"
        put(entry, key, {**so_far, "error": said, "hung": True})
    elif code == CONTEXT_LOST:
        said = "the CUDA context was lost"
    elif key is None:
        entry.update(status="failed", reason=f"its process ended with code {code} (see gpu_check.log)")
        return False
    else:
        said = "its process died"
        put(entry, key, {**so_far, "error": f"the process died in it, code {code} (see gpu_check.log)"})
    entry.update(status=status_of(rows, True), reason=said)
    return True


def follow(
    command: list[str], seconds: float, patience: float | None, environment: dict[str, str], log: Log,
    running: Callable[[], str | None],
) -> tuple[int | None, float]:  # fmt: skip
    """Runs a process with its output in the log: (its exit code, or None if it had to be ended; seconds of its job).

    running() names the job in progress; it is called every few seconds. The process is ended some time after `seconds`,
    or when one job takes longer than patience.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    name = command[command.index("--child") + 1]

    def read() -> None:
        for line in process.stdout:
            log.quietly(line.rstrip("\n"))
            if line.startswith(f"{name}: "):
                print("  " + line.rstrip("\n")[:160], flush=True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    now = since = time.monotonic()
    deadline, job = now + seconds + GRACE, None
    try:
        while now < deadline and not (job and patience and now - since > patience):
            with suppress(subprocess.TimeoutExpired):
                return process.wait(min(REFRESH, deadline - now)), time.monotonic() - since
            now = time.monotonic()
            current = running()
            if current != job:
                job, since = current, now
        return None, now - since
    finally:
        end(process)
        reader.join(1)


def end(process: subprocess.Popen) -> None:
    """Ends a process and what it has started; one that can't even be killed, as in a broken driver, is left alone."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)  # it ends what it has started
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDING / 2)
        return
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(ENDING / 2)


def end_with_parent() -> None:
    """Lets this process end, and with it what it has started, when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ENDING)  # the handler runs when the main thread leaves native code, which may be never
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
