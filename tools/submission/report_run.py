"""What one training left in its output folder, or its MLPerf log alone: also of aborted, resumed and killed runs."""

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detcore import UserError
from detcore.training.progress import merit

from . import logs as mlperf
from .logs import Log, metrics, number
from .rulesets import facts

REQUIRED = {
    "start": ("benchmark", "config", "environment", "notes"),
    "step": ("step", "epoch", "time_s", "loss", "terms", "images_per_s"),
    "eval": ("step", "epoch", "time_s", "metrics"),
    "end": ("status", "time_s", "seconds"),
}
PRIMARY = {"AP", "AR@1000"}  # one of which every evaluation has
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
    mlperf: Log | None = None
    throughput: float | None = None  # images per second, where there are no steps to tell it
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
        values = [merit(e["metrics"], self.targets) for e in self.evals]
        best = max(range(len(values)), key=values.__getitem__, default=None)
        return None if best is None or values[best] < 0 else self.evals[best]  # -1: nothing to score

    @property
    def rate(self) -> float | None:
        """Images per second over all training steps and their waiting for data, all processes together."""
        if not self.steps:
            return self.throughput
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
        return record if complete and (record["kind"] != "eval" or PRIMARY & record["metrics"].keys()) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_log(folder: Path, run: Run) -> None:
    name = f"result_{run.start['config'].get('result_index', 0)}.txt"
    if not (folder / name).is_file():
        run.problems.append(f"{name} is missing: times are those of progress.jsonl")
        return
    keep_log(run, mlperf.read_log(folder / name))


def keep_log(run: Run, log: Log) -> None:
    run.mlperf = log
    for event in log.events:
        run.log.setdefault(event.key, []).append((event.time_ms, event.value))
    if log.bad:
        run.problems.append(
            f"left out of {log.path.name}, because unreadable or cut: {log.bad} line{'s' * (log.bad > 1)}"
        )


def read_log_alone(path: Path, ruleset: str) -> Run:
    """A run from its MLPerf log, whoever made it. Raises UserError where the file holds no event."""
    log = mlperf.read_log(path)
    if not log.events:
        with path.open("rb") as file:
            dllogger = file.read(5) == b"DLLL "
        kind = "has dllogger's lines, whose numbers its run's folder has too, and" if dllogger else "holds"
        raise UserError(f"{path}: {kind} no MLPerf event (:::MLLOG ...); name a log, or the --output-dir of a training")
    run = Run(parts=1)
    keep_log(run, log)
    about = facts(log.name("submission_benchmark"), ruleset)
    target = next(iter(about.targets.items())) if about and log.name("submission_division") != "open" else None
    said = {key: log.last(key) for key in dict.fromkeys(event.key for event in log.events) if _is_setting(key, log)}
    run.start = {
        "benchmark": log.name("submission_benchmark") or "unknown benchmark",
        "config": {"epochs": log.last("epoch_count"), "target_map": target and target[1], **said}, "environment": {},
        "notes": [f"Made from the MLPerf log {path.name} alone: it has neither losses nor detections."],
    }  # fmt: skip
    run.start["config"]["dataset"] = about.data if about else "?"
    run.status = log.status
    start = log.first("run_start") or log.events[0]
    run.total = (log.events[-1].time_ms - start.time_ms) / 1000 if log.minutes is None else log.minutes * 60
    for event in log.events:
        values, epoch = metrics(event.value), number(event.metadata.get("epoch_num"))
        if event.key == "eval_accuracy" and values and epoch is not None and epoch > 0:
            first, *rest = values.items()
            found = {"AP": first[1]} | dict(rest)
            seconds = (event.time_ms - start.time_ms) / 1000
            run.evals = [e for e in run.evals if e["epoch"] < epoch]
            run.evals.append({"step": 0, "epoch": int(epoch), "time_s": seconds, "metrics": found})
    split_time(run, log)
    train = run.seconds["train"]
    images = images_of_an_epoch(log, ruleset)
    stops = len(log.values("epoch_stop") or log.values("block_stop"))
    run.throughput = images * stops / train if images and stops and train else None
    return run


def images_of_an_epoch(log: Log, ruleset: str) -> int | None:
    """How many images an epoch has: train_samples, or the data set's size where that counts batches."""
    about, samples = facts(log.name("submission_benchmark"), ruleset), number(log.last("train_samples"))
    batch = number(log.last("global_batch_size"))
    if about and samples and batch and any(abs(samples - size / batch) <= 2 for size in about.train):
        return max(about.train)
    return int(samples) if samples else None


def _is_setting(key: str, log: Log) -> bool:
    """Whether an event says how the run was made: it stands there once, and is neither a time nor a result."""
    several = ("weights_initialization", "tracked_stats", "eval_accuracy", "status")
    return log.last(key) is not None and key not in several and not key.endswith(("_start", "_stop"))


def split_time(run: Run, log: Log) -> None:
    """Seconds by kind, from the intervals of the log. An evaluation beside the next epoch counts as training."""
    edges = {"init": "start_up", "epoch": "train", "block": "train", "eval": "evaluation"}
    spans: dict[str, list[tuple[int, int]]] = {kind: [] for kind in edges.values()}
    begun: dict[str, int] = {}
    for event in log.events:
        name, _, edge = event.key.rpartition("_")
        if name in edges and edge == "start":
            begun[name] = event.time_ms
        elif name in edges and edge == "stop" and name in begun:
            spans[edges[name]].append((begun.pop(name), event.time_ms))
    run.seconds["start_up"] = sum(b - a for a, b in spans["start_up"]) / 1000
    taken = sorted(span for span in spans["train"] if span[1] > span[0])
    run.seconds["train"] = sum(b - a for a, b in _joined(taken)) / 1000
    both = _joined(sorted([*taken, *(span for span in spans["evaluation"] if span[1] > span[0])]))
    run.seconds["evaluation"] = sum(b - a for a, b in both) / 1000 - run.seconds["train"]
    run.seconds["other"] = max(run.total - run.seconds["train"] - run.seconds["evaluation"], 0.0)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted intervals, those that overlap made one."""
    found: list[tuple[int, int]] = []
    for begin, end in spans:
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


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
