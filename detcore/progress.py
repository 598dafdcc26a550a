"""What a run says while it goes: one console line, one JSON line a logging interval, and where the time went."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

KINDS = ("start_up", "data", "train", "evaluation", "checkpoint")


class Progress:
    """Console and progress.jsonl of one run; silent on every rank but 0 (path None), where it still keeps the clocks.

    progress.jsonl holds one object a line: "start" (config, environment), "step" every logging interval, "eval" for
    each result, "end" (status and seconds by kind). Times are in seconds since `run_started`.
    """

    def __init__(self, path: Path | None, *, append: bool = False, console: TextIO | None = None):
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._file = path.open("a" if append else "w", encoding="utf-8") if path else None
        self._console = (console or sys.stderr) if path else None
        self._tty = bool(self._console and self._console.isatty())
        self._bar_open = False
        self._begin = time.perf_counter()
        self._mark = (0, 0.0, 0.0)  # step, time and data seconds of the last interval
        self._step_seconds = 0.0  # of one step, lately
        self.evaluations = 0  # of this process

    def elapsed(self) -> float:
        """Seconds since the run started (since construction before that)."""
        return time.perf_counter() - self._begin

    @contextmanager
    def clock(self, kind: str) -> Iterator[None]:
        """Adds the time of its body to one of KINDS."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] += time.perf_counter() - start

    def run_started(self, step: int) -> None:
        """The clock of the run starts at this global step; what came before was start-up."""
        self.seconds["start_up"] = self.elapsed()
        self._begin = time.perf_counter()
        self._mark = (step, 0.0, self.seconds["data"])

    def write(self, kind: str, **fields: Any) -> None:
        """One line of progress.jsonl, flushed."""
        if self._file:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """Lines for the person at the console, below the bar if one is open."""
        if self._console:
            if self._bar_open:
                self._console.write("\n")
                self._bar_open = False
            self._console.write(text + "\n")
            self._console.flush()

    def bar(self, text: str) -> None:
        """A line that replaces the one before on a terminal, and is a line of its own in a log file."""
        if not self._console:
            return
        if self._tty:
            width = shutil.get_terminal_size().columns
            self._console.write("\r" + text[: width - 1].ljust(width - 1))
            self._console.flush()
            self._bar_open = True
        else:
            self.say(text)

    def interval(self, *, step: int, images_per_step: int) -> tuple[float, float]:
        """Closes a logging interval: global images per second and the fraction of time spent waiting for data."""
        now, data = self.elapsed(), self.seconds["data"]
        last_step, last_time, last_data = self._mark
        self._mark = (step, now, data)
        span = max(now - last_time, 1e-9)
        if step > last_step:
            each = span / (step - last_step)
            self._step_seconds = (self._step_seconds + each) / 2 if self._step_seconds else each
        return (step - last_step) * images_per_step / span, min((data - last_data) / span, 1.0)

    def pause(self, step: int) -> None:
        """Leaves out what just passed (evaluation, checkpoint) from the next interval's rate."""
        self._mark = (step, self.elapsed(), self.seconds["data"])

    def time_left(self, step: int, total_steps: int, evaluations_left: int) -> str:
        """How long the rest would take if no target ends it, from the speed of the last intervals, in words."""
        seconds = self._step_seconds * (total_steps - step)
        if self.evaluations:
            seconds += self.seconds["evaluation"] / self.evaluations * evaluations_left
            return f"ETA {duration(seconds)} for all epochs"
        return f"ETA {duration(seconds)} for all epochs, without evaluation"

    def close(self) -> None:
        if self._bar_open and self._console:
            self._console.write("\n")
            self._bar_open = False
        if self._file:
            self._file.close()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
