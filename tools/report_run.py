"""What one training left in its output folder, read for `tools/report.py`: also of aborted, resumed and killed runs."""

import base64
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detcore import UserError

REQUIRED = {
    "start": ("benchmark", "config", "environment", "notes"),
    "step": ("step", "epoch", "time_s", "loss", "terms", "images_per_s"),
    "eval": ("step", "epoch", "time_s", "metrics"),
    "end": ("status", "time_s", "seconds"),
}
TIMES = {
    "start_up": "start-up, before the clock starts",
    "train": "training steps",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "other": "opening the data set and the rest",
    "unknown": "parts that ended without a record",
}


@dataclass
class Run:
    """What the files say. A resumed run is one Run: `parts` counts its starts, steps and evaluations are those that
    its last state is built on, times are sums. Times are seconds; `problems` is for the reader of the report."""

    start: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    status: str | None = None  # success or aborted, None without an end
    parts: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMES, 0.0))
    total: float = 0.0  # since the clock started
    log: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)  # key: (milliseconds, value) of each event
    gallery: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def targets(self) -> dict[str, float | None]:
        """Metrics and what they had to reach, the primary one first; older records know of AP alone."""
        return self.start.get("targets") or {"AP": self.start["config"].get("target_map")}

    @property
    def goals(self) -> dict[str, float]:
        return {name: value for name, value in self.targets.items() if value is not None}

    @property
    def metric(self) -> str:
        return next(iter(self.targets))

    @property
    def target(self) -> float | None:
        return self.targets[self.metric]

    @property
    def best(self) -> dict[str, Any] | None:
        return max(self.evals, key=lambda e: e["metrics"][self.metric], default=None)

    @property
    def rate(self) -> float | None:
        """Images per second over all training steps and their waiting for data, all processes together."""
        if not self.steps:
            return None
        counts = [b["step"] - a for a, b in zip([0] + [s["step"] for s in self.steps], self.steps, strict=False)]
        rates = [max(s["images_per_s"], 1e-9) for s in self.steps]
        return sum(counts) / sum(n / rate for n, rate in zip(counts, rates, strict=True))

    def time_to_train(self) -> tuple[float, str]:
        """Seconds, and in words between which events."""
        if self.parts > 1:
            return self.total, f"sum of the run's {self.parts} parts, without the time between them"
        begin, end = self.log.get("run_start"), self.log.get("run_stop")
        if self.status and begin and end and end[-1][0] >= begin[-1][0]:
            return (end[-1][0] - begin[-1][0]) / 1000, "from RUN_START to RUN_STOP in the log"
        return self.total, "by progress.jsonl" if self.status else "until its last line in progress.jsonl"

    def verdict(self) -> tuple[str, str]:
        """(good, bad or plain; one sentence) on how the run ended."""
        step = self.steps[-1]["step"] if self.steps else 0
        goals = self.goals
        reached = goals and any(all(e["metrics"][n] >= v for n, v in goals.items()) for e in self.evals)
        named = f"{'Targets' if len(goals) > 1 else 'Target'} {', '.join(f'{n} {v:g}' for n, v in goals.items())}"
        epochs = self.start["config"].get("epochs")
        if reached and self.status != "success":
            return "plain", f"{named} reached, but the run did not come to its proper end"
        if reached:
            return "good", f"{named} reached"
        if self.status is None:
            return "bad", f"No end recorded: the run was killed or still goes on; last seen at step {step:,}"
        if self.status == "success":
            return "plain", f"Finished {epochs} epochs; no target was set"
        if goals and self.evals and self.evals[-1]["epoch"] == epochs:
            return "bad", f"{named} not reached in {epochs} epochs"
        goal = f"; {named[0].lower()}{named[1:]} not reached" if goals else ""
        return "bad", f"Aborted after step {step:,}{goal}"


def read_run(folder: Path) -> Run:
    """Everything in the folder. Raises UserError where there is no run in it."""
    path = folder / "progress.jsonl"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the --output-dir of a training")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a training writes it into its --output-dir")
    run = Run()
    lines, last = read_lines(path, run), 0.0
    for line in lines:
        match line["kind"]:
            case "start":
                close_part(run, last)
                run.start, run.status, last = line, None, 0.0
                run.parts += 1
                continue
            case "step":  # what a killed part did after the checkpoint that its successor started from is gone
                if run.steps and run.steps[-1]["step"] >= line["step"]:
                    run.steps = [s for s in run.steps if s["step"] < line["step"]]
                run.steps.append(line)
            case "eval":
                run.evals = [e for e in run.evals if e["epoch"] < line["epoch"]] + [line]
            case "end":
                run.status = line["status"]
                for kind, value in line["seconds"].items():
                    run.seconds[kind if kind in TIMES else "other"] += value
                known = sum(v for k, v in line["seconds"].items() if k != "start_up")
                run.seconds["other"] += max(line["time_s"] - known, 0.0)
        last = line["time_s"]
    close_part(run, last)
    read_log(folder, run)
    read_gallery(folder, run)
    return run


def close_part(run: Run, last: float) -> None:
    """Adds the time of a part to the sums; `last` is what its last line says."""
    run.total += last
    if run.status is None:
        run.seconds["unknown"] += last


def read_lines(path: Path, run: Run) -> list[dict[str, Any]]:
    """The records of progress.jsonl from the first start on. A line that was cut is left out, and that is said."""
    lines, bad = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = parse(text)
        if record is None:
            bad += 1
            record = parse(text[max(text.rfind('{"kind"'), 0) :])  # a resumed run writes on behind a cut line
        if record and (lines or record["kind"] == "start"):
            lines.append(record)
    if not lines:
        raise UserError(f'{path}: holds no complete "start" line, so it is no record of a training; train anew')
    if bad:
        run.problems.append(f"left out of progress.jsonl, because unreadable or cut: {bad} line{'s' * (bad > 1)}")
    return lines


def parse(text: str) -> dict[str, Any] | None:
    """A record of a known kind with all its fields, or None."""
    try:
        record = json.loads(text)
        complete = all(key in record for key in REQUIRED[record["kind"]])
        return record if complete and (record["kind"] != "eval" or "AP" in record["metrics"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_log(folder: Path, run: Run) -> None:
    name = f"result_{run.start['config'].get('result_index', 0)}.txt"
    if not (folder / name).is_file():
        run.problems.append(f"{name} is missing: times are those of progress.jsonl")
        return
    bad = 0
    for text in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(text.removeprefix(":::MLLOG "))
            run.log.setdefault(event["key"], []).append((event["time_ms"], event["value"]))
        except (ValueError, KeyError, TypeError):
            bad += 1
    if bad:
        run.problems.append(f"left out of {name}, because unreadable or cut: {bad} line{'s' * (bad > 1)}")


def read_gallery(folder: Path, run: Run) -> None:
    path = folder / "gallery.json"
    if not path.is_file():
        return
    started = run.log.get("run_start")
    if started and path.stat().st_mtime * 1000 < started[-1][0]:
        run.problems.append("gallery.json is older than this run and left out")
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            image = folder / "gallery" / Path(entry["image"]).name
            entry["data"] = base64.b64encode(image.read_bytes()).decode()
            entry["truth"] = [(*map(float, b["box"]), str(b["label"])) for b in entry["truth"]]
            found = [(*map(float, b["box"]), str(b["label"]), float(b["score"])) for b in entry["detections"]]
            entry["detections"] = sorted(found, key=lambda box: -box[5])
            entry["size"] = float(entry["width"]), float(entry["height"])
        run.gallery = entries
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"the gallery can't be read and is left out ({type(error).__name__}: {error})")
