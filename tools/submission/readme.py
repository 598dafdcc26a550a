"""The words and scripts of a package: README of the implementation, folder of a system."""

import argparse
import json
import re
import shlex
from pathlib import Path
from string import Template

from detcore import UserError

from .logs import Log, metrics
from .output import plain
from .rulesets import ROOT, Facts, facts
from .tree import Result

TEMPLATES = Path(__file__).with_name("templates")
HYPERPARAMETERS = (
    "global_batch_size", "local_batch_size", "gradient_accumulation_steps", "opt_name", "opt_base_learning_rate",
    "opt_weight_decay", "opt_learning_rate_warmup_epochs", "opt_learning_rate_warmup_steps",
    "opt_learning_rate_warmup_factor", "opt_learning_rate_decay_factor", "opt_learning_rate_decay_steps",
    "num_image_candidates",
)  # fmt: skip
DATA = {  # of the programs: script and folder of the data set, what the weights of its backbone are called
    "single_stage_detector": ("download_openimages_mlperf.sh", "open-images-v6", ""),
    "ssd300": ("download_coco2017.sh", "coco", "resnet50"),
    "maskrcnn": ("download_coco2017.sh", "coco", "MSRA/R-50"),
    "efficientdet": ("download_coco2017.sh", "coco", "efficientnet_b0_rwightman-7f5810bc.pth"),
}


def template(program: Facts | None, benchmark: str) -> Template:
    """Raises UserError where a benchmark has no template."""
    path = TEMPLATES / f"{program.program if program else benchmark}.md"
    if not path.is_file():
        have = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.md")))
        raise UserError(
            f"there is no README template of {benchmark} (there are: {have}): write "
            f"{path.relative_to(ROOT)}, or package without the code: --no-code"
        )
    return Template(path.read_text(encoding="utf-8"))


def write_implementation(
    folder: Path, staged: Result, args: argparse.Namespace, commit: str, program: Facts | None
) -> None:
    """The README that MLPerf wants of a benchmark: problem, directions, data, model, quality."""
    target = ", ".join(f"{name} {value:g}" for name, value in program.targets.items()) if program else ""
    text = template(program, staged.benchmark).substitute(
        model=program.model if program else staged.benchmark, data=program.data if program else "",
        ruleset=args.ruleset, org=args.org, commit=commit, target=target,
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def runs_table(logs: list[Log]) -> str:
    """The runs as a table in Markdown."""
    lines = ["| run | minutes | epochs | best | ended with |", "|---|---|---|---|---|"]
    for i, log in enumerate(logs):
        found = [metrics(value) for _, value in log.evaluations]
        names = dict.fromkeys(name for values in found for name in values)
        best = ", ".join(f"{name} {max(v[name] for v in found if name in v):.4f}" for name in names)
        epoch = log.last_evaluation[0] if log.last_evaluation else "-"
        minutes = "-" if log.minutes is None else f"{log.minutes:.3f}"
        lines.append(f"| {i} | {minutes} | {epoch} | {best or '-'} | {log.status or 'no end'} |")
    return "\n".join(lines)


def write_system(folder: Path, staged: Result, logs: list[Log], args: argparse.Namespace, commit: str) -> None:
    """<benchmark>/<system>: its README, the three scripts and <system>_<implementation>.json."""
    folder.mkdir(parents=True)
    platform = logs[0].name("submission_platform")
    config = re.sub(r"^\d+x", "", platform)
    known = (ROOT / "configs" / f"config_{config}.sh").is_file()
    place = f"../implementations/{args.implementation}"
    program = json.loads(staged.description.read_text(encoding="utf-8-sig"))
    data = shlex.quote(args.data_dir)
    inside = f'cd "$(dirname "$0")/{place}"'
    _script(folder / "setup.sh", "Builds the image.", [inside, "docker build -t detectors code"])
    download, images, weights = _data(_program(staged, args))
    steps = [
        f"code/public-scripts/{download} -d {data}/{images}",
        f"code/public-scripts/verify_dataset.py {data}/{images} --full",
        f"code/public-scripts/download_backbone.sh -d {data}/torch-home {weights}".rstrip(),
    ]
    _script(folder / "init_datasets.sh", "Downloads and verifies the data set and the weights.", [inside, *steps])
    run = [
        inside, "cd code", f"source configs/config_{config}.sh",
        f"export DATADIR={data}/{images} BACKBONE_DIR={data}/torch-home",
        "export LOGDIR=${LOGDIR:-results} CONT=${CONT:-detectors}",
        f"export MLPERF_SUBMISSION_ORG={shlex.quote(args.org)}",
        "NEXP=5 sbatch -N $DGXNNODES -t $WALLTIME run.sub",
    ]  # fmt: skip
    _script(folder / "run_and_time.sh", "Five runs, one Slurm job.", run)
    hyper = {key: logs[0].last(key) for key in HYPERPARAMETERS if logs[0].values(key)}
    about = {"system": args.system, "implementation": args.implementation, "commit": commit, "config": config}
    record = plain(about | {"hyperparameters": hyper})
    (folder / f"{args.system}_{args.implementation}.json").write_text(json.dumps(record, indent=2) + "\n")
    missing = (
        "" if known else f"\nThe code has no `configs/config_{config}.sh`; the runs had their values from elsewhere.\n"
    )
    described = program.get("system_name") or args.system
    words = (
        "`setup.sh`, `init_datasets.sh` and `run_and_time.sh`, in this order, repeat the five runs; their values stand "
        f"in `{args.system}_{args.implementation}.json`, the hardware in `systems/{args.system}.json`. "
        f"`{place}/README.md` has the rest.\n{missing}"
    )
    text = f"# {staged.benchmark} on {described}\n\n{words}\n{runs_table(logs)}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _program(staged: Result, args: argparse.Namespace) -> str:
    found = facts(staged.benchmark, args.ruleset)
    return found.program if found else staged.benchmark


def _data(program: str) -> tuple[str, str, str]:
    """The entry of DATA. Raises UserError where a benchmark has none."""
    if program not in DATA:
        raise UserError(
            f"DATA of tools/submission/readme.py does not say where the data set and the weights of {program} are from "
            f"(it has: {', '.join(sorted(DATA))}): add them, or package without the code: --no-code"
        )
    return DATA[program]


def _script(path: Path, says: str, lines: list[str]) -> None:
    path.write_text("\n".join(["#!/bin/bash", f"# {says}", "set -euo pipefail", *lines]) + "\n", encoding="utf-8")
    path.chmod(0o755)
