"""MLPerf logs as this package reads them: events, and what follows from them. The same lines as the official parser."""

import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from detcore import UserError

TOKEN = ":::MLLOG "
# What two processes' clocks may differ, so that a line seems older than the one before it; what is no such difference.
SLIGHT_S, BACKWARDS_S = 1.0, 60.0


class Event(NamedTuple):
    key: str
    time_ms: int
    value: Any
    metadata: dict[str, Any]


@dataclass
class Log:
    """The MLPerf events of one log. `bad`: lines that look like events and can't be read, such as a cut last one."""

    path: Path
    events: list[Event] = field(default_factory=list)
    bad: int = 0

    def values(self, key: str) -> list[Any]:
        return [event.value for event in self.events if event.key == key]

    def last(self, key: str) -> Any:
        """The last value of a key, None without one."""
        return next((event.value for event in reversed(self.events) if event.key == key), None)

    def name(self, key: str) -> str:
        """The last value of a key if that is text, else empty."""
        value = self.last(key)
        return value if isinstance(value, str) else ""

    @property
    def resumed(self) -> bool:
        """Whether it was initialised once more after the clock had started. (Two processes may log one run_start.)"""
        keys = [event.key for event in self.events]
        return "run_start" in keys and "init_start" in keys[keys.index("run_start") :]

    @property
    def status(self) -> str | None:
        """Of the last run_stop after the last run_start: success, aborted, or None where there is no end."""
        stop = self._stop()
        return stop.metadata.get("status") if stop else None

    @property
    def minutes(self) -> float | None:
        """run_stop - run_start; None for a log without an end, a run in several parts, or a clock that stepped back."""
        times = self._times()
        return (times[1] - times[0]) / 60000 if times and not self.resumed and not self.clock_fault() else None

    @property
    def evaluations(self) -> list[tuple[Any, Any]]:
        """(epoch_num, value) of each eval_accuracy before run_stop, as they are in the log: of any type."""
        end = self._stop()
        events = self.events[: self.events.index(end)] if end else self.events
        return [(e.metadata.get("epoch_num"), e.value) for e in events if e.key == "eval_accuracy"]

    @property
    def last_evaluation(self) -> tuple[Any, Any] | None:
        """The last of `evaluations`, from which the convergence checker takes a run's epochs."""
        return self.evaluations[-1] if self.evaluations else None

    def first(self, key: str) -> Event | None:
        return next((e for e in self.events if e.key == key), None)

    def clock_fault(self) -> str:
        """In words, where the run ends before it begins, or the clock went back by more than a minute; else empty."""
        times = self._times()
        if times and times[1] <= times[0]:
            return f"run_stop is {(times[0] - times[1]) / 60000:.1f} min before run_start: the clock was set back"
        return self.clock_step(BACKWARDS_S)

    def clock_step(self, seconds: float = SLIGHT_S) -> str:
        """In words, where the clock went back by more than `seconds` while the run went on; else empty."""
        start = self.first("run_start")
        inside = self.events[self.events.index(start) :] if start and not self.resumed else []
        one, next_one = min(pairwise(inside), key=lambda pair: pair[1].time_ms - pair[0].time_ms, default=(None, None))
        if one is None or one.time_ms - next_one.time_ms <= seconds * 1000:
            return ""
        back = (one.time_ms - next_one.time_ms) / 1000
        return f"the clock went back {back:,.0f} s between {one.key} and {next_one.key}"

    def _times(self) -> tuple[int, int] | None:
        """Milliseconds of the last run_start before the first run_stop, and of that: what the official tools take."""
        start = None
        for event in self.events:
            if event.key == "run_start":
                start = event.time_ms
            elif event.key == "run_stop" and start is not None:
                return start, event.time_ms
        return None

    def _stop(self) -> Event | None:
        """The last run_stop, unless the run started once more after it."""
        ends = [e for e in self.events if e.key in ("run_start", "run_stop")]
        return ends[-1] if ends and ends[-1].key == "run_stop" else None


def read_log(path: Path) -> Log:
    """Reads a log, or any text that holds one, the way the official parser does: the last event of each line counts."""
    log = Log(path)
    with path.open(encoding="latin-1") as file:
        for line in file:
            _, token, text = line.rpartition(TOKEN)
            if not token:
                continue
            try:
                fields = json.loads(text)
                time = fields["time_ms"]
                event = Event(fields["key"], int(time), fields["value"], fields["metadata"] or {})
                if not isinstance(event.key, str) or not isinstance(event.metadata, dict) or not math.isfinite(time):
                    raise TypeError
                log.events.append(event)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                log.bad += 1
    return log


def number(value: Any) -> float | None:
    """A finite number of a log, or None: also for true and false, which Python counts as numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def metrics(value: Any) -> dict[str, float]:
    """The numbers of an eval_accuracy by name; a single one is called mAP. Empty where there is none."""
    parts = value.items() if isinstance(value, dict) else [("mAP", value)]
    return {str(name): float(v) for name, v in parts if number(v) is not None}


def find_log(logdir: Path, stamp: str, k: int) -> Log | None:
    """The log of trial k of a job: the one that rank 0 wrote itself, else what is left of it in the task's output."""
    folder = logdir / f"{stamp}_{k}"
    candidates = [folder / f"result_{k - 1}.txt", logdir / f"{stamp}_{k}.log", folder / "rank_0.log"]
    logs = [read_log(path) for path in candidates if path.is_file()]
    return next((log for log in logs if log.events), logs[0] if logs else None)


def collect(paths: list[Path]) -> list[Path]:
    """The logs that files and folders name: of a folder, its result_*.txt, also one or two levels down, or else
    whatever .txt and .log in it have events.

    Raises UserError where a path does not exist, or a folder holds none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; name a log, or a folder with result_*.txt")
        if not path.is_dir():
            found.append(path)
            continue
        levels = (sorted(path.glob("/".join(["*"] * depth + ["result_*.txt"])), key=_order) for depth in range(3))
        logs = next((level for level in levels if level), [])
        logs = logs or [
            file for file in sorted(path.iterdir()) if file.suffix in (".txt", ".log") and _has_events(file)
        ]
        if not logs:
            raise UserError(f"{path}: holds no result_*.txt, also not two folders further down; name the logs")
        found += logs
    return list(dict.fromkeys(found))


def _order(path: Path) -> tuple[str, int, str]:
    digits = path.stem.rpartition("_")[2]
    return str(path.parent), int(digits) if digits.isascii() and digits.isdecimal() else -1, path.name


def _has_events(path: Path) -> bool:
    with path.open(encoding="latin-1") as file:
        return any(TOKEN in line for line in file)
