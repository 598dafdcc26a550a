"""Logs against MLPerf's rules: the official verdict on each, in words, and what the official checker does not look at.

  python -m tools.submission lint LOG_OR_FOLDER... [--ruleset 5.1.0] [--system-json FILE] [--json] [--details]

Several logs are taken as the runs of one result and compared with each other too. Errors break a rule; doubts are what
a reviewer will ask about, although no official checker does; notes are for information.
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import DOUBTFUL, NOT_CHECKED, OK, REFUSED, official
from .logs import TOKEN, Log, collect, number, read_log
from .output import add_json, print_json
from .plain import in_words
from .rulesets import DEFAULT, ROUNDS, facts, known, no_rules, own_rules
from .system import against_logs, read_description

PLACEHOLDERS = ("", "unset", "unknown", "none", "org", "company")
SAME = {  # over the runs of a result: whether the official checks fail where they differ
    "submission_benchmark": True, "submission_division": True, "global_batch_size": True,
    "submission_org": False, "submission_platform": False, "submission_status": False, "opt_name": False,
    "opt_base_learning_rate": False, "opt_weight_decay": False, "opt_learning_rate_warmup_epochs": False,
    "opt_learning_rate_warmup_factor": False, "opt_learning_rate_warmup_steps": False,
    "opt_learning_rate_decay_factor": False, "opt_learning_rate_decay_steps": False, "num_image_candidates": False,
    "gradient_accumulation_steps": False, "train_samples": False, "eval_samples": False,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """level: error, doubt or note. official: an official checker says the same. log: its path, "" for all together."""

    level: str
    words: str
    log: str = ""
    official: bool = False


@dataclass
class Verdict:
    """On one log. ran: the official checker came to its end; without that ok is False. output: all that it said."""

    ok: bool
    ran: bool
    title: str
    complaints: list[str] = field(default_factory=list)  # in words, what makes it refuse the log
    warnings: list[str] = field(default_factory=list)
    output: str = ""

    @property
    def line(self) -> str:
        """For the person at the terminal."""
        if self.ok:
            many = f"{len(self.warnings)} warnings, the first" if len(self.warnings) > 1 else "1 warning"
            return f"{self.title}: SUCCESS{f' with {many}: {self.warnings[0]}' if self.warnings else ''}"
        more = len(self.complaints) - 1
        rest = f" (and {more} more complaint{'s' * (more > 1)})" if more > 0 else ""
        return f"{self.title}: FAILED: {self.complaints[0]}{rest}"


def check(path: Path, ruleset: str, called: Path | None = None) -> Verdict:
    """The official compliance checker's verdict on a log, with its reasons. Raises UserError for an unknown ruleset.

    `called`: the log's name in what is said, where this program sees the log in a container and the reader does not.
    Logs of a benchmark that MLPerf has no rules for, but this project (tools/rules_<benchmark>.yaml), are checked by
    those, and the verdict says so: it is none on compliance.
    """
    known(ruleset)
    called = called or path
    log = read_log(path) if path.is_file() else Log(path)
    own = own_rules(log.name("submission_benchmark"), ruleset)
    title = f"events of {called}, {own.name} (no MLPerf ruleset has this benchmark)" if own else ""
    title = title or f"compliance of {called}, ruleset {ruleset}"
    if reason := _unfit(path, log, "" if own else ruleset):
        return Verdict(False, True, title, [reason])
    said = official.compliance(path.resolve(), ruleset, own)
    output = said.words.replace(str(path.resolve()), str(called))
    if not said.ran:
        why = _types(log)
        reason = f"the official checker did not finish ({said.errors.rpartition('broke down: ')[2]})"
        return Verdict(False, False, title, [*why, reason], output=output)
    told = [text for text in said.value.errors if log.values("submission_division") or "first_init_start" not in text]
    errors = [in_words(text, log, ruleset) for text in told or said.value.errors]  # without a division the limit is 0
    if log.resumed:
        parts = len(log.values("run_start"))
        errors.insert(0, f"the run was resumed, so its log has {parts} parts and is no result")
    warnings = [in_words(text, log, ruleset) for text in said.value.warnings]
    return Verdict(said.ok and not log.resumed, True, title, errors, warnings, output)


def _unfit(path: Path, log: Log, ruleset: str) -> str:
    """Why the official checker can't judge a log at all, or must not be asked; empty if it can."""
    if not path.is_file():
        return "there is no such file; the trial ended before it wrote a log"
    if path.stat().st_size == 0:
        return "the file is empty; the trial ended before it wrote a line, or the disk is full"
    if not log.events:
        return _no_events(path, log)
    divisions, benchmarks = log.values("submission_division"), log.values("submission_benchmark")
    for division in divisions:
        if division not in ("closed", "open"):
            near = f"; write it {division.lower()!r}" if str(division).lower() in ("closed", "open") else ""
            return f"submission_division is {division!r}, 'closed' or 'open' is wanted{near}"
    for benchmark in benchmarks:
        if official.harmful([benchmark]):
            return f"submission_benchmark is {str(benchmark)[:60]!r}, which is no benchmark's name"
        for division in divisions if ruleset else ():
            if reason := no_rules(benchmark, division, ruleset):
                return reason
    return ""


def _no_events(path: Path, log: Log) -> str:
    with path.open("rb") as file:
        start = file.read(4000)
    if b"\0" in start and TOKEN in start.decode("utf-16", errors="replace") + start.decode("utf-16-be", "replace"):
        return "the file is UTF-16, as PowerShell's > writes it; convert it: iconv -f utf-16 -t utf-8"
    if log.bad:
        return f"none of its {log.bad} event lines (:::MLLOG ...) can be read: is the file cut or damaged?"
    return "the file holds no MLPerf event (:::MLLOG ...); the trial ended before init_start"


def _types(log: Log) -> list[str]:
    """Values that break the official checkers down, in words."""
    found = []
    for event in log.events:
        if event.key == "eval_accuracy" and not isinstance(event.value, dict) and number(event.value) is None:
            found.append(f"eval_accuracy is {event.value!r}, a number without quotes is wanted")
    return list(dict.fromkeys(found))[:3]


def lint(
    paths: list[Path], ruleset: str, description: Path | None = None, *, one_result: bool = True
) -> tuple[list[Verdict], list[Finding]]:
    """The official verdict on each log, and everything that is found, errors first.

    one_result: the runs belong together and are compared with each other.
    """
    verdicts = [check(path, ruleset) for path in paths]
    logs = [read_log(path) if path.is_file() else Log(path) for path in paths]
    found = []
    for verdict, log in zip(verdicts, logs):
        found += [Finding("error", words, str(log.path), True) for words in verdict.complaints]
        found += [Finding("note", words, str(log.path), True) for words in verdict.warnings]
        found += [Finding(level, words, str(log.path)) for level, words in of_one(log, ruleset)]
    found += of_all([log for log in logs if log.events]) if one_result else []
    if description:
        found += [Finding(level, words) for level, words in against_logs(read_description(description), logs)]
    order = {"error": 0, "doubt": 1, "note": 2}
    return verdicts, sorted(found, key=lambda one: order[one.level])


def of_one(log: Log, ruleset: str) -> Iterable[tuple[str, str]]:
    """(level, words) of what the official compliance checker does not look at."""
    if not log.events:
        return
    if fault := log.clock_fault():
        yield "error", f"{fault}. Its time means nothing, so the run can't count: keep clocks in step (chrony, ntpd)"
    elif step := log.clock_step():
        yield "doubt", f"{step}: is its time right?"
    org = log.last("submission_org")
    if isinstance(org, str) and is_placeholder(org):
        yield "note", f"submission_org is {org!r}, as if it had never been set (MLPERF_SUBMISSION_ORG)"
    fatal = "error" if log.name("submission_division") == "closed" else "doubt"  # the open one's are not looked at
    if odd := [epoch for epoch, _ in log.evaluations if number(epoch) is None]:
        words = (
            f"epoch_num of {len(odd)} eval_accuracy is {odd[-1]!r}; a number is wanted, the epochs completed until then"
        )
        yield fatal, f"{words}. The official convergence and package checkers break down on it"
    seeds = log.values("seed")
    if not seeds:
        yield fatal, "no seed is logged"
    elif any(number(seed) is None and not str(seed).lstrip("-").isdecimal() for seed in seeds):
        yield fatal, f"seed is {seeds[-1]!r}, a whole number is wanted"
    if log.name("submission_division") != "open":
        yield from (("doubt", words) for words in other_data(log, ruleset))


def is_placeholder(org: str) -> bool:
    return org.strip().lower() in PLACEHOLDERS or "placeholder" in org.lower()


def other_data(log: Log, ruleset: str) -> Iterable[str]:
    """Words on train_samples and eval_samples that are neither the data set's images nor, as in some logs, batches."""
    about = facts(log.name("submission_benchmark"), ruleset)
    if about is None:
        return
    batch = number(log.last("global_batch_size")) or math.inf
    for key, sizes in (("train_samples", about.train), ("eval_samples", about.val)):
        value = number(log.last(key))
        batches = [size / batch for size in sizes] if key == "train_samples" else []
        few = key == "eval_samples" and value is not None and 1 <= value < max(sizes) / 8  # batches of unknown size
        if value is None or value in sizes or few or any(abs(value - n) <= 2 for n in batches):
            continue
        wanted = " or ".join(f"{size:,}" for size in sorted(sizes))
        yield f"{key} is {value:,.0f}; {about.data} has {wanted} images: was it another data set?"


def of_all(logs: list[Log]) -> list[Finding]:
    """What speaks against these runs as one result."""
    found = []
    for key, fatal in SAME.items():
        values: dict[str, list[str]] = {}
        for log in logs:
            values.setdefault(repr(log.last(key)), []).append(str(log.path))
        if len(values) > 1:
            told = ", ".join(f"{value} in {_names(paths)}" for value, paths in values.items())
            found.append(Finding("error" if fatal else "doubt", f"the runs differ in {key}: {told}", official=fatal))
    places: dict[tuple[Any, ...], str] = {}
    seen: dict[str, str] = {}
    for log in logs:
        for event in log.events:
            if event.key != "seed":
                continue
            seed, path = repr(event.value), str(log.path)
            place = (event.metadata.get("file"), event.metadata.get("lineno"), seed)
            if places.setdefault(repr(place), path) != path:
                words = f"it has seed {event.value}, as has {places[repr(place)]}: each run needs its own (unset SEED)"
                found.append(Finding("error", words, path, True))
            elif seen.setdefault(seed, path) != path:
                found.append(Finding("doubt", f"it has seed {event.value}, as has {seen[seed]}", path))
    first = [number(log.last("seed")) for log in logs]
    if len(logs) > 2 and None not in first and {b - a for a, b in pairwise(first)} == {1}:
        words = f"the seeds are {first[0]:.0f}, {first[0] + 1:.0f}, ...: the closed division allows no fixed ones"
        found.append(Finding("note", f"{words} (unset SEED)"))
    found += _counts(logs)
    return found


def _names(paths: list[str], most: int = 1) -> str:
    return ", ".join(paths) if len(paths) <= most else f"{len(paths)} logs ({paths[0]}, ...)"


def _counts(logs: list[Log]) -> list[Finding]:
    """Logs that stand there twice, and runs at the same time."""
    same = [log for i, log in enumerate(logs) if any(log.events == other.events for other in logs[:i])]
    found = [Finding("error", "it is the same log as an earlier one", str(log.path)) for log in same]
    times = sorted((log.events[0].time_ms, log.events[-1].time_ms) for log in logs)
    if not same and any(later[0] < earlier[1] for earlier, later in pairwise(times)):
        found.append(Finding("note", "the runs overlap in time: were they on nodes of their own?"))
    return found


def told(findings: list[Finding]) -> list[str]:
    """A line for each finding; what is said of several logs stands there once."""
    logs: dict[tuple[str, str], list[str]] = {}
    for one in findings:
        logs.setdefault((one.level, one.words), []).extend([one.log] * bool(one.log))
    return [
        f"{level}: {_names(names, 2) if names else ''}{': ' * bool(names)}{words}"
        for (level, words), names in logs.items()
    ]


def exit_code(verdicts: list[Verdict], findings: list[Finding]) -> int:
    if not all(verdict.ran for verdict in verdicts):
        return NOT_CHECKED
    if any(one.level == "error" for one in findings):
        return REFUSED
    return DOUBTFUL if any(one.level == "doubt" for one in findings) else OK


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.submission lint", description=__doc__, formatter_class=form)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs, or folders that hold result_*.txt")
    parser.add_argument("--ruleset", default=DEFAULT, help="MLPerf Training ruleset (default: %(default)s)")
    parser.add_argument(
        "--system-json", type=Path, metavar="FILE", help="the system description, compared with the logs"
    )
    parser.add_argument("--each", action="store_true", help="the logs have nothing to do with each other")
    parser.add_argument("--details", action="store_true", help="print all that the official checker said, too")
    add_json(parser)
    args = parser.parse_args(argv)
    paths = collect(args.logs)
    verdicts, findings = lint(paths, known(args.ruleset), args.system_json, one_result=not args.each)
    code = exit_code(verdicts, findings)
    if args.json:
        logs = [
            {"log": path, "ok": v.ok, "checked": v.ran, "complaints": v.complaints, "warnings": v.warnings}
            for path, v in zip(paths, verdicts)
        ]
        print_json({"code": code, "logs": logs, "findings": [asdict(one) for one in findings]})
        return code
    for path, verdict in zip(paths, verdicts):
        print(f"{path}: {'accepted' if verdict.ok else 'refused' if verdict.ran else 'NOT CHECKED'}, {verdict.title}")
        if args.details:
            print(verdict.output)
    print("\n".join(told(findings)))
    if len(paths) not in (1, ROUNDS) and not args.each:
        print(f"note: {len(paths)} logs; a result has exactly {ROUNDS}")
    return code
