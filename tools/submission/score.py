"""The score of one result: the olympic mean of its runs' minutes, times the factor of the convergence check.

  python -m tools.submission score LOG_OR_FOLDER... [--ruleset 5.1.0] [--json]

Of five runs the fastest and the slowest are left out. One run that was aborted, killed or refused counts as the
slowest; two make the result invalid. Fewer than five runs have no score; their times are told.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detcore import UserError

from . import NOT_CHECKED, OK, REFUSED
from .lint import Verdict, check
from .logs import Log, collect, metrics, read_log
from .output import add_json, print_json, table
from .rcp import Judgement, judge
from .rulesets import DEFAULT, ROUNDS, known


def olympic(minutes: list[float | None]) -> float | None:
    """The mean of five runs' minutes without the fastest and the slowest; None among them: a run that does not count.

    None where there are not five, or more than one of them does not count. Source: training_rules, and
    result_summarizer of mlperf-logging, which leaves out a refused run instead of the slowest.
    """
    good = sorted(value for value in minutes if value is not None)
    if len(minutes) != ROUNDS or len(good) < ROUNDS - 1:
        return None
    return sum(good[1 : ROUNDS - 1]) / (ROUNDS - 2)


@dataclass(frozen=True)
class Score:
    """minutes: scaled, None without a score. factor: of the convergence check. ran: every check came to its end."""

    minutes: float | None
    unscaled: float | None
    factor: float
    sentence: str
    ran: bool = True
    judgement: Judgement | None = None


def counts(log: Log, verdict: Verdict | None = None) -> bool:
    """Whether a run's time counts: success, in one piece, by a clock that went forward, and accepted."""
    return log.status == "success" and log.minutes is not None and (verdict is None or verdict.ok)


def score(logs: list[Log], verdicts: list[Verdict], ruleset: str) -> Score:
    """The score of these logs with the official verdicts on them."""
    minutes = [log.minutes if counts(log, verdict) else None for log, verdict in zip(logs, verdicts)]
    lost = [str(log.path) for log, value in zip(logs, minutes) if value is None]
    if not all(verdict.ran for verdict in verdicts):
        return Score(None, None, 1.0, "no score: the official checker did not finish on every log", ran=False)
    mean = olympic(minutes)
    if len(logs) != ROUNDS:
        return Score(None, None, 1.0, f"no score: {len(logs)} runs, MLPerf scores {ROUNDS}")
    if mean is None:
        return Score(
            None, None, 1.0, f"no score: {len(lost)} of {ROUNDS} runs do not count, one may: {', '.join(lost)}"
        )
    words = f"olympic mean: {mean:.3f} minutes (fastest and slowest of {ROUNDS} left out"
    words += f"; {lost[0]} does not count and is taken as the slowest)" if lost else ")"
    factor, more, ran, judgement = scaling(logs, ruleset)
    if judgement and judgement.verdict == "fail":
        return Score(None, mean, factor, f"no score: {more}; {words}", ran, judgement)
    if factor != 1:
        words = f"score: {mean * factor:.3f} minutes = {words} x scaling factor {factor:.4f}"
    return Score(mean * factor if ran else None, mean, factor, f"{words}{f'; {more}' * bool(more)}", ran, judgement)


def scaling(logs: list[Log], ruleset: str) -> tuple[float, str, bool, Judgement | None]:
    """(factor of a closed result, words on convergence, whether it could be checked, the judgement if there is one)."""
    if any(log.name("submission_division") != "closed" for log in logs if log.events):
        return 1.0, "", True, None
    try:
        found = judge(logs, ruleset)
    except UserError as error:
        return 1.0, f"convergence was not checked: {error}", False, None
    return found.factor, found.sentence, found.verdict != "unknown", found


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.submission score", description=__doc__, formatter_class=form)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs, or folders that hold result_*.txt")
    parser.add_argument("--ruleset", default=DEFAULT, help="MLPerf Training ruleset (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args(argv)
    paths = collect(args.logs)
    logs = [read_log(path) for path in paths]
    verdicts = [check(path, known(args.ruleset)) for path in paths]
    found = score(logs, verdicts, args.ruleset)
    rows = [_row(log, verdict) for log, verdict in zip(logs, verdicts)]
    if args.json:
        fields = {
            "score_minutes": found.minutes,
            "olympic_mean_minutes": found.unscaled,
            "scaling_factor": found.factor,
        }
        print_json(fields | {"sentence": found.sentence, "runs": rows})
    else:
        cells = [[*map(str, row.values())] for row in rows]
        print("\n".join([*table(list(rows[0]), cells), found.sentence]))
    if not found.ran:
        return NOT_CHECKED
    return OK if found.minutes is not None else REFUSED


def _row(log: Log, verdict: Verdict) -> dict[str, Any]:
    epoch, value = log.last_evaluation or (None, None)
    metric = " ".join(f"{name} {v:.4f}" for name, v in metrics(value).items())
    return {
        "log": log.path, "counts": "yes" if counts(log, verdict) else "no", "status": log.status or "no end",
        "minutes": None if log.minutes is None else round(log.minutes, 3), "epochs": epoch, "metric": metric,
        "compliance": "accepted" if verdict.ok else verdict.complaints[0],
    }  # fmt: skip
