"""The preflight of one rank: it meets the others, looks, and tells; rank 0 brings together what all of them found."""

import argparse
import os
import time
from typing import Any

import torch.distributed as dist

from detcore import UserError
from detcore.cli import BAD_INPUT
from tools import system_description
from tools.preflight import checks
from tools.preflight.checks import Report
from tools.preflight.summary import Summary
from tools.preflight.team import Silent, Team, first_line, join
from tools.submission.before import obstacles


def run(args: argparse.Namespace) -> int:
    """Checks this rank's part of the job; the exit code. Raises UserError where rank 0 is lost."""
    team = join(args.timeout)
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
        if os.environ.get("BENCHMARK") and (reasons := obstacles()):
            report.warnings.append(f"this will not be submittable to the closed division, because {'; '.join(reasons)}")
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
