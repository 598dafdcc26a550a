"""Everything that wants a GPU, in one command of ten minutes at most; no network is needed.

    python tools/gpu_check.py --out DIR [--only PART,...] [--quick] [--data DIR] [--minutes 10]

PART is one of build, tests, floor, ops, train, peers, inference, ssd300, profile, losses, bccd, sanitizer.

Builds the kernels, runs the gpu tests, and measures in one go: this card's copy and matmul rates, every op beside its
reference, the training step in all its modes, torchvision's RetinaNet, inference, SSD300, a profile, a real training.
DIR gets gpu_check.json (its keys: tools/gpu_check_core.py), gpu_check.log and what the parts leave; nothing is written
elsewhere but the build. The table at the end can be printed again from DIR with --only none.

Every part runs in a process of its own within its own time, so that a crash costs one row. What does not fit is left
out and said; called again with the same DIR, the check goes on there. --only measures the named parts anew. Without a
GPU the parts that make sense on a CPU run on small shapes. Exit code: 0 if nothing failed, 1 if a part did, 2 for
wrong arguments.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing beside DIR

import torch  # noqa: E402
from gpu_check_core import CONTEXT_LOST, Context, clocks, commit, load, run_jobs, save, status_of  # noqa: E402
from gpu_check_table import PUBLISHED, TARGETS, table  # noqa: E402

GRACE = 10.0
"""Seconds after a part's time in which its process may still write its last row."""
CRASHES = 5
"""So many times is a part started again whose process has died; each time without the job that it died in."""


@dataclass(frozen=True)
class Part:
    """seconds: its time on a GPU; the times add up to ten minutes. cpu: whether it runs by default without a GPU."""

    name: str
    module: str
    function: str
    seconds: float
    cpu: bool = False


PARTS = (
    Part("build", "gpu_check_runs", "build", 65, True),
    Part("tests", "gpu_check_runs", "tests", 75),
    Part("floor", "gpu_check_ops", "floor", 20, True),
    Part("ops", "gpu_check_ops", "ops", 50, True),
    Part("train", "gpu_check_train", "train", 105, True),
    Part("peers", "gpu_check_train", "peers", 45),
    Part("inference", "gpu_check_infer", "inference", 35),
    Part("ssd300", "gpu_check_ssd", "ssd300", 40, True),
    Part("profile", "gpu_check_infer", "profiled", 25),
    Part("losses", "gpu_check_runs", "losses", 35),
    Part("bccd", "gpu_check_runs", "bccd", 75),
    Part("sanitizer", "gpu_check_runs", "sanitizer", 30),
)


NEEDED = ("torchvision", "numpy", "mlperf_logging", "msgspec", "pycocotools", "pytest", "hypothesis")
"""Packages that parts import, beside torch."""


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


def child_environment(out: Path) -> dict[str, str]:
    """Every cache and temporary file of the parts below DIR."""
    cache, temporary = out / "cache", out / "tmp"
    temporary.mkdir(exist_ok=True)
    names = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda",
             "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis"}  # fmt: skip
    own = {name: str(cache / folder) for name, folder in names.items()}
    if len(str(temporary)) < 70:  # loader processes make sockets there, whose paths may have 107 characters
        own["TMPDIR"] = str(temporary)
    return os.environ | own | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def run_part(part: Part, seconds: float, options: argparse.Namespace, log: Log) -> None:
    """Runs a part in processes of its own until it is through or its time is over; leaves its status in the JSON."""
    out, began = options.out, time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part.name, "--out", str(out)]
    command += ["--quick"] * options.quick + (["--data", str(options.data)] if options.data else [])
    for _ in range(CRASHES):
        left = seconds - (time.monotonic() - began)
        code = follow([*command, "--budget", str(left)], left, child_environment(out), log)
        state = load(out)
        entry = state["parts"].setdefault(part.name, {})
        key = entry.pop("running", None)
        rows = entry.setdefault("rows", {})
        if code is None:
            entry.update(status=status_of(rows, False), reason=f"out of time in {key!r}; call again to go on")
        elif code and key is None and code != CONTEXT_LOST:
            entry.update(status="failed", reason=f"its process ended with code {code} (see gpu_check.log)")
        elif code:
            if key is not None:
                rows[key] = {"error": f"the process died in it, code {code} (see gpu_check.log)"}
            entry.update(status=status_of(rows, True), reason="its process died")
        entry.update(seconds=round(time.monotonic() - began, 1), budget_s=round(seconds, 1))
        save(out, state)
        if not code or (key is None and code != CONTEXT_LOST) or seconds - (time.monotonic() - began) < 1:
            return


def follow(command: list[str], seconds: float, environment: dict[str, str], log: Log) -> int | None:
    """Runs a process with its output in the log; its exit code, or None if it had to be ended."""
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
    try:
        return process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends what it has started
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        reader.join(5)


def run_child(options: argparse.Namespace) -> int:
    """A part, in its own process."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    part = next(part for part in PARTS if part.name == options.child)
    gpu = torch.cuda.is_available()
    context = Context(options.out, gpu, options.quick, options.data, options.budget, began)
    jobs = getattr(import_module(part.module), part.function)(context)
    return run_jobs(part.name, jobs, context)


def keep(state: dict, name: str, named: bool) -> bool:
    """Whether a part's earlier result stands; else what of it can be kept is left in the state."""
    entry = state["parts"].get(name)
    if not entry:
        return False
    if not named and entry.get("status") in ("passed", "skipped"):
        return True
    if named and entry.get("status") != "stopped":
        del state["parts"][name]
    else:
        entry["rows"] = {key: row for key, row in entry.get("rows", {}).items() if "error" not in row}
    return False


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", help="parts to measure anew, separated by commas; none: only print the table")
    parser.add_argument("--quick", action="store_true", help="fewer iterations and smaller shapes")
    parser.add_argument("--data", type=Path, help="the bccd data set, where it is not at shared/data/bccd")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = [part.name for part in PARTS]
    wanted = [] if options.only in (None, "none") else options.only.split(",")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(names)}, none")
    options.wanted = wanted
    options.out = options.out.resolve()
    options.data = options.data.resolve() if options.data else None
    return options


def check(options: argparse.Namespace, gpu: bool, log: Log) -> None:
    """Runs the chosen parts that are not done, one after the other, with all the minutes among them.

    So a part whose one long job was stopped has more time for it in the next call. What one leaves is the next one's.
    """
    began = time.monotonic()
    state = load(options.out)
    identity = {"commit": commit(), "quick": options.quick, "gpu": gpu}
    if state["parts"] and any(state.get(key) != value for key, value in identity.items()):
        log.say("the results in the folder are of another commit or kind of machine: all begun anew")
        state = {"version": 1, "parts": {}}
    state.update(identity, published=PUBLISHED, targets=TARGETS)
    state["clocks"] = [clocks("start")] if gpu else []
    chosen = [part for part in PARTS if (part.name in options.wanted if options.wanted else gpu or part.cpu)]
    todo = [part for part in chosen if not keep(state, part.name, bool(options.wanted))]
    save(options.out, state)
    for part in chosen:
        if part not in todo:
            log.say(f"{part.name}: kept from an earlier call")
    scale = options.minutes * 60 / max(1.0, sum(part.seconds for part in todo))
    spare = 0.0
    for part in todo:
        state = load(options.out)
        left = options.minutes * 60 - (time.monotonic() - began)
        seconds = min(part.seconds * scale + spare, left - GRACE)
        if seconds < 3:
            state["parts"].setdefault(part.name, {"rows": {}}).update(status="stopped", reason="no time was left")
            save(options.out, state)
            log.say(f"{part.name}: left out, no time is left; call again to go on")
            continue
        log.say(f"{part.name}: {seconds:.0f} s at most")
        start = time.monotonic()
        run_part(part, seconds, options, log)
        spare = max(0.0, seconds - (time.monotonic() - start))
    state = load(options.out)
    state["clocks"] += [clocks("end")] if gpu else []
    state["seconds"] = round(time.monotonic() - began, 1)
    save(options.out, state)


def main(argv: list[str]) -> int:
    options = arguments(argv)
    if options.child:
        return run_child(options)
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "gpu_check.log")
    gpu = torch.cuda.is_available()
    if not gpu:
        log.say(
            "torch sees no GPU on this machine: the CPU part runs, on small shapes; its times say nothing about a GPU"
        )
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        log.say(f"not installed: {', '.join(lacking)}; parts that want them fail (wheels in PYTHONPATH will do)")
    if options.only != "none":
        check(options, gpu, log)
    state = load(options.out)
    text = table(state)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    log.say("\n" + text)
    return int(any(part.get("status") == "failed" for part in state["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
