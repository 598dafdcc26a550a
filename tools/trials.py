#!/usr/bin/env python3
"""What became of the trials of a job: is a log compliant, why did a trial fail, how long did they take.

  python tools/trials.py check LOG --ruleset 5.1.0 --append compliance.out
  python tools/trials.py explain FOLDER --code 6 --nodes n1,n2 --ranks-per-node 8
  python tools/trials.py summary --logdir results --stamp 250101120000_17 --runs 5

run.sub calls all three. `check` ends with 0 if the official checker of mlperf-logging accepts the log and 1 if not;
the other two end with 0.
"""

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from trials_explain import code_words, explain

from detcore import UserError, cli

TRIALS = 5  # of a result; MLPerf's olympic mean leaves out the fastest and the slowest
_VERDICT = re.compile(r"^compliance of (.+), ruleset \S+: (SUCCESS|FAILED)")


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

    @property
    def resumed(self) -> bool:
        return len(self.values("run_start")) > 1

    @property
    def status(self) -> str | None:
        """Of the last run_stop after the last run_start: success, aborted, or None where there is no end."""
        stop = self._stop()
        return stop.metadata.get("status") if stop else None

    @property
    def minutes(self) -> float | None:
        """run_stop - run_start; None for a log without an end and for a run in several parts."""
        stop = self._stop()
        start = next((e for e in self.events if e.key == "run_start"), None)
        return (stop.time_ms - start.time_ms) / 60000 if stop and start and not self.resumed else None

    @property
    def last_evaluation(self) -> tuple[int | None, Any] | None:
        """(epoch_num, value) of the last eval_accuracy before run_stop, as the convergence checker counts epochs."""
        end = self._stop()
        events = self.events[: self.events.index(end)] if end else self.events
        found = [e for e in events if e.key == "eval_accuracy"]
        return (found[-1].metadata.get("epoch_num"), found[-1].value) if found else None

    def _stop(self) -> Event | None:
        """The last run_stop, unless the run started once more after it."""
        ends = [e for e in self.events if e.key in ("run_start", "run_stop")]
        return ends[-1] if ends and ends[-1].key == "run_stop" else None


def read_log(path: Path) -> Log:
    """Reads a log, or any text that holds one, the way the official parser does: the last event of each line counts."""
    log = Log(path)
    with path.open(encoding="latin-1") as file:
        for line in file:
            _, token, text = line.rpartition(":::MLLOG ")
            if not token:
                continue
            try:
                fields = json.loads(text)
                event = Event(fields["key"], int(fields["time_ms"]), fields["value"], fields["metadata"] or {})
                event.metadata.get("status")
                log.events.append(event)
            except (ValueError, KeyError, TypeError, AttributeError):
                log.bad += 1
    return log


@cache
def rulesets() -> dict[str, set[str]]:
    """Each training ruleset of the installed checker, with the names of its rule files such as closed_retinanet."""
    package = importlib.util.find_spec("mlperf_logging")
    if package is None:
        raise UserError(f"mlperf-logging is missing in {sys.executable}: pip install mlperf-logging")
    folder = Path(package.origin).parent / "compliance_checker"
    return {
        path.name.removeprefix("training_"): {rules.stem for rules in path.glob("*.yaml")}
        for path in sorted(folder.glob("training_*.*.*"))
        if re.fullmatch(r"training_\d+\.\d+\.\d+", path.name)
    }


def official(checker: str, *words: str) -> tuple[int, str]:
    """Runs one of mlperf-logging's checkers; returns its exit code and all that it said.

    The checkers append what they say to a file, by default in the working directory: here in one that is removed.
    Paths among the words must be absolute.
    """
    rulesets()  # says it clearly if the package is missing
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"mlperf_logging.{checker}", "--log_output", f"{folder}/log", *words]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    return done.returncode, "".join(line for line in done.stdout.splitlines(True) if folder not in line)


class Verdict(NamedTuple):
    ok: bool
    line: str  # for the person at the terminal
    output: str  # of the official checker
    complaints: list[str]


def check(path: Path, ruleset: str, called: Path | None = None) -> Verdict:
    """The official compliance checker's verdict on a log, with its reason. Raises UserError for an unknown ruleset.

    `called`: the log's name in what is said, where this program sees the log in a container and the reader does not.
    Logs of a benchmark that MLPerf has no rules for, but this project (tools/rules_<benchmark>.yaml), are checked by
    those, and the verdict says so: it is none on compliance.
    """
    if ruleset not in rulesets():
        raise UserError(f"ruleset {ruleset!r} is not known to mlperf-logging; choose one of {', '.join(rulesets())}")
    own = _own_rules(path, ruleset)
    called = called or path
    title = f"events of {called}, {own.name} (no MLPerf ruleset has this benchmark)" if own else ""
    title = title or f"compliance of {called}, ruleset {ruleset}"
    output, complaints = "", []
    reason = None if own else _unfit(path, ruleset)
    if reason is None:
        words = ("--usage", "training", "--ruleset", ruleset, *(("--config", str(own)) if own else ()))
        code, output = official("compliance_checker", *words, str(path.resolve()))
        output = output.replace(str(path.resolve()), str(called))
        complaints = _complaints(output)
        if code == 0 and "INFO - SUCCESS" in output:
            many = f"{len(complaints)} warnings, the first" if len(complaints) > 1 else "1 warning"
            warned = f" with {many}: {complaints[0]}" if complaints else ""
            return Verdict(True, f"{title}: SUCCESS{warned}", output, complaints)
        reason = (
            complaints[0] if complaints else f"the checker itself failed: {(output.strip() or '?').splitlines()[-1]}"
        )
        starts = len(read_log(path).values("run_start"))
        if starts > 1:
            reason = f"the run was resumed, so its log has {starts} parts and is no result; the checker: {reason}"
        more = len(complaints) - 1
        reason += f" (and {more} more complaint{'s' * (more > 1)})" if more > 0 else ""
    return Verdict(False, f"{title}: FAILED: {reason}", output, complaints)


def _own_rules(path: Path, ruleset: str) -> Path | None:
    """This project's rule file for a log, where the ruleset has none for its benchmark."""
    names = read_log(path).values("submission_benchmark") if path.is_file() else []
    rules = Path(__file__).resolve().parent / f"rules_{names[0]}.yaml" if names else None
    return rules if rules and rules.is_file() and f"closed_{names[0]}" not in rulesets()[ruleset] else None


def _unfit(path: Path, ruleset: str) -> str | None:
    """Why the checker can't judge a log at all; None if it can."""
    if not path.is_file():
        return "there is no such file; the trial ended before it wrote a log"
    if path.stat().st_size == 0:
        return "the file is empty; the trial ended before it wrote a line, or the disk is full"
    log = read_log(path)
    if not log.events:
        return "the file holds no MLPerf event (:::MLLOG ...); the trial ended before init_start"
    for benchmark in log.values("submission_benchmark"):
        for division in log.values("submission_division"):
            if division in ("closed", "open") and f"{division}_{benchmark}" not in rulesets()[ruleset]:
                have = [name for name, files in rulesets().items() if f"{division}_{benchmark}" in files]
                hint = f"these have: {', '.join(have)}; set MLPERF_RULESET" if have else "no other has them either"
                former = "; rulesets 2.0 to 4.1 call it ssd" if benchmark == "retinanet" else ""
                return f"this ruleset has no rules for {benchmark} ({division} division); {hint}{former}"
    return None


def _complaints(output: str) -> list[str]:
    """The checker's complaints, each in one line, those that made it refuse the log first."""
    text = output.partition("\nERROR - FAILED")[0].partition("\nINFO - SUCCESS")[0]
    found = []
    for block in re.split(r"^(?:INFO|WARNING) - *", text, flags=re.MULTILINE):
        if block.startswith(("Running compliance", "Compliance checks", "Found parsing errors")) or not block.strip():
            continue
        for part in block.split("\n" + "-" * 30 + "\n"):
            lines = [line.strip() for line in part.strip().splitlines()]
            if lines and lines[0].startswith("^^"):
                found[-1] = f"unreadable event ({lines[0].removeprefix('^^').strip()}): {found[-1][:120]}"
                continue
            test = next((line for line in lines if line.startswith("failed test:")), None)
            found += [f"{lines[0].rstrip(':')}, {test}" if test and test != lines[0] else lines[0]] if lines else []
    if "Traceback (most recent call last)" in output:
        found = [line for line in found if not line.startswith("Traceback")]
    harmless = re.compile(r"Required EXACTLY_ONE occurrence of '\w+' but found [1-9]\d*$")
    return sorted(found, key=lambda line: bool(harmless.match(line)))


def append_verdict(path: Path, log: Path, verdict: Verdict) -> None:
    """Adds the checker's words to a file, below a header that names the log; a full disk is said, not raised."""
    header = f"===== {log} ===== {time.strftime('%Y-%m-%d %H:%M:%S')} =====\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(f"{header}{verdict.output}{verdict.line}\n\n")
    except OSError as error:
        print(f"warning: {path} could not be written ({error.strerror}): is the disk full?", file=sys.stderr)


@dataclass
class Row:
    """One trial in the summary. `minutes` are None where the log has no whole run; `log` is what was read."""

    trial: int
    outcome: str = "not started"
    minutes: float | None = None
    epochs: int | None = None
    metric: str = ""
    compliance: str = ""
    log: str = ""
    note: str = ""
    counts: bool = False  # for the score: success in one piece, and not refused by the checker
    ran: bool = False


def find_log(logdir: Path, stamp: str, k: int) -> Log | None:
    """The log of trial k: the one that rank 0 wrote itself, else what is left of it in the task's output."""
    folder = logdir / f"{stamp}_{k}"
    candidates = [folder / f"result_{k - 1}.txt", logdir / f"{stamp}_{k}.log", folder / "rank_0.log"]
    logs = [read_log(path) for path in candidates if path.is_file()]
    return next((log for log in logs if log.events), logs[0] if logs else None)


def summarise(logdir: Path, stamp: str, k: int, verdicts: dict[str, str]) -> Row:
    """Trial k of a job, from its folder and its log. `verdicts`: what `read_verdicts` gives."""
    row, folder = Row(k), logdir / f"{stamp}_{k}"
    log = find_log(logdir, stamp, k)
    if not folder.is_dir() and log is None:
        return row
    row.compliance = verdicts.get(folder.name, "not checked")
    row.log = str(log.path) if log else "missing"
    log = log or Log(folder)
    row.minutes = log.minutes
    if log.last_evaluation:
        row.epochs, value = log.last_evaluation
        parts = value.items() if isinstance(value, dict) else [("", value)]
        row.metric = " ".join(f"{n} {v:.4f}".strip() if isinstance(v, int | float) else f"{n} {v}" for n, v in parts)
    text = (folder / "exit_code").read_text(errors="replace").strip() if (folder / "exit_code").is_file() else None
    code = int(text) if text and re.fullmatch(r"\d{1,3}", text) else None
    row.ran = code is not None
    plain = {cli.TARGET_NOT_REACHED: "target not reached", cli.STOPPED: "stopped", None: "running"}
    if code == cli.OK and log.status == "success":
        row.outcome = "success"
    elif code == cli.OK:
        row.outcome = "failed (0, no success in log)"
    else:
        row.outcome = plain.get(code, f"failed ({code}, {code_words(code)})")
        if log.status == "success":
            row.note = f"trial {k}: its log ends with success, but the program ended with exit code {code}"
    if (folder / "interrupted.txt").is_file():
        row.note = f"trial {k}: {(folder / 'interrupted.txt').read_text(errors='replace').strip()}"
    row.counts = row.outcome == "success" and not log.resumed and row.compliance != "FAILED" and row.minutes is not None
    row.outcome += ", resumed" * log.resumed
    return row


def read_verdicts(path: Path) -> dict[str, str]:
    """The last verdict on each trial (by its <stamp>_<k>) in a file that `check --append` wrote."""
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        if match := _VERDICT.match(line):
            log = Path(match[1])
            found[log.parent.name] = found[log.name.removesuffix(".log")] = match[2]
    return found


def score(rows: list[Row]) -> tuple[float | None, str]:
    """(olympic mean in minutes or None, the sentence): MLPerf drops the fastest and the slowest of five.

    One run that failed counts as the slowest; two make the result invalid.
    """
    good = sorted(row.minutes for row in rows if row.counts)
    bad = [str(row.trial) for row in rows if not row.counts]
    if len(rows) != TRIALS:
        return None, f"no score: MLPerf scores {TRIALS} trials, this job had {len(rows)}"
    if not all(row.ran for row in rows):
        waiting = [str(row.trial) for row in rows if not row.ran]
        return None, f"no score: not all {TRIALS} trials have ended ({', '.join(waiting)})"
    if len(good) < TRIALS - 1:
        return None, f"no score: only {len(good)} of {TRIALS} trials count (not {', '.join(bad)}), 4 are needed"
    middle = good[1:4]
    mean = sum(middle) / len(middle)
    slowest = f"; trial {bad[0]} does not count and is taken as the slowest" if bad else ""
    unchecked = "" if all(row.compliance == "SUCCESS" for row in rows if row.counts) else "; compliance not checked"
    return mean, f"olympic mean: {mean:.3f} minutes (fastest and slowest of {TRIALS} left out{slowest}{unchecked})"


def table(rows: list[Row]) -> list[str]:
    head = ["trial", "outcome", "minutes", "epochs", "metric", "compliance", "log"]
    cells = [
        [
            str(r.trial), r.outcome, "-" if r.minutes is None else f"{r.minutes:.3f}",
            "-" if r.epochs is None else str(r.epochs), r.metric or "-", r.compliance or "-", r.log or "-",
        ]
        for r in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *cells]]


def summary(logdir: Path, stamp: str, runs: int, json_file: Path | None) -> int:
    verdicts = read_verdicts(logdir / f"compliance_{stamp}.out")
    rows = [summarise(logdir, stamp, k, verdicts) for k in range(1, runs + 1)]
    mean, sentence = score(rows)
    notes = [row.note for row in rows if row.note]
    reached = sum(row.outcome.startswith("success") for row in rows)
    print("\n".join([*table(rows), *notes, f"{reached} of {runs} trials ended with success; {sentence}"]))
    if json_file:
        record = {"stamp": stamp, "trials": [asdict(row) for row in rows], "olympic_mean_minutes": mean}
        json_file.write_text(json.dumps(record | {"score": sentence}, indent=1) + "\n")
    return cli.OK


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="trials.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("check", help="the official compliance checker's verdict on one log, in one line")
    part.add_argument("log", type=Path, help="a log with MLPerf events, among other lines or alone")
    part.add_argument("--ruleset", default="5.1.0", help="MLPerf Training ruleset (default: 5.1.0)")
    part.add_argument("--append", type=Path, metavar="FILE", help="add all that the checker said to this file")
    part.add_argument("--called", type=Path, metavar="PATH", help="the log's name in messages (default: as given)")
    part = commands.add_parser("explain", help="why a trial failed: which rank, which node, its last lines")
    part.add_argument("folder", type=Path, help="the trial's folder with rank_<r>.log and exits.txt")
    part.add_argument("--code", type=int, required=True, help="exit code of the launcher (srun, torchrun)")
    part.add_argument("--nodes", required=True, help="names of the nodes in the order of the ranks: n1,n2")
    part.add_argument("--ranks-per-node", type=int, required=True, metavar="N", help="ranks on each node")
    part = commands.add_parser("summary", help="a table of all trials of a job, and the olympic mean of five")
    part.add_argument("--logdir", type=Path, required=True, help="LOGDIR of the job")
    part.add_argument("--stamp", required=True, help="DATESTAMP of the job: the logs are <stamp>_<k>.log")
    part.add_argument("--runs", type=int, required=True, help="number of trials, NEXP")
    part.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    args = parser.parse_args(argv)
    if args.command == "check":
        verdict = check(args.log, args.ruleset, args.called)
        if args.append:
            append_verdict(args.append, args.called or args.log, verdict)
        print(verdict.line)
        return cli.OK if verdict.ok else cli.CRASH
    if args.command == "explain":
        if not args.folder.is_dir():
            raise UserError(f"{args.folder}: no such folder; the trial did not start. Is LOGDIR writable on all nodes?")
        nodes = [name for name in args.nodes.split(",") if name]
        print(explain(args.folder, args.code, nodes, max(args.ranks_per_node, 1)))
        return cli.OK
    if not list(args.logdir.glob(f"{args.stamp}_*")):
        raise UserError(f"{args.logdir} holds nothing of DATESTAMP {args.stamp}; its names begin the logs' there")
    return summary(args.logdir, args.stamp, args.runs, args.json)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
