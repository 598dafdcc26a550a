"""What the parts of tools/gpu_check.py share: the JSON of a check, the runner of a part's jobs, and the stopwatch.

A part is a function (Context) -> jobs; a job is a key and a function that measures one thing and returns a row, a
dictionary of plain values. gpu_check.json holds, all values measured on this machine unless a key says otherwise:

    version     1
    machine     device (name, or cpu), memory_gib, capability, torch, cuda, cudnn, torchvision, python, processor
    commit      of the checkout, with "+changes-" and a hash of them if it has some; quick: true if with --quick
    card        by nvidia-smi;  gpu: whether torch saw one
    preflight   on a GPU machine {gcc, Python.h, ptxas, nvcc, compute-sanitizer, git: its path, or "" if it is missing}
    clocks      [{when, driver, sm_mhz, memory_mhz, temperature_c, power_w, used_mib}], by nvidia-smi at start and end
    seconds     of the last call;  published: MLPerf figures of others, images/s a GPU;  targets: what we aim at
    parts       name: {status, seconds, budget_s, reason, done, anew, running, rows: {key: row}}
                status: passed, failed (a row has "error"), stopped (out of time, rows are missing), skipped (reason)
                done: selections [cases, first] whose jobs have all been through; running: the job in progress
                anew: keys of rows that are to be measured again; such a row stays until the new one is there

Times in rows are medians in ms over `n` iterations, with p10_ms and p90_ms; a row with "skipped" was not measured and
says why; one with "hung" had no end, and is passed over until it is named; "unfinished": the job goes on in the next
call; "commit": it was measured at that one, not at the check's. "profile" in a
row is that of the same step in the same process.
"""

import contextlib
import gc
import json
import os
import platform
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NAME = "gpu_check.json"
CONTEXT_LOST = 43
"""Exit code of a part whose CUDA context is broken: started again, it goes on with the next job."""
OUT_OF_TIME = 44
"""How a job ends that is to go on in the next call."""

Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


class Skip(Exception):
    """A job can't be done here, and that is no fault; the words say why."""


class OutOfTime(Exception):
    """A job was cut off by the end of its part's time; it is left for the next call, which finds its row so far."""

    def __init__(self, words: str, row: Row | None = None):
        super().__init__(words)
        self.row = row


@dataclass(frozen=True)
class Sizes:
    """How large the measured things are. seconds: how long one measurement repeats its iteration."""

    image: int
    classes: int
    backbone: str
    channels: int
    head_convs: int
    batch: int
    seconds: float


@dataclass(frozen=True)
class Context:
    """Where a part runs. budget: seconds that it may take, counted from `began` (time.monotonic).

    out has the JSON and nothing else of a part; work is for everything that it writes. cases and first choose among
    its jobs: those whose keys match a pattern (as in a shell), the first so many; empty and 0: all. carried: the folder
    of tools/gpu_carry.py.
    """

    out: Path
    gpu: bool
    quick: bool
    data: Path | None
    budget: float
    began: float
    work: Path = ROOT / "build" / "gpu_check"
    cases: tuple[str, ...] = ()
    first: int = 0
    carried: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.gpu else torch.device("cpu")

    @property
    def sizes(self) -> Sizes:
        if self.gpu:
            return Sizes(800, 264, "resnext50_32x4d", 256, 4, 8 if self.quick else 32, 0.3 if self.quick else 1.5)
        if self.quick:
            return Sizes(64, 5, "resnet18", 16, 1, 2, 0.02)
        return Sizes(256, 80, "resnet18", 64, 1, 4, 0.5)

    def left(self) -> float:
        return self.budget - (time.monotonic() - self.began)

    def wants(self, key: str, number: int) -> bool:
        """Whether a job, the number-th of its part from 0, is among those asked for."""
        return matches(key, self.cases) if self.cases else not self.first or number < self.first


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def load(out: Path) -> dict[str, Any]:
    """The JSON of a folder; a fresh one if there is none, or none that can be read."""
    try:
        state = json.loads((out / NAME).read_text(encoding="utf-8"))
        if state["version"] == 1:
            return state
    except FileNotFoundError:
        return {"version": 1, "parts": {}}
    except (ValueError, KeyError, TypeError) as error:
        print(f"{out / NAME} can't be read ({error}): begun anew", flush=True)
    return {"version": 1, "parts": {}}


def save(out: Path, state: dict[str, Any]) -> None:
    """Writes the JSON whole or not at all."""
    part = out / f".{NAME}.part"
    part.write_text(json.dumps(state, indent=1), encoding="utf-8")
    os.replace(part, out / NAME)


def status_of(rows: dict[str, Row], complete: bool) -> str:
    if any("error" in row for row in rows.values()):
        return "failed"
    if not complete:
        return "stopped"
    return "skipped" if rows and all("skipped" in row for row in rows.values()) else "passed"


def words(error: BaseException) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:400]


LOST = re.compile(
    "illegal memory access|unspecified launch failure|cudaErrorLaunch(Failure|Timeout)|launch timed out"
    "|misaligned address|illegal (instruction|address)|invalid (program counter|address space)"
    "|hardware stack error|device-side assert|uncorrectable ECC|CUDA driver error"
    "|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
"""Words of errors after which every later CUDA call of the process fails too."""


def lost_context(words: str, gpu: bool) -> bool:
    """Whether after an error of these words the process's CUDA context is lost, so that every later job would fail.

    Of a word that says it; other errors, such as a launch of an invalid configuration, may leave it whole, so the GPU
    itself is asked.
    """
    return bool(LOST.search(words)) or (gpu and not answers())


def answers() -> bool:
    """Whether this process's GPU still computes; asked twice, since the first call may report an error of before."""
    for _ in range(2):
        try:
            if torch.ones(2, device="cuda").sum().item() == 2:
                return True
        except (RuntimeError, AssertionError):
            continue
    return False


def put(entry: dict[str, Any], key: str, row: Row) -> None:
    """A new row into a part's entry."""
    entry.setdefault("rows", {})[key] = row
    entry["anew"] = [other for other in entry.get("anew", ()) if other != key]


def leave(context: Context, name: str, key: str, row: Row) -> None:
    """Saves the row of a job that is still running, as far as it is."""
    state = load(context.out)
    put(state["parts"][name], key, row | {"unfinished": True})
    save(context.out, state)


def run_jobs(name: str, jobs: Iterable[Job], context: Context) -> int:
    """Runs the jobs that are asked for and have no row yet, each row saved at once; the part's exit code."""
    state = load(context.out)
    state["machine"] = machine(context.gpu)
    entry = state["parts"].setdefault(name, {})
    entry.setdefault("rows", {})
    save(context.out, state)
    last, complete, left_out, count = 0.0, True, False, 0
    for number, (key, measure) in enumerate(jobs):
        rows = entry["rows"]
        if key in rows and key not in entry.get("anew", ()) and "unfinished" not in rows[key]:
            continue
        if not context.wants(key, number):
            left_out = True
            continue
        if context.left() < last:
            print(f"{name}: stops before {key!r}: {context.left():.0f} s are left of {context.budget:.0f}", flush=True)
            complete = False
            break
        row, took, end = run_job(name, key, measure, context)
        count += 1
        last = took if count > 1 else took / 4  # the first pays for the process's start and trials
        state = load(context.out)  # which the job may have changed
        entry = state["parts"][name]
        del entry["running"]
        if row is not None:
            put(entry, key, row)
        save(context.out, state)
        if end == OUT_OF_TIME:
            complete = False
            break
        if end == CONTEXT_LOST:
            return CONTEXT_LOST
        tidy(context.gpu)
    finish(name, context, complete, left_out)
    return 0


def run_job(name: str, key: str, measure: Callable[[], Row], context: Context) -> tuple[Row | None, float, int]:
    """(row or None, seconds, 0 or OUT_OF_TIME or CONTEXT_LOST) of a job."""
    state = load(context.out)
    state["parts"][name]["running"] = key
    save(context.out, state)
    start, end = time.monotonic(), 0
    try:
        row = measure()
    except Skip as reason:
        row = {"skipped": str(reason)}
    except OutOfTime as reason:
        print(f"{name}: {key}: {reason}", flush=True)
        return reason.row and reason.row | {"unfinished": True}, 0.0, OUT_OF_TIME
    except torch.OutOfMemoryError:
        row = {"skipped": "out of memory on this card"}
    except Exception as error:
        traceback.print_exc()
        row = {"error": words(error)}
        end = CONTEXT_LOST * lost_context(f"{type(error).__name__}: {error}", context.gpu)
    seconds = time.monotonic() - start
    print(f"{name}: {key}: {brief(row)}", flush=True)
    return row | {"took_s": round(seconds, 2)}, seconds, end


def finish(name: str, context: Context, complete: bool, left_out: bool) -> None:
    """Says in the JSON how a part ended."""
    state = load(context.out)
    part = state["parts"][name]
    rows, anew = part["rows"], part.pop("anew", [])
    if complete and not left_out:  # of cases that there are no more
        rows = part["rows"] = {key: row for key, row in rows.items() if key not in anew}
    elif anew:
        part["anew"] = anew
    part["through"] = True
    part["status"] = status_of(rows, complete)
    part["reason"] = next((row["skipped"] for row in rows.values() if "skipped" in row), "")
    if part["status"] != "skipped":
        part["reason"] = (
            ("other cases not asked for" if left_out else "") if complete else "out of time; call again to go on"
        )
    if complete:
        part.setdefault("done", [])
        for selection in ([list(context.cases), context.first], *([] if left_out else [[[], 0]])):
            if selection not in part["done"]:
                part["done"].append(selection)
    save(context.out, state)


def tidy(gpu: bool) -> None:
    """Gives back what a job has left behind, so that the next one's peak memory is its own."""
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def brief(row: Row) -> str:
    """A row on one line for the log."""
    for key in ("error", "skipped"):
        if key in row:
            return f"{key}: {row[key]}"
    shown = {k: v for k, v in row.items() if isinstance(v, int | float | str) and not str(v).count("\n")}
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())[:400]


class Stopwatch:
    """Medians of many iterations: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, context: Context):
        self.gpu, self.seconds = context.gpu, context.sizes.seconds
        self.sweep: torch.Tensor | None = None

    def time(self, run: Callable[[], Any], *, warmup: int = 3, least: int = 5, most: int = 500, cold: bool = False,
             seconds: float | None = None) -> Row:  # fmt: skip
        """{ms, p10_ms, p90_ms, n} of run().

        cold: empty the GPU's cache between iterations by writing 256 MiB; that also keeps the host ahead of the GPU,
        so that a kernel shorter than its launch is timed by itself.
        """
        for _ in range(warmup):
            run()
        limit = time.perf_counter() + (self.seconds if seconds is None else seconds)
        times = self._gpu_times(run, limit, least, most, cold) if self.gpu else _cpu_times(run, limit, least, most)
        return spread(times)

    def _gpu_times(self, run: Callable, limit: float, least: int, most: int, cold: bool) -> list[float]:
        if cold and self.sweep is None:
            self.sweep = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        times: list[float] = []
        while len(times) < least or (len(times) < most and time.perf_counter() < limit):
            events = []
            for _ in range(least):
                if cold:
                    self.sweep.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) for start, end in events]
        return times


def _cpu_times(run: Callable, limit: float, least: int, most: int) -> list[float]:
    times: list[float] = []
    while len(times) < least or (len(times) < most and time.perf_counter() < limit):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def spread(times: list[float]) -> Row:
    """Median and tenths of times in ms."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return {"ms": statistics.median(ordered), "p10_ms": ordered[tenth], "p90_ms": ordered[-1 - tenth], "n": len(times)}


def machine(gpu: bool) -> Row:
    """The machine and the versions, in words."""
    import torchvision

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor)
    row = {
        "device": "cpu",
        "processor": f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if gpu:
        about = torch.cuda.get_device_properties(0)
        row |= {
            "device": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "sms": about.multi_processor_count,
        }
        row |= {"capability": f"{about.major}.{about.minor}", "cudnn": torch.backends.cudnn.version()}
    return row
