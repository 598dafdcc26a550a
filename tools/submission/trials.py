"""What became of the trials of a job: is a log compliant, why did a trial fail, how long did they take.

  python tools/trials.py check LOG --ruleset 5.1.0 --append compliance.out
  python tools/trials.py explain FOLDER --code 6 --nodes n1,n2 --ranks-per-node 8
  python tools/trials.py summary --logdir results --stamp 250101120000_17 --runs 5

run.sub calls all three. `check` ends with 0 if the official checker of mlperf-logging accepts the log and 1 if not;
the other two end with 0.
"""

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from detcore import UserError, cli

from .explain import code_words, explain
from .lint import Verdict, check
from .logs import Log, find_log, number, read_log
from .output import plain, table
from .rcp import public_runs
from .rulesets import DEFAULT, ROUNDS, known
from .score import Score, counts, olympic, scaling

_VERDICT = re.compile(r"^compliance of (.+), ruleset \S+: (SUCCESS|FAILED)")


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
        epoch, value = log.last_evaluation
        row.epochs = None if number(epoch) is None else epoch
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
    row.counts = row.outcome == "success" and counts(log) and row.compliance != "FAILED"
    if fault := log.clock_fault():
        row.note = f"trial {k}: {fault}; its time does not count"
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


def job_score(rows: list[Row], ruleset: str) -> Score:
    """The score of a job's trials: by the same rules as `score`, with the verdicts and exit codes of the trials.

    A job whose trials were not checked has a score, too, which says so.
    """
    if len(rows) != ROUNDS:
        return Score(None, None, 1.0, f"no score: MLPerf scores {ROUNDS} trials, this job had {len(rows)}")
    if not all(row.ran for row in rows):
        waiting = [str(row.trial) for row in rows if not row.ran]
        return Score(None, None, 1.0, f"no score: not all {ROUNDS} trials have ended ({', '.join(waiting)})")
    bad = [str(row.trial) for row in rows if not row.counts]
    mean = olympic([row.minutes if row.counts else None for row in rows])
    if mean is None:
        words = f"no score: only {ROUNDS - len(bad)} of {ROUNDS} trials count (not {', '.join(bad)}), 4 are needed"
        return Score(None, None, 1.0, words)
    slowest = f"; trial {bad[0]} does not count and is taken as the slowest" if bad else ""
    unchecked = "" if all(row.compliance == "SUCCESS" for row in rows if row.counts) else "; compliance not checked"
    words = f"olympic mean: {mean:.3f} minutes (fastest and slowest of {ROUNDS} left out{slowest}{unchecked})"
    logs = [read_log(Path(row.log)) if Path(row.log).is_file() else Log(Path(row.log)) for row in rows]
    factor, more, ran, judgement = scaling(logs, ruleset)
    if judgement and judgement.verdict == "fail":
        return Score(None, mean, factor, f"no score: {more}; {words}", ran, judgement)
    if factor != 1:
        words = f"score: {mean * factor:.3f} minutes = {words} x scaling factor {factor:.4f}"
    return Score(mean * factor, mean, factor, f"{words}{f'; {more}' * bool(more)}", ran, judgement)


def job_table(rows: list[Row]) -> list[str]:
    cells = [
        [
            str(r.trial), r.outcome, "-" if r.minutes is None else f"{r.minutes:.3f}",
            "-" if r.epochs is None else str(r.epochs), r.metric or "-", r.compliance or "-", r.log or "-",
        ]
        for r in rows
    ]  # fmt: skip
    return table(["trial", "outcome", "minutes", "epochs", "metric", "compliance", "log"], cells)


def summary(logdir: Path, stamp: str, runs: int, json_file: Path | None, ruleset: str) -> int:
    verdicts = read_verdicts(logdir / f"compliance_{stamp}.out")
    rows = [summarise(logdir, stamp, k, verdicts) for k in range(1, runs + 1)]
    found = job_score(rows, ruleset)
    notes = [row.note for row in rows if row.note]
    reached = sum(row.outcome.startswith("success") for row in rows)
    print("\n".join([*job_table(rows), *notes, f"{reached} of {runs} trials ended with success; {found.sentence}"]))
    if json_file:
        record = {"stamp": stamp, "trials": [asdict(row) for row in rows], "olympic_mean_minutes": found.unscaled}
        record |= {"score_minutes": found.minutes, "scaling_factor": found.factor, "score": found.sentence}
        json_file.write_text(json.dumps(plain(record), indent=1) + "\n")
    return cli.OK


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="tools/trials.py", description=__doc__, formatter_class=form)
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
    part.add_argument("--ruleset", default=os.environ.get("MLPERF_RULESET") or DEFAULT,
        help="for the convergence check (default: MLPERF_RULESET or %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.command == "check":
        verdict = check(args.log, args.ruleset, args.called)
        if args.append:
            append_verdict(args.append, args.called or args.log, verdict)
        print(verdict.line)
        rows = public_runs(read_log(args.log), args.ruleset) if args.log.is_file() else []
        far = [row["words"] for row in rows if row["far"]]
        print("".join(f"warning: {words}\n" for words in far[:1]), end="", file=sys.stderr)
        return cli.OK if verdict.ok else cli.CRASH
    if args.command == "explain":
        if not args.folder.is_dir():
            raise UserError(f"{args.folder}: no such folder; the trial did not start. Is LOGDIR writable on all nodes?")
        nodes = [name for name in args.nodes.split(",") if name]
        print(explain(args.folder, args.code, nodes, max(args.ranks_per_node, 1)))
        return cli.OK
    if not list(args.logdir.glob(f"{args.stamp}_*")):
        raise UserError(f"{args.logdir} holds nothing of DATESTAMP {args.stamp}; its names begin the logs' there")
    return summary(args.logdir, args.stamp, args.runs, args.json, known(args.ruleset))


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
