"""What the parts of a check share: its JSON, what a part may know, and how a job says that it can't be done.

A part is a function (Context) -> jobs; a job is a key and a function that measures one thing and returns a row, a
dictionary of plain values. gpu_check.json holds, all values measured on this machine unless a key says otherwise:

    version     1
    machine     device (name, or cpu), memory_gib, capability, torch, cuda, cudnn, torchvision, python, processor
    commit      of the checkout, with "+changes-" and a hash of them if it has some; quick: true if with --quick
    card        by nvidia-smi;  gpu: whether torch saw one
    preflight   on a GPU machine {gcc, Python.h, ptxas, nvcc, compute-sanitizer, git: its path, or "" if it is missing}
    clocks      [{when, driver, sm_mhz, memory_mhz, temperature_c, power_w, used_mib}], by nvidia-smi at start and end
    seconds     of the last call;  published: {benchmark: images/s a GPU of others};  targets: what we aim at
    parts       name: {status, seconds, budget_s, reason, done, anew, running, rows: {key: row}}
                status: passed, failed (a row has "error"), stopped (out of time, rows are missing), skipped (reason)
                done: selections [cases, first] whose jobs have all been through; running: the job in progress
                anew: keys of rows that are to be measured again; such a row stays until the new one is there

Times in rows are medians in ms over `n` iterations, with p10_ms and p90_ms; a row with "skipped" was not measured and
says why; one with "hung" had no end, and is passed over until it is named; "unfinished": the job goes on in the next
call; "commit": it was measured at that one, not at the check's. "profile" in a
row is that of the same step in the same process.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]

NAME = "gpu_check.json"
CONTEXT_LOST = 43
"""Exit code of a part whose CUDA context is broken: started again, it goes on with the next job."""
OUT_OF_TIME = 44
"""How a job ends that is to go on in the next call."""
LOST = re.compile(
    "illegal memory access|unspecified launch failure|cudaErrorLaunch(Failure|Timeout)|launch timed out"
    "|misaligned address|illegal (instruction|address)|invalid (program counter|address space)"
    "|hardware stack error|device-side assert|uncorrectable ECC|CUDA driver error"
    "|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)"
)
"""Words of errors after which every later CUDA call of the process fails too."""

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
    def device(self) -> "torch.device":
        import torch

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


def put(entry: dict[str, Any], key: str, row: Row) -> None:
    """A new row into a part's entry."""
    entry.setdefault("rows", {})[key] = row
    entry["anew"] = [other for other in entry.get("anew", ()) if other != key]


def leave(context: Context, name: str, key: str, row: Row) -> None:
    """Saves the row of a job that is still running, as far as it is."""
    state = load(context.out)
    put(state["parts"][name], key, row | {"unfinished": True})
    save(context.out, state)
