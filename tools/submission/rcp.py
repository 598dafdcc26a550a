"""Convergence against the reference convergence points (RCPs), for one to five runs, also while a job goes on.

  python -m tools.submission rcp LOG_OR_FOLDER... [--ruleset 5.1.0] [--json]

The points, their pruning and interpolation are mlperf-logging's; the rule is that of its RCP checker: of five runs the
fewest and the most epochs are left out, a run that did not converge counts as the most. A mean below the lowest
acceptable one fails; one between it and the reference's mean is accepted, and the score is multiplied by the ratio.
"""

import argparse
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from detcore import UserError
from single_stage_detector import convergence

from . import DOUBTFUL, NOT_CHECKED, OK, REFUSED
from .lint import other_data
from .logs import Log, collect, metrics, number, read_log
from .output import add_json, print_json
from .rulesets import DEFAULT, RETINANET, ROUNDS, facts, known

_TOO_LARGE = "the batch is above the largest reference point"
MOST_EPOCHS = 100  # that are looked through for what the runs to come may take


@dataclass(frozen=True)
class Judgement:
    """verdict: pass, scale, fail, open (too few runs to say) or unknown (nothing to compare with).

    epochs: of each run, infinite where it did not converge. mean: of all five without the fewest and the most, of fewer
    runs plainly; reference: the mean to compare with; lowest: what is still accepted; factor: for the score, 1 without.
    """

    verdict: str
    sentence: str
    batch: int | None
    epochs: tuple[float, ...]
    mean: float | None = None
    reference: float | None = None
    lowest: float | None = None
    factor: float = 1.0
    of: str = ""
    needs: str = ""  # what the runs that are still to come have to do

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"epochs": [e if math.isfinite(e) else None for e in self.epochs]}


def epochs_of(log: Log) -> float:
    """The epochs that a run took, infinite if it did not converge. Raises UserError if epoch_num is no number."""
    last = log.last_evaluation
    if log.status != "success" or last is None:
        return math.inf
    epochs = number(last[0])
    if epochs is None:
        raise UserError(
            f"{log.path}: epoch_num of its last eval_accuracy is {last[0]!r}, a number is wanted: the epochs completed"
        )
    return round(epochs, 3)


def judge(logs: list[Log], ruleset: str) -> Judgement:
    """The verdict on these runs as (the beginning of) one result; logs without events are runs that did not converge.

    Raises UserError where they are not of one kind.
    """
    begun = [log for log in logs if log.events]
    names = {log.name("submission_benchmark") for log in begun}
    batches = [number(log.last("global_batch_size")) for log in begun]
    if len(names) != 1 or len(set(batches) - {None}) > 1:
        told = ", ".join(
            f"{log.path}: {log.name('submission_benchmark')} {log.last('global_batch_size')}" for log in logs
        )
        raise UserError(f"these runs differ in benchmark or global_batch_size, so they are no one result: {told}")
    epochs = tuple(epochs_of(log) for log in logs)
    if None in batches:
        without = ", ".join(str(log.path) for log, batch in zip(begun, batches) if batch is None)
        return Judgement(
            "fail", f"no global_batch_size in {without}: the official checker wants it in each", None, epochs
        )
    return judge_epochs(names.pop(), begun[0].last("global_batch_size"), epochs, ruleset)


def judge_epochs(benchmark: str, batch: Any, epochs: tuple[float, ...], ruleset: str) -> Judgement:
    """The same from the numbers: epochs of each run, infinite where it did not converge."""
    point, of = reference(benchmark, batch, ruleset)
    if point is None:
        return Judgement("fail" if of.startswith(_TOO_LARGE) else "unknown", of, batch, epochs)
    mean_of, lowest = float(point["RCP Mean"]), float(point["RCP Mean"] / point["Max Speedup"])
    about = {"batch": batch, "epochs": epochs, "reference": mean_of, "lowest": lowest, "of": of}
    lost = sum(math.isinf(e) for e in epochs)
    against = f"the reference's {mean_of:.3f} ({of}), at least {lowest:.3f} is accepted"
    if len(epochs) < ROUNDS and lost <= 1:
        known_ones = [e for e in epochs if math.isfinite(e)]
        mean = sum(known_ones) / len(known_ones) if known_ones else None
        so_far = "no run has converged yet" if mean is None else f"{mean:.3f} epochs on average so far"
        needs, certain = _needs(epochs, mean_of, lowest)
        words = f"{so_far} in {len(epochs)} of {ROUNDS} runs, against {against}; {needs}"
        return Judgement("fail" if certain else "open", words, mean=mean, needs=needs, **about)
    if len(epochs) > ROUNDS:
        return Judgement("fail", f"{len(epochs)} runs, a result has exactly {ROUNDS}", **about)
    if lost > 1:
        return Judgement("fail", f"{lost} runs did not converge, one of {ROUNDS} may", **about)
    mean = _trimmed(epochs)
    factor = max(1.0, mean_of / mean) if mean else 1.0
    about |= {"mean": mean}
    if mean < lowest:
        words = f"FAIL: too fast to be comparable, {mean:.3f} epochs on average against {against}"
        return Judgement("fail", f"{words}. Look for what makes it converge faster than the reference", **about)
    if factor > 1:
        words = f"SCALED: {mean:.3f} epochs on average against {against}, so the score is multiplied by {factor:.4f}"
        return Judgement("scale", words, factor=factor, **about)
    return Judgement("pass", f"PASS: {mean:.3f} epochs on average against {against}", **about)


def reference(benchmark: str, batch: Any, ruleset: str) -> tuple[dict[str, Any] | None, str]:
    """(the point to compare with, which that is); None and why there is none."""
    try:
        checker = _points(benchmark, ruleset)
    except ImportError as error:
        return None, f"convergence can't be checked: {error}; pip install scipy numpy mlperf-logging"
    except (FileNotFoundError, KeyError):
        return None, f"ruleset {ruleset} has no reference points for {benchmark}, so convergence is not compared"
    kept = "pruned_rcps"
    if (point := checker._find_rcp(batch, kept)) is not None:
        return point, f"batch size {batch}"
    below, above = checker._find_top_min_rcp(batch, kept), checker._find_bottom_max_rcp(batch, kept)
    if below and above:
        return (
            checker._create_interp_rcp(batch, below, above)[1],
            f"batch size {batch}, between the points for {below['BS']} and {above['BS']}",
        )
    if above:
        return checker._find_min_rcp(kept), f"the smallest point, batch size {above['BS']}"
    return None, (
        f"{_TOO_LARGE} ({batch}, the point is for {below['BS']}): MLPerf wants new reference points for it, "
        "or --rcp-bypass and the review committee's consent"
    ) if below else "there are no reference points"


@cache
def _points(benchmark: str, ruleset: str) -> Any:
    """The official checker with its reference points, pruned."""
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

    return RCP_Checker("training", ruleset, benchmark, False)


def _trimmed(epochs: tuple[float, ...]) -> float:
    ordered = sorted(epochs)[1:-1]
    return sum(ordered) / len(ordered)


def _needs(epochs: tuple[float, ...], mean: float, lowest: float) -> tuple[str, bool]:
    """(what the runs to come have to take, in epochs; whether they can't save it)."""
    rest = ROUNDS - len(epochs)
    runs = "the last run" if rest == 1 else f"each of the {rest} runs to come"

    def fewest(least: float) -> int | None:
        """Epochs that are enough if each run to come takes them."""
        for count in range(1, MOST_EPOCHS):
            if _trimmed((*epochs, *[float(count)] * rest)) >= least:
                return count
        return None

    accepted, unscaled = fewest(lowest), fewest(mean)
    if accepted is None:
        return f"whatever {runs} takes, the mean stays below what is accepted", True
    if accepted == 1 and unscaled == 1:
        return f"whatever {runs} takes, it is accepted without scaling", False
    words = f"{runs} must take at least {accepted} epochs" if accepted > 1 else f"whatever {runs} takes, it is accepted"
    if unscaled is None:
        return f"{words}; the score will be scaled", False
    return f"{words}; from {unscaled} on, the score is not scaled" if unscaled > accepted else words, False


def public_runs(log: Log, ruleset: str) -> list[dict[str, Any]]:
    """Each evaluation beside those of public runs: epoch, value, words, far. Only of RetinaNet on MLPerf's data set."""
    if facts(log.name("submission_benchmark"), ruleset) is not RETINANET or any(other_data(log, ruleset)):
        return []
    batch, found = number(log.last("global_batch_size")), []
    if batch is None:
        return []
    rate, warmup = (number(log.last(k)) for k in ("opt_base_learning_rate", "opt_learning_rate_warmup_epochs"))
    for epoch, value in log.evaluations:
        scores = metrics(value)
        if number(epoch) is None or "mAP" not in scores:
            continue
        runs = convergence.public(int(batch), rate, warmup, int(epoch))
        if runs:
            far = convergence.far_off(int(batch), rate, warmup, int(epoch), scores["mAP"])
            words = far or convergence.compare_words(scores["mAP"], int(epoch), runs)
            found.append(
                {"epoch": int(epoch), "value": scores["mAP"], **runs._asdict(), "words": words, "far": bool(far)}
            )
    return found


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.submission rcp", description=__doc__, formatter_class=form)
    parser.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="logs, or folders that hold result_*.txt")
    parser.add_argument("--ruleset", default=DEFAULT, help="MLPerf Training ruleset (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args(argv)
    logs = [read_log(path) for path in collect(args.logs)]
    found = judge(logs, known(args.ruleset))
    runs = {str(log.path): public_runs(log, args.ruleset) for log in logs}
    if args.json:
        print_json(found.to_json() | {"public_runs": runs})
    else:
        print(found.sentence)
        for path, rows in runs.items():
            shown = [row for row in rows if row["far"] or row is rows[-1]]
            print("".join(f"{path}: {'WARNING: ' * row['far']}{row['words']}\n" for row in shown), end="")
    far = any(row["far"] for rows in runs.values() for row in rows)
    codes = {"pass": OK, "scale": OK, "open": OK, "fail": REFUSED, "unknown": NOT_CHECKED}
    return codes[found.verdict] or (DOUBTFUL if far else OK)
