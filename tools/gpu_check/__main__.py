"""Everything that wants a GPU, in one command of eight minutes; no network is needed.

    python -m tools.gpu_check --out DIR [--only PART,...] [--case PATTERN] [--quick] [--minutes 8]
                              [--carried DIR] [--data DIR] [--work DIR] [--go-on FILE]

`--list` prints the PARTs and the cases of each, `--list --gpu` those of a GPU, also where there is none. Measured are
this card's copy and matmul rates, every op beside its reference, and what each benchmark brings (benchmarks/): single
operations, training steps in all their modes with a profile, inference, a real training.

--only core is the core list: build, the ops' tests, floor, and the most telling cases of each benchmark. It ends after
three to four minutes if nothing is slow; `--minutes 4` caps it. It comes first without --only too, so that it is
the rest that is cut. --only none prints the table. Named parts (core names none) are measured anew if they had come to
an end. --case names cases, as in a shell and several times: they are measured anew, others not; those of all parts, or
of --only's. --quick takes fewer iterations and smaller batches (not in the floors).

DIR gets gpu_check.json (its keys: tools/gpu_check/state.py), gpu_check.log and table.txt, nothing else, all of them
refreshed every few seconds; everything else goes to --work, build/gpu_check. On a machine without a network,
--carried names the folder that tools.gpu_carry has made: packages, compiled libraries, the data set.

Every part runs in a process of its own within its own time, so that a crash costs one row. What does not fit is left
out and said; called again with the same DIR, or with --go-on and the JSON of the last call, the check goes on there.
After a change of the code the rows of the earlier commit stay, marked with a *, until --only or --case names them;
those with an error, and the build, are done again. On another kind of machine all begins anew, with a copy of the old
JSON in --work. A row stays until its new one is there. A case that hangs is passed over until --case names it.
Without a GPU the parts that make sense on a CPU run on small shapes; `--quick --minutes 0.4`, called again and again,
cuts each of them once. Exit code: 0 if nothing failed, 1 if a part did or hung, 2 for wrong arguments, 143 if ended.
"""

import argparse
import os
import shutil
import signal
import site
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tools import gpu_carry
from tools.gpu_check.benchmarks import benchmarks
from tools.gpu_check.machine import clocks, commit, has_gpu, preflight, told
from tools.gpu_check.parts import Stage
from tools.gpu_check.process import COMMAND, ENDING, GRACE, Log, child_environment, end_with_parent, run_part
from tools.gpu_check.stages import PARTS, STAGES, done, keep, mark_rows, stages_of, with_build
from tools.gpu_check.state import NAME, ROOT, Context, load, matches, save
from tools.gpu_check.table import table

BEGAN = time.monotonic()
if __name__ == "__main__":
    sys.dont_write_bytecode = True  # nothing beside DIR

LEAST = 3.0
"""A part is not begun with fewer seconds."""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", help="parts to measure anew, separated by commas; core; none: only print the table")
    parser.add_argument("--case", action="append", default=[], help="a case to measure anew, such as 'bf16 b32 *'")
    parser.add_argument("--list", action="store_true", help="print the cases of each part")
    parser.add_argument("--gpu", action="store_true", help="with --list: those of a GPU, on a machine without one too")
    parser.add_argument("--quick", action="store_true", help="fewer iterations and smaller shapes")
    parser.add_argument("--data", type=Path, help="the bccd data set, where it is not at shared/data/bccd")
    parser.add_argument("--carried", type=Path, help="what tools.gpu_carry has made")
    parser.add_argument("--go-on", type=Path, help="gpu_check.json of an earlier call, where DIR has none")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check", help="caches, runs, temporary files")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.wanted = [] if options.only in (None, "none") else options.only.split(",")
    unknown = [name for name in options.wanted if name not in PARTS and name != "core"]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(PARTS)}, core, none")
    if options.gpu and not options.list:
        parser.error("--gpu: only together with --list")
    if not options.out and not options.list:
        parser.error("--out DIR: where the results go")
    if options.go_on and not options.go_on.is_file():
        parser.error(f"--go-on {options.go_on}: no such file")
    if options.carried and not (options.carried / gpu_carry.NAME).is_file():
        parser.error(f"--carried {options.carried}: no {gpu_carry.NAME} in it; tools.gpu_carry makes one")
    for name in ("out", "data", "carried", "work"):
        given = getattr(options, name)
        setattr(options, name, given and given.resolve())
    options.site = None
    return options


def list_cases(options: argparse.Namespace) -> int:
    """Prints "part: case" of every part; for one that can't say, as its module can't be imported, the reason."""
    for name, part in PARTS.items():
        context = make_context(options, options.gpu or has_gpu())
        try:
            for key, _ in getattr(import_module(part.module), part.function)(context):
                print(f"{name}: {key}")
        except Exception as error:
            print(f"{name}! {error}")
    return 0


def parts_of_cases(options: argparse.Namespace) -> list[str]:
    """The parts that have a case of --case. They are asked in another process, so that this one stays alive.

    Those of --only are taken as they are.
    """
    if options.wanted:
        return [name for name in PARTS if name in options.wanted]
    command = [*COMMAND, "--list"] + ["--quick"] * options.quick
    environment = child_environment(options.work, options.site)
    said = subprocess.run(command, text=True, capture_output=True, env=environment, cwd=ROOT, timeout=60).stdout
    known = [line.partition(": ")[::2] for line in said.splitlines() if ": " in line]
    return list(dict.fromkeys(part for part, key in known if matches(key, options.case)))


def stages_to_run(options: argparse.Namespace, gpu: bool) -> list[Stage]:
    """What a call is to do, in order."""
    if options.case:
        time_of = {stage.part: stage.seconds for stage in STAGES}
        return [Stage(name, time_of[name], tuple(options.case)) for name in parts_of_cases(options)]
    return stages_of(options.wanted, gpu, options.quick)


def make_context(options: argparse.Namespace, gpu: bool, began: float = 0.0) -> Context:
    return Context(
        options.out, gpu, options.quick, options.data, options.budget, began, options.work, tuple(options.case),
        options.first, options.carried,
    )  # fmt: skip


def run_child(options: argparse.Namespace) -> NoReturn:
    """A part, in its own process."""
    began = time.monotonic()
    end_with_parent()
    part = PARTS[options.child]
    context = make_context(options, has_gpu(), began)
    jobs = getattr(import_module(part.module), part.function)(context)
    from tools.gpu_check.jobs import run_jobs  # which imports torch

    code = run_jobs(part.name, jobs, context)
    sys.stdout.flush()
    os._exit(code)  # without torch's own end, which takes seconds, or for ever where the GPU hangs


def set_aside(options: argparse.Namespace) -> Path:
    """Copies the JSON of DIR into the work folder, under a name that is free; its path."""
    options.work.mkdir(parents=True, exist_ok=True)
    number = 1
    while (aside := options.work / f"gpu_check_before_{number}.json").exists():
        number += 1
    shutil.copyfile(options.out / NAME, aside)
    return aside


def check(options: argparse.Namespace, stages: list[Stage], gpu: bool, log: Log, began: float) -> None:
    """Runs the stages that are not done, one after the other, with all the minutes among them.

    So a part whose one long job was stopped has more time for it in the next call. What one leaves is the next one's.
    """
    state = load(options.out)
    head = commit()
    if head == "unknown" and options.carried:
        head = gpu_carry.commit(options.carried)
    start = clocks("start") if gpu else {}
    kind = {"quick": options.quick, "gpu": gpu, "card": start.get("card") or state.get("card", "")}
    if state["parts"] and any(state.get(key, value) != value for key, value in kind.items()):
        log.say(
            f"the results in the folder are of another kind of machine: all begun anew; a copy: {set_aside(options)}"
        )
        state = {"version": 1, "parts": {}}
    mark_rows(state, head)
    if any("commit" in row for part in state["parts"].values() for row in part.get("rows", {}).values()):
        log.say("rows of another commit are kept and marked with a *; --only and --case measure them anew")
    state.update(kind, commit=head, published=figures("published"), targets=figures("targets"))
    state["clocks"] = [start] if gpu else []
    asked = [stage.part for stage in stages]
    state["preflight"] = preflight() if gpu else {}
    if gpu:
        log.say(f"on this machine {told(state['preflight'])}")
    stages = with_build(stages, state)
    names = list(dict.fromkeys(stage.part for stage in stages))
    kept = [
        name for name in names
        if keep(state, name, name in options.wanted, () if name == "build" and "build" not in asked else options.case)
    ]  # fmt: skip
    save(options.out, state)
    for name in kept:
        log.say(f"{name}: kept from an earlier call")
    todo = [stage for stage in stages if stage.part not in kept]
    scale = options.minutes * 60 / max(1.0, sum(stage.seconds for stage in todo))
    spare = 0.0
    for stage in todo:
        state = load(options.out)
        entry = state["parts"].setdefault(stage.part, {"rows": {}})
        if done(entry, stage.cases, stage.first):
            continue
        left = options.minutes * 60 - (time.monotonic() - began)
        seconds = min(stage.seconds * scale + spare, left - GRACE - ENDING)
        if seconds < LEAST:
            if entry.get("status") != "failed":
                entry.update(status="stopped", reason="no time was left for all of it")
            save(options.out, state)
            log.say(f"{stage.part}: left out, no time is left; call again to go on")
            continue
        log.say(f"{stage.part}: {seconds:.0f} s at most")
        start = time.monotonic()
        run_part(PARTS[stage.part], seconds, options, log, lambda: write_table(options.out), stage.cases, stage.first)
        spare = max(0.0, seconds - (time.monotonic() - start))
    state = load(options.out)
    state["clocks"] += [clocks("end")] if gpu else []
    state["seconds"] = round(time.monotonic() - began, 1)
    save(options.out, state)


def figures(kind: str) -> dict[str, Any]:
    """{benchmark: its figures} of the kind "published" or "targets"."""
    return {name: getattr(benchmark, kind) for name, benchmark in benchmarks().items()}


def write_table(out: Path) -> str:
    text = table(load(out))
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: list[str], began: float | None = None) -> int:
    """began: time.monotonic() from which the minutes count, if not from now."""
    began = time.monotonic() if began is None else began
    options = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.child:
        run_child(options)
    if options.carried:
        options.data = options.data or gpu_carry.data(options.carried)
        options.site, said = gpu_carry.put_in_place(options.carried, options.work)
        site.addsitedir(str(options.site))
    if options.list:
        return list_cases(options)
    gpu = has_gpu()
    stages = stages_to_run(options, gpu)
    if not stages and options.only != "none":
        print(f"gpu_check: no case matches --case {' '.join(options.case)}; --list prints them", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.go_on and not (options.out / NAME).exists():
        shutil.copyfile(options.go_on, options.out / NAME)
    log = Log(options.out / "gpu_check.log")
    for line in said if options.carried else ():
        log.say(line)
    if not gpu:
        log.say(
            "torch sees no GPU on this machine: the CPU part runs, on small shapes; its times say nothing about a GPU"
        )
    lacking = [name for name in gpu_carry.NEEDED if find_spec(name) is None]
    if lacking:
        log.say(f"not installed: {', '.join(lacking)}; parts that want them fail (tools.gpu_carry takes them along)")
    try:
        if options.only != "none":
            check(options, stages, gpu, log, began)
    finally:
        log.say("\n" + write_table(options.out))
    return int(any(part.get("status") == "failed" for part in load(options.out)["parts"].values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BEGAN))
