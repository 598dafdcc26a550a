"""What a run says while it goes: one console line, one JSON line a logging interval, and where the time went."""

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from detcore import cli

WAIT, ADVICE_EVERY = 0.1, 300.0  # of the time; seconds
QUIET = 30.0  # seconds without a line until one says that the run is alive
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
        self._begin = self._said = time.perf_counter()
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
        self.notify("run_start", step=step)

    def write(self, kind: str, **fields: Any) -> None:
        """One line of progress.jsonl, flushed."""
        if self._file:
            self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
            self._file.flush()
            self.notify(kind, **fields)

    def notify(self, kind: str, **fields: Any) -> None:
        """Hands a record to the observer alone."""
        if self._file and self.observe:
            self.observe(kind, fields)

    def say(self, text: str) -> None:
        """Lines for the person at the console, below the bar if one is open."""
        self._said = time.perf_counter()
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
            self._said = time.perf_counter()
            width = shutil.get_terminal_size().columns
            self._console.write("\r" + text[: width - 1].ljust(width - 1))
            self._console.flush()
            self._bar_open = True
        else:
            self.say(text)

    def alive(self, step: int, last_step: int, evaluations_left: Callable[[], int]) -> None:
        """Says where the run is, between the lines of logging intervals, where none came for QUIET seconds."""
        if not self._console or time.perf_counter() - self._said < QUIET:
            return
        last, since, _ = self._mark
        if step > last:
            each = (self.elapsed() - since) / (step - last)
            left = self.time_left(step, last_step, evaluations_left(), each)
            self.bar(f"step {step:,} of {last_step:,}: {each:.2f} s a step  {left}")

    def evaluating(self, epoch: int, batches: int) -> None:
        """Says how many batches an evaluation after so many epochs has done, where no line came for QUIET seconds."""
        if self._console and batches and time.perf_counter() - self._said >= QUIET:
            self.bar(f"evaluation after epoch {epoch}: {batches:,} batches looked at")

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

    def report_step(
        self, *, step: int, epoch: int, epochs: int, epoch_steps: tuple[int, int], last_step: int,
        terms: dict[str, float], lr: float, rate: float, wait: float, evaluations_left: int,
        note: str = "",
    ) -> None:  # fmt: skip
        """The record and the bar of a logging interval that ends with a global step of an epoch (from 0) of so many.

        epoch_steps: the first step of the epoch and the one after its last. terms: of the loss, means over the
        interval. rate and wait: as `interval` gives them. note: what else
        the bar says, or "".
        """
        total = sum(terms.values())
        fields = {"loss": total, "terms": terms, "lr": lr, "images_per_s": rate, "data_wait": wait}
        self.write("step", step=step, last_step=last_step, epoch=epoch + 1, time_s=self.elapsed(), **fields)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in terms.items())
        done, steps = step - epoch_steps[0], epoch_steps[1] - epoch_steps[0]
        bar = ("#" * (done * 16 // steps)).ljust(16, ".")
        self.bar(
            f"epoch {epoch + 1}/{epochs} [{bar}] {done}/{steps}  loss {total:.3f} ({parts})  "
            f"{rate:.1f} images/s  data wait {wait:.0%}  {self.time_left(step, last_step, evaluations_left)}"
            f"{note and f'  ({note})'}"
        )

    def report_evaluation(
        self, step: int, epoch: int, metrics: dict[str, Any], targets: Mapping[str, float | None], best: float | None
    ) -> None:
        """The record and the line of an evaluation's result, after so many epochs.

        targets: as in `Task`. best: `merit` so far; None where there was nothing to score yet.
        """
        self.write("eval", step=step, epoch=epoch, time_s=self.elapsed(), metrics=metrics)
        goals = {name: "no target" if goal is None else f"target {goal:g}" for name, goal in targets.items()}
        values = ", ".join(f"{name} {metrics[name]:.4f} ({goal})" for name, goal in goals.items())
        which = f" {merit_words(targets)}" if len(targets) > 1 else ""
        reached = "nothing to score" if best is None else f"best{which} {best:.4f}"
        self.say(f"evaluation after epoch {epoch}: {values}, {reached}, after {duration(self.elapsed())}")

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

    def time_left(self, step: int, total_steps: int, evaluations_left: int, each: float = 0.0) -> str:
        """How long the rest would take if no target ends it, in words. each: seconds of a step; 0: as in the last
        intervals."""
        seconds = (each or self._step_seconds) * (total_steps - step)
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


def about_model(parameters: Iterable[Any], step: int) -> str:
    """The size of a model, whose tensors these are, and with which step it goes on, in words."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    trained = sum(size for size, trains in sizes if trains)
    words = f"model: {sum(size for size, _ in sizes):,} parameters, {trained:,} of them train"
    return f"{words}; goes on after step {step:,}" if step else words


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
        speed = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        if not self.total:
            return f"{self.what}: {self.done:,}, {speed}{size}"
        done = f"{self.done:,} of {self.total:,} ({self.done / self.total:.0%})"
        return f"{self.what}: {done}, {speed}{size}, {left}"

    def close(self) -> None:
        """The last state, on a line of its own."""
        self._write(self.text())
        if self._tty:
            sys.stderr.write("\n")

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        sys.stderr.write("\r" + text[: width - 1].ljust(width - 1) if self._tty else text + "\n")
        sys.stderr.flush()


def explain_not_finite(
    rank: int, epoch: int, steps: list[tuple[int, list[int]]], names: list[str], losses: list[list[float]],
    weights_finite: bool, warmup_option: str,
) -> str:  # fmt: skip
    """What a process says that stops for a number that is not finite, its own or another process's.

    steps: number and image ids of each step since the last report, in the epoch (from 0). names, losses [steps, terms]:
    of the loss. weights_finite: whether the weights still are. warmup_option: see `Task`.
    """
    broken = next((i for i, values in enumerate(losses) if not all(map(math.isfinite, values))), None)
    if broken is None and weights_finite:
        return f"rank {rank} stops: the loss of another rank is not finite, its own message names the images"
    first, last = steps[0][0], steps[-1][0]
    if broken is None:
        return (
            f"rank {rank}: the weights are no longer finite after step {last} (epoch {epoch + 1}), though the "
            f"losses of steps {first} to {last} are: a gradient overflowed in one of them. The checkpoints "
            "from before are kept. Try a lower --lr, --clip-norm 10 or --precision fp32."
        )
    step, image_ids = steps[broken]
    warmup = f"a longer {warmup_option}, " if warmup_option else ""
    values = ", ".join(f"{n} = {v:g}" for n, v in zip(names, losses[broken], strict=True))
    return (
        f"rank {rank}: the loss is not finite at step {step} (epoch {epoch + 1}): {values}; image ids "
        f"{image_ids}. The checkpoints from before are kept. Look at these images and their boxes, "
        f"and at those of the step before, whose gradient may be the cause; else try a lower --lr, {warmup}"
        "--clip-norm 10 or --precision fp32."
    )


def merit(metrics: Mapping[str, Any], targets: Mapping[str, float | None]) -> float:
    """What is highest for the best evaluation: the metric of `targets` (see `Task`); of several the mean over how far
    each has come to its target, at most 1, or the value itself without one. So a result that reaches all of them is the
    best. -1: nothing to score."""
    if len(targets) == 1:
        return metrics[next(iter(targets))]
    scored = [(metrics[name], goal) for name, goal in targets.items() if metrics[name] >= 0]
    shares = [value if goal is None else 1.0 if value >= goal else value / goal for value, goal in scored]
    return sum(shares) / len(shares) if shares else -1.0


def merit_words(targets: Mapping[str, float | None]) -> str:
    """What `merit` is."""
    if len(targets) == 1:
        return next(iter(targets))
    parts = (name if goal is None else f"{name}/{goal:g}" for name, goal in targets.items())
    return f"mean of {' and '.join(parts)}"


def closing_words(
    code: int, step: int, best_result: tuple[int, float] | None, targets: Mapping[str, float | None], seconds: float,
    folder: Path, length: str, number: int, evaluated: bool = False,
) -> str:  # fmt: skip
    """The last line of a run that ended with an exit code after a global step.

    best_result: epochs completed and `merit`. targets: see `Task`. length: what ends the run without them, such
    as "26 epochs". number: of the signal that ended it. evaluated: whether there was an evaluation at all.
    """
    where = f"after {duration(seconds)}; the log, the checkpoints and progress.jsonl lie in {folder}"
    goals = {name: value for name, value in targets.items() if value is not None}
    best = "nothing to score in the validation set" if evaluated else "no evaluation yet"
    if best_result:
        best = f"best {merit_words(targets)} {best_result[1]:.4f} after epoch {best_result[0]}"
    words = [f"{name} {value:g}" if len(targets) > 1 else f"{value:g}" for name, value in goals.items()]
    goal = f"Target{'s' if len(goals) > 1 else ''} {', '.join(words)}"
    match code:
        case cli.OK if goals:
            return f"{goal} reached: {best}, {where}"
        case cli.OK:
            return f"Done: {best}, {where}"
        case cli.TARGET_NOT_REACHED:
            return f"{goal} NOT reached in {length}: {best}, {where}"
        case cli.STOPPED:
            return f"Stopped by {signal.Signals(number).name}: {best}, {where}. Go on with --resume."
    return f"Aborted at step {step}: {best}, {where}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
