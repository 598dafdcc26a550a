"""Packs logs of one result, system description, code and READMEs into the tree that MLPerf Training wants.

  python -m tools.submission package --org us --system DGXH100 --logdir results --stamp 250101120000_17 --out submission
  python -m tools.submission package --org us --system DGXH100 --system-json s.json --out submission LOG LOG LOG LOG LOG

makes, below submission/us:

  results/DGXH100/retinanet/result_0.txt ... result_4.txt, scaling.json where the score is scaled
  systems/DGXH100.json
  benchmarks/retinanet/implementations/<implementation>/README.md and code/
  benchmarks/retinanet/DGXH100/README.md, setup.sh, init_datasets.sh, run_and_time.sh, DGXH100_<implementation>.json

Further calls with the same --out add systems and benchmarks. Everything is prepared aside and read by all official
checkers (see verify) before it appears under its name; what breaks a rule is named all at once, and then nothing is
written. Questions that a reviewer will ask are named, too, and want --accept-doubts.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from detcore import UserError, cli

from . import DOUBTFUL, NOT_CHECKED, OK, REFUSED, official
from .code import changed, commit_of, export, logged_commit
from .lint import told
from .logs import Log, collect, find_log, read_log
from .readme import write_implementation, write_system
from .rulesets import DEFAULT, ROOT, ROUNDS, facts, known
from .system import read_description
from .tree import FLAGS, PARAMS, Result
from .verify import Checked, check_result, worst

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def folder_name(org: str) -> str:
    """The folder of an organisation: its name with what folders must not have as underscores.

    Raises UserError where nothing is left.
    """
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", org.strip()).strip("_.")
    if not NAME.fullmatch(name):
        raise UserError(f"--org {org!r} leaves no name for its folder; give one with --folder")
    return name


def find_logs(paths: list[Path], logdir: Path | None, stamp: str | None) -> list[Log]:
    """The five logs, given one by one, as their folder or as a job. Raises UserError if there are more or fewer."""
    if bool(paths) == bool(logdir and stamp):
        raise UserError("name either five logs, or a job by --logdir and --stamp")
    if paths:
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise UserError(f"no such log: {', '.join(missing)}")
        logs = [read_log(path) for path in collect(paths)]
        where = "on the command line"
    else:
        names = (re.fullmatch(re.escape(stamp) + r"_([1-9]\d*)", path.name) for path in logdir.glob(f"{stamp}_*"))
        numbers = sorted(int(match[1]) for match in names if match)
        logs = [log for k in numbers if (log := find_log(logdir, stamp, k))]
        where = f"of {logdir}/{stamp}_<k>"
    if len(logs) != ROUNDS:
        raise UserError(
            f"{len(logs)} logs {where}: a result consists of exactly {ROUNDS} runs; run NEXP={ROUNDS} trials, or name "
            f"{ROUNDS} logs, all of one set of runs and none left out because it was slow"
        )
    return logs


def stage(args: argparse.Namespace, aside: Path, logs: list[Log], description: Path, benchmark: str) -> Result:
    """Everything of the package, in a temporary folder."""
    staged = Result(aside / args.folder, args.system, benchmark)
    staged.folder.mkdir(parents=True)
    staged.description.parent.mkdir()
    for i, log in enumerate(logs):
        shutil.copyfile(log.path, staged.folder / f"result_{i}.txt")
    shutil.copyfile(description, staged.description)
    # Without a newline, and one to a file: the official checker knows them in no other way.
    chosen = [flag for flag in FLAGS if getattr(args, flag.replace("-", "_"))]
    for flag, place in zip(chosen, (staged.folder, staged.folder.parent)):
        (place / PARAMS).write_text(flag)
    return staged


def add_code(args: argparse.Namespace, staged: Result, logs: list[Log], checkout: Path) -> list[str]:
    """Code, READMEs and scripts below benchmarks/; returns what is to be said about them."""
    said = []
    commit = commit_of(checkout, args.commit or "HEAD")
    if not args.commit and (files := changed(checkout)):
        said.append(
            f"{len(files)} files differ from commit {commit[:12]}, which is what is packed: {', '.join(files[:3])}"
        )
    logged = (
        {logged_commit(args.logdir / f"{args.stamp}_{k}.log") for k in range(1, ROUNDS + 1)} if args.stamp else set()
    )
    for name in sorted(logged - {"", commit}):
        said.append(f"the runs were made by commit {name}, {commit} is packed (--commit)")
    program = facts(staged.benchmark, args.ruleset)
    place = staged.org / "benchmarks" / staged.benchmark
    left_out = export(checkout, commit, place / "implementations" / args.implementation / "code")
    write_implementation(place / "implementations" / args.implementation, staged, args, commit, program)
    write_system(place / args.system, staged, logs, args, commit)
    return said + [f"{len(left_out)} files left out of the code: {', '.join(left_out[:2])}, ..."] * bool(left_out)


def targets(staged: Result, implementation: str) -> list[Path]:
    """The parts of a package that are moved and replaced as a whole, relative to the organisation."""
    place = Path("benchmarks", staged.benchmark)
    parts = [
        Path("results", staged.system, staged.benchmark), Path("results", staged.system, PARAMS),
        place / "implementations" / implementation, place / staged.system, Path("systems", f"{staged.system}.json"),
    ]  # fmt: skip
    return [part for part in parts if (staged.org / part).exists()]


def publish(staged: Result, org: Path, implementation: str, force: bool) -> None:
    """Moves the parts of a checked package into place: all of them, or none where one can't be moved.

    Raises UserError where another one is there already and `force` is not set.
    """
    parts = targets(staged, implementation)
    existing = [part for part in parts if (org / part).exists() and not _same(org / part, staged.org / part)]
    if existing and not force:
        raise UserError(f"{', '.join(str(org / part) for part in existing)} exists already; --force replaces it")
    with ExitStack() as undo:
        for i, part in enumerate(parts):
            target, old = org / part, staged.org.parent / f"replaced_{i}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(old)
                undo.callback(_put_back, old, target)
            os.rename(staged.org / part, target)
            undo.callback(_put_back, target, staged.org / part)
        undo.pop_all()


def _put_back(moved: Path, where: Path) -> None:
    moved.rename(where)


def _same(one: Path, other: Path) -> bool:
    """Whether two files, or all files of two folders, are equal."""
    if one.is_file() and other.is_file():
        return one.read_bytes() == other.read_bytes()
    if not (one.is_dir() and other.is_dir()):
        return False
    names = [{p.relative_to(top) for p in top.rglob("*") if p.is_file()} for top in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


def package(args: argparse.Namespace) -> int:
    """Everything that `main` promises, for parsed arguments."""
    args.folder = args.folder or folder_name(args.org)
    names = (("--folder", args.folder), ("--system", args.system), ("--benchmark", args.benchmark),
             ("--implementation", args.implementation))  # fmt: skip
    for flag, name in names:
        if name is not None and not NAME.fullmatch(name):
            raise UserError(f"{flag} {name!r} becomes a folder's name: use letters, digits, '_', '-', '+' and '.' only")
    known(args.ruleset)
    logs = find_logs(args.logs, args.logdir, args.stamp)
    description = args.system_json or (args.logdir and args.logdir / f"{args.stamp}_system.json")
    if description is None:
        raise UserError("--system-json is missing: the system description that run.sub left beside the logs")
    submitter = read_description(description).get("submitter")
    named = next((name for log in logs if (name := log.name("submission_benchmark"))), "unknown")
    if not NAME.fullmatch(named):
        raise UserError(f"the logs' submission_benchmark is {named!r}, which is no benchmark's name")
    problems, notes = [], []
    if args.benchmark is not None and args.benchmark != named:
        problems.append(f"--benchmark is {args.benchmark!r}, but the logs say submission_benchmark {named!r}")
    if isinstance(submitter, str) and submitter != args.org and not submitter.startswith("FILL IN"):
        notes.append(f"--org is {args.org!r}, the system description's submitter {submitter!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".package-", dir=args.out) as aside:
        staged = stage(args, Path(aside), logs, description, named)
        checked = check_result(staged, args.ruleset)
        if args.code is not None and not problems and checked.code in (OK, DOUBTFUL):
            notes += add_code(args, staged, logs, args.code)
        repository = official.repository(staged.org)
        code = _say(args, checked, problems, notes, repository, {str(staged.org) + os.sep: "", f"{aside}{os.sep}": ""})
        if code != OK:
            return code
        if checked.score and checked.score.factor != 1:
            (staged.folder / "scaling.json").write_text(f'{{"scaling_factor": {checked.score.factor!r}}}')
        publish(staged, args.out / args.folder, args.implementation, args.force)
    place = Result(args.out / args.folder, args.system, named)
    print(f"{place.folder}: {ROUNDS} logs, accepted by ruleset {args.ruleset}")
    print(checked.score.sentence)
    if args.code is None:
        print(f"The code belongs into {place.org}/benchmarks/{named}/implementations/<name>/")
    return OK


def _say(
    args: argparse.Namespace, checked: Checked, problems: list[str], notes: list[str], repository: official.Said,
    places: dict[str, str],
) -> int:  # fmt: skip
    """Prints what was found; the exit code: OK where the package may be published."""
    lines = [
        *(f"error: {words}" for words in problems),
        *told(checked.findings),
        *(f"note: {words}" for words in notes),
    ]
    for name, said in {**checked.official, "repository": repository}.items():
        if not said.ok:
            lines.append(
                f"error: {name}: {'the official checker refuses it' if said.ran else 'NOT CHECKED'}: {said.errors}"
            )
    codes = [checked.code, REFUSED if problems else OK]
    codes.append(OK if repository.ok else REFUSED if repository.ran else NOT_CHECKED)
    code = worst(codes)
    if checked.score and code == REFUSED and checked.score.judgement:
        lines.append(f"error: {checked.score.judgement.sentence}" if checked.score.judgement.verdict == "fail" else "")
    for line in filter(None, lines):
        for place, short in places.items():
            line = line.replace(place, short)
        print(line, file=sys.stderr)
    if code == DOUBTFUL and args.accept_doubts:
        return OK
    reasons = {
        REFUSED: "it breaks the rules named above", DOUBTFUL: "the doubts above want an answer, or --accept-doubts",
        NOT_CHECKED: "an official check did not run, see above",
    }  # fmt: skip
    if code != OK:
        print(f"error: nothing was written: {reasons[code]}", file=sys.stderr)
    return code


def main(argv: list[str]) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tools.submission package", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    add("logs", type=Path, nargs="*", metavar="LOG", help="exactly five logs, or their folder, unless --stamp is given")
    add("--logdir", type=Path, help="LOGDIR of a job")
    add("--stamp", help="DATESTAMP of a job: its trials are <stamp>_1 to <stamp>_5")
    add("--org", required=True, help="the submitter, as MLPERF_SUBMISSION_ORG was")
    add("--folder", metavar="NAME", help="the submitter's folder (default: --org, blanks as underscores)")
    add("--system", required=True, help="name of the system's folder and description")
    add("--benchmark", help="must be the logs' submission_benchmark (default: as they say)")
    add("--system-json", type=Path, metavar="FILE", help="default: LOGDIR/<stamp>_system.json")
    add("--ruleset", default=DEFAULT, help="MLPerf Training ruleset (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="where the submitter's folder is made")
    add("--implementation", default="pytorch", metavar="NAME", help="name of the code's folder (default: %(default)s)")
    add("--code", type=Path, default=ROOT, metavar="DIR", help="the clone whose code is packed (default: this one)")
    add("--no-code", dest="code", action="store_const", const=None, help="pack neither code nor READMEs")
    add("--commit", help="what of it (default: HEAD)")
    add("--data-dir", default="/data", metavar="DIR", help="for the scripts of the system: the data set's folder")
    add("--rcp-bypass", action="store_true", help="write package_checker_params: accept a failed convergence check")
    add("--seed-checker-bypass", action="store_true", help="the same for the seeds")
    add("--accept-doubts", action="store_true", help="package although a reviewer will ask")
    add("--force", action="store_true", help="replace an earlier package of the same name")
    return package(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
