"""Checks the nodes of a job before the clock starts, and says everything that is wrong with them at once.

One process a rank, started like the training itself:

    torchrun --nproc-per-node=8 -m tools.preflight --ranks-per-node 8 --data /data --output results
    srun -N 2 --ntasks-per-node=8 python -m tools.preflight --ranks-per-node 8 --data /data --output /shared/results
    python -m tools.preflight --device cpu --data build/demo-data --output results

Checked: all ranks come; each has a GPU of its own; clocks are in step; on each node the data folders hold files that
can be read, as many as their manifest says; the output folder can be written and is the same one on all nodes; there is
free space; an all-reduce over all ranks gives the right sum, and how fast; and, with a config's variables, whether the
runs could be submitted to MLPerf (a warning). Exit code 0 and a table of what was found,
or 2 and, on stderr, all problems of all ranks, each with its nodes and what to do.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from detcore.cli import run_main
from detcore.config import refuse_near_misses
from detcore.data import manifest

ROOT = Path(__file__).resolve().parents[2]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    from tools.preflight import job  # which imports torch

    return job.run(args)


if __name__ == "__main__":
    code = run_main(main)
    sys.stdout.flush()
    # A collective that some rank never joined would hold an orderly end back.
    os._exit(code)
