"""Checks the nodes of a job before the clock starts, and says everything that is wrong with them at once.

One process a rank, started like the training itself:

    torchrun --nproc-per-node=8 tools/preflight.py --ranks-per-node 8 --data /data --output results
    srun -N 2 --ntasks-per-node=8 python tools/preflight.py --ranks-per-node 8 --data /data --output /shared/results
    python tools/preflight.py --device cpu --data build/demo-data --output results

Checked: all ranks come; each has a GPU of its own; clocks are in step; on each node the data folders hold files that
can be read, as many as their manifest says; the output folder can be written and is the same one on all nodes; there is
free space; an all-reduce over all ranks gives the right sum, and how fast. Exit code 0 and a table of what was found,
or 2 and, on stderr, all problems of all ranks, each with its nodes and what to do.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import preflight_checks as checks
import preflight_team
import system_description
import torch.distributed as dist
from preflight_checks import Report
from preflight_summary import Summary
from preflight_team import Silent, Team, first_line

from detcore import UserError
from detcore.cli import BAD_INPUT, run_main
from detcore.config import refuse_near_misses
from detcore.data import manifest

ROOT = Path(__file__).resolve().parents[1]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--device", choices=("auto", "cpu"), default="auto",
        help="auto: each rank needs a GPU; cpu: none, as on a TPU (%(default)s)",
    )  # fmt: skip
    add("--ranks-per-node", type=int, metavar="N", help="how many ranks each node should have")
    add("--data", type=Path, nargs="+", action="extend", default=[], metavar="DIR", help="data folders, on every node")
    add("--backbone", type=Path, metavar="DIR", help="folder of the pretrained weights, on every node; has no manifest")
    add("--output", type=Path, metavar="DIR", help="folder of the results: writable, the same one on every node")
    add("--verify", choices=("no", "quick", "full"), default="no",
        help="compare --data with its manifest; quick: numbers of files; full: bytes too (%(default)s)")  # fmt: skip
    add("--write-manifest", action="store_true", help="first let rank 0 write the manifest of --data")
    add("--manifest", type=Path, metavar="FILE", help=f"the manifest (default: {manifest.NAME} in the data folder)")
    add("--min-free-gib", type=float, default=1.0, metavar="X", help="free space that --output needs (%(default)s)")
    add("--min-shm-gib", type=float, default=0.0, metavar="X",
        help="free space that /dev/shm needs; below 1 GiB there is a warning (%(default)s)")  # fmt: skip
    add("--max-clock-skew", type=float, default=1.0, metavar="S",
        help="seconds that a node's clock may differ from rank 0's (%(default)s)")  # fmt: skip
    add("--bandwidth-mib", type=float, default=25.0, metavar="M",
        help="size of the all-reduce in MiB, 0: none (%(default)s: 26,214,400 bytes)")  # fmt: skip
    add("--system-json", type=Path, metavar="FILE", help="where to write MLPerf's description of these nodes")
    add("--values", type=Path, metavar="FILE", default=os.environ.get("SYSTEM_DESCRIPTION") or None,
        help="JSON with fields of that description that you know better (variable SYSTEM_DESCRIPTION)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="where to write what was found, problems included")
    add("--timeout", type=float, default=120.0, metavar="S",
        help="seconds without progress until a rank counts as lost (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("min_free_gib", "min_shm_gib", "max_clock_skew", "bandwidth_mib"):
        if not 0 <= getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must not be negative")
    if not 1 <= args.timeout < 1e6 or (args.ranks_per_node is not None and args.ranks_per_node < 1):
        parser.error("--timeout and --ranks-per-node must be at least 1")
    if (args.verify != "no" or args.write_manifest) and not args.data:
        parser.error("--verify and --write-manifest need --data")
    if args.manifest and len(args.data) != 1:
        parser.error("--manifest goes with exactly one folder of --data")
    return args


def launcher_variables() -> set[str]:
    """The variables that the launchers read, as their own text has them, without those of the shell and of Slurm."""
    scripts = [
        ROOT / "run.sub",
        ROOT / "run_and_time.sh",
        ROOT / "configs/steps.sh",
        *(ROOT / "configs").glob("config_[cm]o*.sh"),
        *ROOT.glob("*/launch.sh"),
    ]
    text = "\n".join(re.sub(r"(^|\s)#.*", "", path.read_text()) for path in scripts if path.exists())
    found = set(re.findall(r"\$\{!?#?([A-Z][A-Z0-9_]{5,})\b", text))
    others = r"SLURM|OMPI_|PET_|BASH|SECONDS|HOSTNAME|VIRTUAL_ENV|PYTHON|REMOVER|LOCAL_RANK"
    return {name for name in found if not re.match(others, name)}


def main(argv: list[str]) -> int:
    args = parse(argv)
    refuse_near_misses(launcher_variables(), os.environ)
    team = preflight_team.join(args.timeout)
    if team is None:
        return BAD_INPUT
    with team:
        try:
            code = lead(team, args) if team.world.rank == 0 else follow(team, args)
        except dist.DistNetworkError as error:
            raise UserError(f"{team.name(team.world.rank)}: {team.name(0)} is gone; its output may say why") from error
        except Silent as silent:
            raise UserError(f"{team.name(team.world.rank)} waits in vain: {silent}") from silent
        team.leave()
    return code


def follow(team: Team, args: argparse.Namespace) -> int:
    """Every rank but rank 0: look, tell, hear the verdict."""
    token = team.receive("prepared", 0)
    report = Report()
    look(report, team, args, token)
    team.send("checked", report.to_json())
    if team.receive("measure", 0):
        team.send("measured", measure(team, args))
    return team.receive("verdict", 0)


def lead(team: Team, args: argparse.Namespace) -> int:
    """Rank 0: the same, and bring together what all of them found."""
    report, token, summary = Report(), None, Summary(team)
    team.when_stuck = summary.stuck
    values = {}
    try:
        if args.system_json and args.values:
            values = system_description.read_values(args.values)
    except UserError as error:
        report.problems.append(str(error))
    try:
        if args.write_manifest:
            checks.write_manifests(report, team, args.data, args.manifest)
        name = f".preflight-{os.getpid()}-{time.time_ns()}"
        if args.output and checks.check_output(report, team, args.output, name, None):
            token = name
        team.send("prepared", token)
        look(report, team, args, token)
        team.send("checked", report.to_json())
        summary.take_reports(team.gather("checked"), args.ranks_per_node)
        # Without every rank and its GPU, a collective would only wait.
        ready = summary.complete and (args.device == "cpu" or summary.all_have_gpus)
        team.send("measure", ready)
        if ready:
            team.send("measured", measure(team, args))
            summary.take_measured(team.gather("measured"), args.max_clock_skew)
    finally:
        if token:
            (args.output / token).unlink(missing_ok=True)
    if not summary.problems and args.system_json:
        summary.describe_system(args.system_json, values)
    code = summary.conclude(args.json)
    team.send("verdict", code)
    return code


def look(report: Report, team: Team, args: argparse.Namespace, token: str | None) -> None:
    """Everything that a rank can see for itself; what is the same for a whole node, its first rank looks at."""
    checks.check_device(report, team, args.device)
    if not team.is_leader:
        return
    checks.check_data(report, team, args.data, args.backbone, args.verify, args.manifest)
    rank = team.world.rank
    if args.output and rank:
        checks.check_output(report, team, args.output, f".preflight-{time.time_ns()}-{rank}", token)
    checks.check_space(report, None if rank else args.output, args.min_free_gib, args.min_shm_gib)
    if args.system_json:
        team.begin("describing its node")
        report.facts["system"] = system_description.collect()


def measure(team: Team, args: argparse.Namespace) -> dict[str, Any]:
    """What only works together: {"clocks": {rank: (ahead, uncertainty)}, "reduce": figures or an error}."""
    clocks: dict[int, tuple[float, float]] = {}
    try:
        if team.is_leader:
            team.begin("comparing clocks")
            clocks = team.clock_offsets()
        if args.bandwidth_mib == 0:
            return {"clocks": clocks, "reduce": None}
        team.begin(f"an all-reduce of {args.bandwidth_mib:g} MiB")
        return {"clocks": clocks, "reduce": checks.all_reduce(team, args.device, args.bandwidth_mib)}
    except Silent as silent:
        return {"clocks": clocks, "reduce": {"error": str(silent)}}
    except RuntimeError as error:
        return {"clocks": clocks, "reduce": {"error": f"the all-reduce failed: {first_line(error)}"}}


if __name__ == "__main__":
    code = run_main(main)
    sys.stdout.flush()
    # A collective that some rank never joined would hold an orderly end back.
    os._exit(code)
