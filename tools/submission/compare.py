"""Results side by side: several systems, submitters or rounds, as a table, a page with plots and a CSV file.

  python -m tools.submission compare A B ... [--out FILE.html] [--csv FILE.csv] [--ruleset 5.1.0] [--json]

Each of A, B, ... is a folder with the logs of one result, a single log, or a whole submission tree, of which every
result of a detection benchmark is taken. A folder named like training_results_v5.0 gives its round's ruleset.
"""

import argparse
import csv
import io
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detcore import UserError

from .lint import check
from .logs import Log, collect, metrics, number, read_log
from .output import add_json, print_json, read_json, table
from .rcp import epochs_of
from .report_run import read_log_alone
from .rulesets import DEFAULT, facts, known, rulesets
from .score import score
from .svg import CSS, Markup, Series, bars, chart, el
from .tree import Result, organisations, results

DETECTION = ("ssd", "retinanet", "maskrcnn")
COLUMNS = {  # of the table and the CSV file
    "name": "result", "benchmark": "benchmark", "ruleset": "ruleset", "division": "division", "runs": "runs",
    "minutes": "minutes, olympic mean", "score": "score, scaled", "epochs": "epochs to the target",
    "images_per_s": "images/s", "accelerators": "accelerators", "rate_each": "images/s each", "batch": "batch",
    "learning_rate": "learning rate", "warmup": "warm-up epochs", "best": "best metric", "note": "note",
}  # fmt: skip


@dataclass
class Entry:
    """One result. minutes, score and epochs are None where there are none; best: mean over the runs of their best."""

    name: str
    benchmark: str
    ruleset: str
    division: str
    runs: int
    minutes: float | None
    score: float | None
    epochs: float | None
    images_per_s: float | None
    accelerators: int | None
    batch: Any
    learning_rate: Any
    warmup: Any
    best: float | None
    note: str
    curve: dict[int, float] = field(default_factory=dict)  # epoch: mean over the runs that were evaluated then

    @property
    def rate_each(self) -> float | None:
        return self.images_per_s / self.accelerators if self.images_per_s and self.accelerators else None


def read(path: Path, ruleset: str | None) -> list[Entry]:
    """The results that a path names. Raises UserError where there is none."""
    rules = ruleset or _round(path) or DEFAULT
    if path.is_dir() and ((path / "results").is_dir() or any((p / "results").is_dir() for p in path.iterdir())):
        found = [one for org in organisations(path) for one in results(org) if one.benchmark in DETECTION]
        if not found:
            raise UserError(f"{path}: holds no result of {', '.join(DETECTION)}")
        return [entry(_name(path, one), one.logs, rules, one.description) for one in found if one.logs]
    place = path.resolve()
    result = Result(place.parents[2], place.parent.name, place.name) if len(place.parents) > 2 else None
    known_place = result and result.folder == place and result.description.is_file()
    name = f"{result.name} {_round(path)}".strip() if known_place else place.name
    return [entry(name, collect([path]), rules, result.description if known_place else None)]


def _name(tree: Path, result: Result) -> str:
    return f"{result.name} {_round(tree)}".strip()


def _round(path: Path) -> str:
    """The ruleset that a folder's name tells, of the path or above it; empty if none does."""
    for part in reversed(path.resolve().parts):
        match = re.fullmatch(r"(?:training_results_)v(\d+\.\d+)", part)
        if match and f"{match[1]}.0" in rulesets():
            return f"{match[1]}.0"
    return ""


def entry(name: str, paths: list[Path], ruleset: str, description: Path | None) -> Entry:
    """One result from its logs, and the number of accelerators from its system description."""
    logs = [read_log(path) for path in paths]
    begun = [log for log in logs if log.events]
    if not begun:
        raise UserError(f"{paths[0]}: no MLPerf event in {'it' if len(paths) == 1 else 'any of the logs'}")
    first = begun[0]
    found = score(logs, [check(path, ruleset) for path in paths], ruleset)
    counted = [log for log in begun if log.status == "success" and log.minutes is not None]
    minutes, note = found.unscaled, "" if found.minutes is not None else found.sentence
    if minutes is None and len(logs) < 5 and counted:
        minutes, note = statistics.fmean(log.minutes for log in counted), f"plain mean of {len(counted)} runs"
    rates = [run.rate for log in counted or begun if (run := read_log_alone(log.path, ruleset)).rate]
    curve = _curve(begun)
    bests = [max(values) for log in counted or begun if (values := [v for _, v in _points(log)])]
    return Entry(
        name, first.name("submission_benchmark"), ruleset, first.name("submission_division"), len(logs), minutes,
        found.minutes, _epochs(counted), statistics.fmean(rates) if rates else None, _accelerators(description),
        first.last("global_batch_size"), first.last("opt_base_learning_rate"),
        first.last("opt_learning_rate_warmup_epochs"), statistics.fmean(bests) if bests else None, note, curve,
    )  # fmt: skip


def _points(log: Log) -> list[tuple[int, float]]:
    """(epoch, first metric) of each evaluation that has both."""
    found = [(number(epoch), list(metrics(value).values())) for epoch, value in log.evaluations]
    return [(int(epoch), values[0]) for epoch, values in found if epoch is not None and epoch > 0 and values]


def _curve(logs: list[Log]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for log in logs:
        for epoch, value in _points(log):
            values.setdefault(epoch, []).append(value)
    return {epoch: statistics.fmean(values[epoch]) for epoch in sorted(values)}


def _epochs(logs: list[Log]) -> float | None:
    found = [epochs_of(log) for log in logs if log.last_evaluation and number(log.last_evaluation[0]) is not None]
    return statistics.fmean(found) if found else None


def _accelerators(description: Path | None) -> int | None:
    fields = read_json(description, "a system description") if description else {}
    counts = [str(fields.get(name, "")).strip() for name in ("number_of_nodes", "accelerators_per_node")]
    if not all(re.fullmatch(r"[0-9]{1,9}", text) for text in counts):
        return None
    return int(counts[0]) * int(counts[1]) or None


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rows(entries: list[Entry]) -> list[list[str]]:
    return [[cell(getattr(one, name)) for name in COLUMNS] for one in entries]


def csv_text(entries: list[Entry]) -> str:
    """For spreadsheets: numbers in full, nothing where a value is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS.values())
    for one in entries:
        values = (getattr(one, name) for name in COLUMNS)
        writer.writerow(["" if v is None else _harmless(v) if isinstance(v, str) else v for v in values])
    return out.getvalue()


def _harmless(text: str) -> str:
    """Text that no spreadsheet takes for a formula, wherever the log comes from."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def page(entries: list[Entry]) -> str:
    """The whole HTML document: a table, bars of times and rates, and the curves."""
    head = el("tr", *(el("th", words) for words in COLUMNS.values()))
    body = [el("tr", *(el("th" if i == 0 else "td", words) for i, words in enumerate(line))) for line in rows(entries)]
    targets = {
        found.targets["mAP"]
        for one in entries
        if (found := facts(one.benchmark, one.ruleset)) and "mAP" in found.targets
    }
    timed = [(one.name, one.score if one.score is not None else one.minutes) for one in entries]
    rated = [(one.name, one.images_per_s) for one in entries]
    taken = [(one.name, one.epochs) for one in entries]
    charts = [
        bars("Time to train", "minutes", timed), bars("Epochs to the target", "epochs", taken),
        bars("Images per second", "all accelerators", rated), curves(entries, min(targets) if targets else None),
    ]  # fmt: skip
    title = f"{len(entries)} results of MLPerf Training side by side"
    view = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')
    parts = [
        el("header", el("p", "Time to train: the olympic mean, scaled where convergence wants it."), el("h1", title)),
        el("div", *charts, class_="charts"),
        el("section", el("h2", "All of it"), el("div", el("table", head, *body), class_="wide")),
        el("footer", "Made from logs. An MLPerf result is only what MLCommons has reviewed and published."),
    ]  # fmt: skip
    document = el(
        "html",
        el("head", view, el("title", title), el("style", Markup(CSS))),
        el("body", el("main", *parts)),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


def curves(entries: list[Entry], target: float | None) -> Markup:
    """The means of the runs' metric after each epoch, of the first results that have any."""
    drawn = [one for one in entries if one.curve][:6]
    epochs = sorted({epoch for one in drawn for epoch in one.curve})
    if not epochs:
        return el("figure", el("h2", "Metric"), el("p", "No evaluation was recorded.", class_="none"))
    series = [Series(one.name, f"c{i}", [one.curve.get(e) for e in epochs]) for i, one in enumerate(drawn)]
    hovers = [
        f"after epoch {e}\n" + "\n".join(f"{one.name} {one.curve[e]:.4f}" for one in drawn if e in one.curve)
        for e in epochs
    ]
    return chart("Metric on the validation images", "AP, 0 to 1", "completed epochs", epochs, series, hovers, target)


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission compare", description=__doc__, formatter_class=form
    )
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="results: folders of logs, logs, trees")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table for spreadsheets")
    parser.add_argument("--ruleset", help=f"for all of them (default: by a folder's name, else {DEFAULT})")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.ruleset:
        known(args.ruleset)
    entries = []
    for path in args.paths:
        if not path.exists():
            raise UserError(
                f"{path}: no such file or folder; name a log, a folder with result_*.txt or a submission tree"
            )
        entries += read(path, args.ruleset)
    for path, text in ((args.out, page), (args.csv, csv_text)):
        if path:
            try:
                path.write_text(text(entries), encoding="utf-8", errors="replace")
            except OSError as error:
                raise UserError(f"{path} can't be written: {error.strerror}; choose another place") from error
    if args.json:
        print_json([asdict(one) | {"rate_each": one.rate_each} for one in entries])
    else:
        print("\n".join(table(list(COLUMNS.values()), [[words[:80] for words in line] for line in rows(entries)])))
    return 0
