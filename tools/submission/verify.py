"""Every official checker on a submission tree, also on other people's, with a table and an exit status that is true.

  python -m tools.submission verify TREE [--ruleset 5.1.0] [--benchmarks retinanet,ssd,maskrcnn] [--json] [--details]

TREE is an organisation's folder or the folder around several. Nothing in it is changed. For each result: the package
checker (counts, logs, seeds, convergence), the system description checker, the RCP checker and the result summarizer;
for each organisation the repository checker. Beside them stands what `lint` finds. A check that did not run to its
end is no acceptance: exit code 7.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from detcore import UserError

from . import DOUBTFUL, NOT_CHECKED, OK, REFUSED, official
from .lint import Finding, Verdict, is_placeholder, lint, told
from .logs import read_log
from .official import Said
from .output import add_json, print_json, table
from .rulesets import DEFAULT, ROUNDS, facts, known, rulesets
from .score import Score, score
from .system import check_description
from .tree import Result, alone, flags, organisations, results

CHECKS = ("package", "system", "rcp", "summary")
TOLERANCE = 1e-6  # minutes, relative, between the summarizer's score and ours


@dataclass
class Checked:
    """What all checks say of one result. official: by the names of CHECKS, those that were called."""

    result: Result
    official: dict[str, Said] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    score: Score | None = None

    @property
    def ran(self) -> bool:
        return all(said.ran for said in self.official.values())

    @property
    def errors(self) -> list[Finding]:
        return [one for one in self.findings if one.level == "error"]

    @property
    def code(self) -> int:
        if not self.ran:
            return NOT_CHECKED
        if self.errors or not all(said.ok for said in self.official.values()):
            return REFUSED
        return DOUBTFUL if any(one.level == "doubt" for one in self.findings) else OK

    def state(self, check: str) -> str:
        said = self.official.get(check)
        return "-" if said is None else "ok" if said.ok else "REFUSED" if said.ran else "NOT RUN"


def check_result(result: Result, ruleset: str, bypass: set[str] | None = None) -> Checked:
    """All checks on one result; bypass: flags beside those of the tree's package_checker_params."""
    checked = Checked(result)
    found, asked = checked.findings, flags(result) | (bypass or set())
    found += [Finding("note", f"{name} is set: the review committee must agree") for name in sorted(asked)]
    verdicts = []
    if not result.logs:
        found.append(Finding("error", f"{result.folder} holds no result_*.txt", official=True))
    elif result.benchmark not in {name.partition("_")[2] for name in rulesets()[ruleset]}:
        found.append(Finding("error", _no_benchmark(result, ruleset)))
    if not result.description.is_file():
        found.append(
            Finding("error", f"{result.description} is missing: each system needs its description", official=True)
        )
    if found and any(one.level == "error" for one in found):
        return checked
    try:
        problems, checked.official["system"] = check_description(result.description, ruleset)
        found += [Finding("error", words, official=True) for words in problems]
        verdicts, more = lint(result.logs, ruleset, result.description)
    except UserError as error:
        found.append(Finding("error", str(error)))
        return checked
    found += _olympic(verdicts, more)
    found += _folder(result)
    logs = [read_log(path) for path in result.logs]
    closed = any(log.name("submission_division") == "closed" for log in logs)
    named = [v for log in logs for key in ("submission_division", "submission_benchmark") for v in log.values(key)]
    with alone(result) as copy:
        _official(checked, copy, ruleset, asked, official.harmful(named), closed)
    for path, verdict in zip(result.logs, verdicts):
        if not verdict.ran:
            checked.official[f"compliance of {path.name}"] = Said(False, False, verdict.line)
    checked.score = score(logs, verdicts, ruleset)
    _compare_scores(checked)
    return checked


def _official(checked: Checked, copy: Result, ruleset: str, asked: set[str], harm: str, closed: bool) -> None:
    """The checkers that read the whole result, on a copy of it."""
    if harm:
        checked.official |= {name: Said(False, False, harm) for name in ("package", "summary")}
        return
    rcp_bypass, seed_bypass = "rcp-bypass" in asked, "seed-checker-bypass" in asked
    checked.official["package"] = official.package(copy.org, ruleset, rcp_bypass, seed_bypass)
    if closed:
        checked.official["rcp"] = official.convergence(copy.folder, ruleset, rcp_bypass)
    checked.official["summary"] = official.summary(copy.org, copy.benchmark, ruleset)


def _no_benchmark(result: Result, ruleset: str) -> str:
    have = ", ".join(name for name, files in rulesets().items() if f"closed_{result.benchmark}" in files)
    return (
        f"ruleset {ruleset} has no benchmark {result.benchmark}; {f'these have: {have}' if have else 'nor has another'}"
    )


def _olympic(verdicts: list[Verdict], findings: list[Finding]) -> list[Finding]:
    """The findings, with those on the single refused log that olympic scoring allows made doubts of."""
    refused = [verdict for verdict in verdicts if not verdict.ok]
    if len(refused) != 1 or not refused[0].ran or len(verdicts) != ROUNDS:
        return findings
    words = set(refused[0].complaints)
    kept = [one for one in findings if not (one.level == "error" and one.official and one.words in words)]
    told_once = Finding(
        "note",
        f"refused, and so taken as the slowest run, as olympic scoring allows for one: {refused[0].line}",
        "",
        True,
    )
    return [*kept, told_once]


def _folder(result: Result) -> list[Finding]:
    """Names that do not go together."""
    found = []
    for path in result.logs:
        log = read_log(path)
        if (name := log.name("submission_benchmark")) and name != result.benchmark:
            found.append(
                Finding("error", f"its benchmark is {name!r}, the folder's name {result.benchmark!r}", str(path))
            )
        org = log.name("submission_org")
        if org and not is_placeholder(org) and _letters(org) != _letters(result.org.name):
            found.append(
                Finding("note", f"its submission_org is {org!r}, the folder's name {result.org.name!r}", str(path))
            )
    return found


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _compare_scores(checked: Checked) -> None:
    """The summarizer's score and ours differ only where it counts a run that the rules do not."""
    said = checked.official.get("summary")
    ours = checked.score.minutes if checked.score else None
    if said is None or not said.ran or facts(checked.result.benchmark, DEFAULT) is None:
        return
    theirs = said.value
    if theirs is not None and ours is not None and abs(theirs - ours) > TOLERANCE * abs(ours):
        words = f"the summarizer's score is {theirs:.3f} minutes, ours {ours:.3f}: it counts an aborted run, or one"
        checked.findings.append(Finding("note", f"{words} of a clock that went back, by its time"))


def verify(
    tree: Path, ruleset: str, only: set[str] | None, bypass: set[str] | None = None
) -> tuple[list[Checked], dict[Path, Said]]:
    """All results of a tree (only: of these benchmarks), and the repository checker's word on each organisation."""
    checked, repository = [], {}
    for org in organisations(tree):
        repository[org] = official.repository(org)
        chosen = [result for result in results(org) if only is None or result.benchmark in only]
        checked += [check_result(result, ruleset, bypass) for result in chosen]
    return checked, repository


def worst(codes: list[int]) -> int:
    """Of several exit codes the one to end with: what was not checked comes before what was refused."""
    return next((code for code in (NOT_CHECKED, REFUSED, DOUBTFUL) if code in codes), OK)


def exit_code(checked: list[Checked], repository: dict[Path, Said]) -> int:
    codes = [OK if said.ok else REFUSED if said.ran else NOT_CHECKED for said in repository.values()]
    return worst([*codes, *(one.code for one in checked)]) if checked else REFUSED


def words(checked: list[Checked], repository: dict[Path, Said], details: bool) -> list[str]:
    """The table and everything behind it."""
    head = ["result", *CHECKS, "lint", "minutes", "score"]
    cells, lines = [], []
    for one in checked:
        minutes = one.score.minutes if one.score else None
        doubts = sum(f.level == "doubt" for f in one.findings)
        state = f"{len(one.errors)} errors" if one.errors else f"{doubts} doubts" if doubts else "ok"
        verdict = {OK: "accepted", DOUBTFUL: "accepted, with doubts", REFUSED: "REFUSED", NOT_CHECKED: "NOT CHECKED"}[
            one.code
        ]
        number = "-" if minutes is None else f"{minutes:.3f}"
        cells.append([one.result.name, *map(one.state, CHECKS), state, number, verdict])
        lines += [f"{one.result.name}: {line}" for line in told(one.findings)]
        for name, said in one.official.items():
            if not said.ok:
                lines.append(f"{one.result.name}: {name}: {'refused' if said.ran else 'NOT RUN'}: {said.errors}")
            lines += [said.words] * details
        lines += [f"{one.result.name}: {one.score.sentence}"] * bool(one.score)
    for org, said in repository.items():
        state = "ok" if said.ok else f"refused: {said.errors}" if said.ran else f"NOT RUN: {said.errors}"
        lines.append(f"{org.name}: names, sizes and links of its files: {state}")
    return [*(table(head, cells) if cells else ["no result to check"]), "", *lines]


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission verify", description=__doc__, formatter_class=form
    )
    parser.add_argument("tree", type=Path, help="the folder of an organisation, or the one around several")
    parser.add_argument("--ruleset", default=DEFAULT, help="MLPerf Training ruleset (default: %(default)s)")
    parser.add_argument("--benchmarks", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--rcp-bypass", action="store_true", help="as if package_checker_params said so")
    parser.add_argument("--seed-checker-bypass", action="store_true", help="the same for the seed checker")
    parser.add_argument("--details", action="store_true", help="print all that the official checkers said, too")
    add_json(parser)
    args = parser.parse_args(argv)
    only = set(args.benchmarks.split(",")) if args.benchmarks else None
    bypass = {name for name in ("rcp-bypass", "seed-checker-bypass") if getattr(args, name.replace("-", "_"))}
    checked, repository = verify(args.tree, known(args.ruleset), only, bypass)
    code = exit_code(checked, repository)
    if args.json:
        print_json({"code": code, "results": [to_json(one) for one in checked],
                    "repository": {str(org): said._asdict() for org, said in repository.items()}})  # fmt: skip
    else:
        print("\n".join(words(checked, repository, args.details)))
    return code


def to_json(one: Checked) -> dict[str, Any]:
    official = {
        name: {"ran": s.ran, "ok": s.ok, "errors": "" if s.ok else s.errors} for name, s in one.official.items()
    }
    minutes = one.score.minutes if one.score else None
    return {
        "result": one.result.name, "code": one.code, "official": official, "score_minutes": minutes,
        "findings": [asdict(finding) for finding in one.findings],
    }  # fmt: skip
