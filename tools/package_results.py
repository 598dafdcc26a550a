#!/usr/bin/env python3
"""Packs five logs and the system description of a job into the folder that MLPerf Training wants.

  python tools/package_results.py --org us --system DGXH100_n8 --logdir results --stamp 250101120000_17 --out submission
  python tools/package_results.py --org us --system DGXH100_n8 --system-json s.json --out submission LOG LOG LOG LOG LOG

makes  submission/us/results/DGXH100_n8/retinanet/result_0.txt ... result_4.txt  and
       submission/us/systems/DGXH100_n8.json

and refuses, naming everything at once, logs that the official compliance checker refuses (one run may have missed the
target), repeated seeds, logs of different benchmarks or systems, and a system description with a field still to fill
in. The official system description and package checkers read the result before it appears under its name.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from system_description import FIELDS, PLACEHOLDER, STATUS
from trials import TRIALS, Log, Row, check, find_log, official, read_log, rulesets, score

from detcore import UserError, cli

LARGEST_MIB = 50  # of a file, by mlperf-logging's repository checker
SAME = ("submission_benchmark", "submission_org", "submission_division", "submission_platform", "global_batch_size")
TABLE_FIELDS = ("host_processor_core_count", "accelerators_per_node")  # what the checker joins into a line of text


def find_logs(paths: list[Path], logdir: Path | None, stamp: str | None) -> list[Log]:
    """The five logs, given one by one or as a job. Raises UserError if there are more or fewer."""
    if bool(paths) == bool(logdir and stamp):
        raise UserError("name either five logs, or a job by --logdir and --stamp")
    if paths:
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"no such log: {', '.join(missing)}")
        logs = [read_log(path) for path in paths]
        where = "on the command line"
    else:
        names = (re.fullmatch(re.escape(stamp) + r"_([1-9]\d*)", path.name) for path in logdir.glob(f"{stamp}_*"))
        numbers = sorted(int(match[1]) for match in names if match)
        logs = [log for k in numbers if (log := find_log(logdir, stamp, k))]
        where = f"of {logdir}/{stamp}_<k>"
    if len(logs) != TRIALS:
        raise UserError(
            f"{len(logs)} logs {where}: a result consists of exactly {TRIALS} runs; run NEXP={TRIALS} trials, or name "
            f"{TRIALS} logs, all of one set of runs and none left out because it was slow"
        )
    return logs


def check_logs(logs: list[Log], ruleset: str) -> tuple[list[str], list[Row]]:
    """(what speaks against these logs as one result, a row for each as `trials.score` takes them)."""
    problems, rows = [], []
    seeds: dict[Any, Path] = {}
    for i, log in enumerate(logs):
        verdict = check(log.path, ruleset)
        converged = log.status == "success"
        # In the closed division the checker itself asks for the target.
        missed_only = all(line.startswith("Failed checks for eval_accuracy") for line in verdict.complaints)
        if not verdict.ok and (converged or not verdict.complaints or not missed_only):
            problems.append(verdict.line)
        if log.path.stat().st_size > LARGEST_MIB * 2**20:
            problems.append(
                f"{log.path} is larger than {LARGEST_MIB} MiB, which no submission may hold: keep the events"
            )
        if not log.values("seed"):
            problems.append(f"{log.path} logs no seed")
        for seed in set(map(str, log.values("seed"))):
            if seed in seeds:
                problems.append(
                    f"{log.path} has seed {seed}, as has {seeds[seed]}: each run needs its own (unset SEED)"
                )
            seeds.setdefault(seed, log.path)
        rows.append(
            Row(i + 1, minutes=log.minutes, compliance="SUCCESS", counts=converged, ran=True, log=str(log.path))
        )
    missed = [row.log for row in rows if not row.counts]
    if len(missed) > 1:
        problems.append(
            f"more than one run did not reach the target, which makes the result invalid: {', '.join(missed)}"
        )
    for key in SAME:
        found = {str(log.path): log.values(key)[-1] if log.values(key) else None for log in logs}
        if len(set(map(str, found.values()))) > 1:
            told = ", ".join(f"{value!r} in {path}" for path, value in found.items())
            problems.append(f"the logs differ in {key}: {told}")
    return problems, rows


def check_system(path: Path, org: str, log: Log, ruleset: str) -> list[str]:
    """What is wrong with a system description. Raises UserError if there is none in the file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--system-json {path}: {error.strerror}; run.sub leaves one, <stamp>_system.json") from error
    except ValueError as error:
        raise UserError(f"--system-json {path}: no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise UserError(f"--system-json {path}: no JSON object")
    problems = [f"{path}: {name} is missing: {wanted}" for name, wanted in FIELDS.items() if name not in fields]
    for name, value in fields.items():
        for text in _texts(value):
            if text.startswith(PLACEHOLDER.strip()):
                problems.append(f"{path}: {name} is still to fill in: {text.removeprefix(PLACEHOLDER.strip()).strip()}")
        if name in TABLE_FIELDS and not isinstance(value, str):
            problems.append(f'{path}: {name} is {value!r}; the official checker wants text: "{value}"')
    if not problems:
        words = (str(path.resolve()), "training", ruleset)
        _, said = official("system_desc_checker", *words)
        if "checker passed" not in said:
            problems.append(f"{path}: the official system description checker refuses it: {_errors(said)}")
    division = (log.values("submission_division") or [None])[-1]
    status = STATUS.get((log.values("submission_status") or [None])[-1])
    for name, wanted, origin in (
        ("submitter", org, "--org"), ("division", division, "the logs"), ("status", status, "the logs"),
    ):  # fmt: skip
        value = fields.get(name, wanted)
        if wanted is not None and value != wanted and not str(value).startswith(PLACEHOLDER.strip()):
            problems.append(f"{path}: {name} is {value!r}, but {wanted!r} by {origin}")
    return problems


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value, however deep."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _errors(said: str) -> str:
    """The errors among a checker's words in one line, or its last line: it ends with that if it breaks."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR - ").strip() for line in lines if line.startswith("ERROR - ")]
    return "; ".join(errors) or (lines[-1] if lines else "it said nothing")


def check_package(folder: Path, ruleset: str, rcp_bypass: bool) -> str | None:
    """The official package checker on <org>: what it complains about, None if nothing.

    It compares convergence with the reference points too, in the closed division, and may leave a scaling.json in the
    result's folder. Its exit code says nothing. Where it breaks down itself, that is only told.
    """
    flags = ["--rcp-bypass"] * rcp_bypass
    _, said = official("package_checker", *flags, str(folder.resolve()), "training", ruleset)
    if "PACKAGE CHECKER FOUND NO ERRORS" in said:
        return None
    if "PACKAGE CHECKER FOUND ERRORS" in said:
        return _errors(said)
    print(
        f"warning: the official package checker broke down ({_errors(said)}); its checks were left out", file=sys.stderr
    )
    return None


def publish(staged: Path, org: Path, system: str, benchmark: str, force: bool) -> None:
    """Moves a checked package into the place of its organisation: first the result, then the system description."""
    results, description = Path("results", system, benchmark), Path("systems", f"{system}.json")
    target, old = org / results, staged / "replaced"
    if not force:
        existing = [path for path in (target, org / description) if path.exists()]
        same = (org / description).is_file() and (org / description).read_bytes() == (staged / description).read_bytes()
        if existing and not (same and existing == [org / description]):
            raise UserError(f"{', '.join(map(str, existing))} exists already; --force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    (org / "systems").mkdir(exist_ok=True)
    if target.exists():
        target.rename(old)
    try:
        (staged / results).rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    os.replace(staged / description, org / description)


def package(args: argparse.Namespace) -> int:
    """Everything that `main` promises, for parsed arguments."""
    for flag, name in (("--org", args.org), ("--system", args.system), ("--benchmark", args.benchmark)):
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
            raise UserError(f"{flag} {name!r} becomes a folder's name: use letters, digits, '_', '-', '+' and '.' only")
    if args.ruleset not in rulesets():
        raise UserError(f"--ruleset {args.ruleset!r} is unknown; choose one of {', '.join(rulesets())}")
    logs = find_logs(args.logs, args.logdir, args.stamp)
    description = args.system_json or (args.logdir and args.logdir / f"{args.stamp}_system.json")
    if description is None:
        raise UserError("--system-json is missing: the system description that run.sub left beside the logs")
    problems, rows = check_logs(logs, args.ruleset)
    problems += check_system(description, args.org, logs[0], args.ruleset)
    named = (logs[0].values("submission_benchmark") or ["unknown"])[-1]
    for key, flag, value in (
        ("submission_benchmark", "--benchmark", args.benchmark), ("submission_org", "--org", args.org),
    ):  # fmt: skip
        logged = (logs[0].values(key) or [None])[-1]
        if value is not None and logged != value:
            problems.append(f"{flag} is {value!r}, but the logs say {key} {logged!r}")
    if problems:
        print("\n".join(f"problem: {problem}" for problem in problems), file=sys.stderr)
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)}, listed above; nothing was written")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package-", dir=args.out) as aside:
        staged = Path(aside) / args.org
        folder = staged / "results" / args.system / named
        folder.mkdir(parents=True)
        (staged / "systems").mkdir()
        for i, log in enumerate(logs):
            shutil.copyfile(log.path, folder / f"result_{i}.txt")
        shutil.copyfile(description, staged / "systems" / f"{args.system}.json")
        complaint = check_package(staged, args.ruleset, args.rcp_bypass)
        if complaint:
            raise UserError(f"the official package checker refuses the package, nothing was written: {complaint}")
        publish(staged, args.out / args.org, args.system, named, args.force)
    place = args.out / args.org
    scaling = place / "results" / args.system / named / "scaling.json"
    print(f"{place}/results/{args.system}/{named}: {TRIALS} logs, accepted by ruleset {args.ruleset}")
    print(f"{score(rows)[1]}{', to be multiplied by ' + scaling.read_text().strip() if scaling.exists() else ''}")
    print(f"The code belongs into {place}/benchmarks/{named}/implementations/<name>/")
    return cli.OK


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="package_results.py", description=__doc__, formatter_class=form)
    parser.add_argument("logs", type=Path, nargs="*", metavar="LOG", help="exactly five logs, unless --stamp is given")
    parser.add_argument("--logdir", type=Path, help="LOGDIR of a job")
    parser.add_argument("--stamp", help="DATESTAMP of a job: its trials are <stamp>_1 to <stamp>_5")
    parser.add_argument("--org", required=True, help="the submitter, as MLPERF_SUBMISSION_ORG was")
    parser.add_argument("--system", required=True, help="name of the system's folder and description")
    parser.add_argument("--benchmark", help="must be the logs' submission_benchmark (default: as they say)")
    parser.add_argument("--system-json", type=Path, metavar="FILE", help="default: LOGDIR/<stamp>_system.json")
    parser.add_argument("--ruleset", default="5.1.0", help="MLPerf Training ruleset (default: 5.1.0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the folder <org> is made")
    parser.add_argument("--rcp-bypass", action="store_true", help="accept a batch size without reference points")
    parser.add_argument("--force", action="store_true", help="replace an earlier package of the same name")
    return package(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
