"""Runs the jobs of a part in this process: each row saved at once, a lost CUDA context told from other errors."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable

import torch

from tools.gpu_check.machine import machine
from tools.gpu_check.state import (
    CONTEXT_LOST,
    LOST,
    OUT_OF_TIME,
    Context,
    Job,
    OutOfTime,
    Row,
    Skip,
    load,
    put,
    save,
    status_of,
    words,
)


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


def run_jobs(name: str, jobs: Iterable[Job], context: Context) -> int:
    """Runs the jobs that are asked for and have no row yet, each row saved at once; the part's exit code."""
    state = load(context.out)
    state["machine"] = machine(context.gpu)
    entry = state["parts"].setdefault(name, {})
    entry.setdefault("rows", {})
    save(context.out, state)
    gc.freeze()  # what torch is made of is garbage after no row; looking through it takes longer than most of them
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
