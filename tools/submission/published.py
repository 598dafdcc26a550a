"""Published results of MLPerf Training, each packaged and verified: where does this package differ from MLCommons?

  python -m tools.submission published FOLDER [--ruleset 5.1.0] [--benchmarks ssd,retinanet,maskrcnn] [--json]

FOLDER is a clone of a results repository (<org>/systems, <org>/results/<system>/<benchmark>/result_*.txt), or a
folder of several named like training_results_v5.0; the ruleset follows from such a name. For every result: the
official package checker on the result as it was published, `package` (without code) into a temporary folder, and
`verify` on what came of it. A disagreement is printed where the official checker accepts what is not packaged or the
reverse, where one of them did not run, or where the official summarizer's score is not ours. Exit code 0: none.
"""

import argparse
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from detcore import UserError

from . import DOUBTFUL, NOT_CHECKED, OK, REFUSED, official
from . import package as packaging
from .output import add_json, print_json, table
from .rulesets import DEFAULT, known, rulesets
from .tree import Result, alone, flags, organisations, results
from .verify import TOLERANCE, check_result

DETECTION = "ssd,retinanet,maskrcnn"


class Compared(NamedTuple):
    """One published result. official, ours: accepted, refused or not run. disagreement: empty if there is none."""

    name: str
    ruleset: str
    official: str
    ours: str
    minutes: float | None
    theirs: float | None
    disagreement: str
    words: str


def rounds(folder: Path, ruleset: str | None) -> list[tuple[Path, str]]:
    """(tree, ruleset) of each round below a folder. Raises UserError where a ruleset can't be told."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a clone of MLCommons' results, or a folder of several")
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and _ruleset(path) and _is_tree(path)]
    if inner and not _is_tree(folder):
        return [(path, ruleset or _ruleset(path)) for path in inner]
    return [(folder, known(ruleset or _ruleset(folder) or DEFAULT))]


def _is_tree(path: Path) -> bool:
    return (path / "results").is_dir() or any(
        (inner / "results").is_dir() for inner in path.iterdir() if inner.is_dir()
    )


def _ruleset(path: Path) -> str:
    """5.0.0 of training_results_v5.0, empty for other names."""
    match = re.search(r"v?(\d+\.\d+)(?!.*\d)", path.resolve().name)
    return f"{match[1]}.0" if match and f"{match[1]}.0" in rulesets() else ""


def compare(result: Result, ruleset: str) -> Compared:
    """One result through the official checker, `package` and `verify`."""
    asked = flags(result)
    with alone(result) as copy:
        said = official.package(copy.org, ruleset, "rcp-bypass" in asked, "seed-checker-bypass" in asked)
        summary = official.summary(copy.org, copy.benchmark, ruleset)
    theirs = summary.value if summary.ran else None
    verdict = "accepted" if said.ok else "refused" if said.ran else "not run"
    with TemporaryDirectory(prefix="published-") as out:
        code, words = _package(result, ruleset, asked, Path(out))
        packed = Result(Path(out) / result.org.name, result.system, result.benchmark)
        checked = check_result(packed, ruleset) if code == OK else None
    ours = {OK: "accepted", REFUSED: "refused", NOT_CHECKED: "not run"}.get(code, "refused")
    if checked and checked.code not in (OK, DOUBTFUL):
        ours, words = "packaged, not verified", "; ".join(one.words for one in checked.errors)
    minutes = checked.score.minutes if checked and checked.score else None
    difference = "" if ours == verdict else f"the official package checker: {verdict}, ours: {ours}"
    if verdict == "not run" and not difference:
        difference = "the official package checker did not run"
    if not difference and ours == "accepted" and not _equal(minutes, theirs):
        difference = f"the official summarizer's score is {theirs}, ours {minutes}"
    return Compared(result.name, ruleset, verdict, ours, minutes, theirs, difference, words.strip())


def _equal(ours: float | None, theirs: float | None) -> bool:
    return ours == theirs if None in (ours, theirs) else abs(ours - theirs) <= TOLERANCE * abs(theirs)


def _package(result: Result, ruleset: str, asked: set[str], out: Path) -> tuple[int, str]:
    """(exit code of `package` without code, what it said). Doubts are accepted: MLCommons has reviewed these."""
    argv = ["--org", result.org.name, "--folder", result.org.name, "--system", result.system, "--no-code",
            "--system-json", str(result.description), "--ruleset", ruleset, "--out", str(out), "--accept-doubts",
            *(f"--{flag}" for flag in sorted(asked)), *map(str, result.logs)]  # fmt: skip
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            code = packaging.main(argv)
    except UserError as error:
        return REFUSED, f"{said.getvalue()}{error}"
    return code, said.getvalue()


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission published", description=__doc__, formatter_class=form
    )
    parser.add_argument("folder", type=Path, help="published results")
    parser.add_argument("--ruleset", help="default: by the folder's name")
    parser.add_argument("--benchmarks", default=DETECTION, metavar="A,B", help="which (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args(argv)
    only = set(args.benchmarks.split(","))
    found = [
        compare(result, ruleset)
        for tree, ruleset in rounds(args.folder, args.ruleset)
        for org in organisations(tree)
        for result in results(org)
        if result.benchmark in only
    ]
    if not found:
        raise UserError(f"{args.folder}: holds no result of {args.benchmarks}; --benchmarks chooses others")
    differ = [one for one in found if one.disagreement]
    if args.json:
        print_json({"results": [one._asdict() for one in found], "disagreements": len(differ)})
    else:
        minutes = ["-" if one.minutes is None else f"{one.minutes:.3f}" for one in found]
        cells = [[one.name, one.ruleset, one.official, one.ours, m] for one, m in zip(found, minutes)]
        print("\n".join(table(["result", "ruleset", "official", "ours", "minutes"], cells)))
        for one in differ:
            print(f"\n{one.name}: {one.disagreement}\n{one.words}")
        print(f"\n{len(found)} results, {sum(one.ours == 'accepted' for one in found)} packaged and verified, "
              f"{len(differ)} disagreements")  # fmt: skip
    if any(one.official == "not run" for one in differ):
        return NOT_CHECKED
    return REFUSED if differ else OK
