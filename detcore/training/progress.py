"""What a run says while it goes: one console line, one JSON line a logging interval, and where the time went."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

WAIT, ADVICE_EVERY = 0.1, 300.0  # of the time; seconds
KINDS = ("start_up", "data", "train", "evaluation", "checkpoint")


class Progress:
    """Console and progress.jsonl of one run; silent on every rank but 0 (path None), where it still keeps the clocks.

    progress.jsonl holds one object a line: "start" (config, environment), "step" every logging interval, "eval" for
    each result, "end" (status, seconds by kind, best result). Times are in seconds since `run_started`.
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
        self._advise_at: float | None = None  # seconds since the start; None until the first interval is over
        self.observe: Callable[[str, dict[str, Any]], None] | None = None  # see `Task.observe`

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
            self.tell(kind, **fields)

    def tell(self, kind: str, **fields: Any) -> None:
        """To the observer alone."""
        if self._file and self.observe:
            self.observe(kind, fields)

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

    def interval(self, *, step: int, images_per_step: int, busy: float = 0.0) -> tuple[float, float]:
        """Closes a logging interval: global images per second and the fraction of time spent waiting for data.

        busy: seconds that a GPU worked on the steps, where it works while this process looks for the next batch; the
        wait is then at most the rest.
        """
        now, data = self.elapsed(), self.seconds["data"]
        last_step, last_time, last_data = self._mark
        self._mark = (step, now, data)
        span = max(now - last_time, 1e-9)
        if step > last_step:
            each = span / (step - last_step)
            self._step_seconds = (self._step_seconds + each) / 2 if self._step_seconds else each
        wait = min(data - last_data, max(span - busy, 0.0))
        return (step - last_step) * images_per_step / span, wait / span

    def advise(self, rate: float, wait: float, words: Callable[[float, float], str]) -> None:
        """Says what holds the loader back where more than WAIT of an interval went by waiting, every ADVICE_EVERY.

        Not in the first interval, in which the workers start. words: see `Data.advise`; it is called each time, for it
        counts from call to call.
        """
        text = words(rate, wait)
        now, first = self.elapsed(), self._advise_at is None
        if first:
            self._advise_at = 0.0
        if first or wait <= WAIT or now < self._advise_at or not text:
            return
        self._advise_at = now + ADVICE_EVERY
        self.say(text)
        self.write("loader", time_s=now, data_wait=wait, text=text)

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


class Meter:
    """How far a long job is, on stderr: done of total, rate, megabytes per second, time left.

    total 0: not known. A line that replaces itself on a terminal, else one of its own every half a minute. Leave it
    with `close`.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.bytes = what, total, 0, 0
        self._tty = sys.stderr.isatty()
        self._begin = self._said = time.perf_counter()
        self._skipped = 0

    def skip(self, done: int) -> None:
        """What an earlier run had done; it counts as done, not for the rate."""
        self.done += done
        self._skipped += done

    def add(self, done: int, size: int = 0) -> None:
        self.done += done
        self.bytes += size
        now = time.perf_counter()
        if now - self._said > (0.3 if self._tty else 30):
            self._said = now
            self._write(self.text())

    def text(self) -> str:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rate = (self.done - self._skipped) / seconds
        left = f"ETA {duration((self.total - self.done) / rate)}" if rate else "ETA unknown"
        size = f", {self.bytes / seconds / 1e6:,.0f} MB/s" if self.bytes else ""
        if not self.total:
            return f"{self.what}: {self.done:,}, {rate:,.0f}/s{size}"
        done = f"{self.done:,} of {self.total:,} ({self.done / self.total:.0%})"
        return f"{self.what}: {done}, {rate:,.0f}/s{size}, {left}"

    def close(self) -> None:
        """The last state, on a line of its own."""
        self._write(self.text())
        if self._tty:
            sys.stderr.write("\n")

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        sys.stderr.write("\r" + text[: width - 1].ljust(width - 1) if self._tty else text + "\n")
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
