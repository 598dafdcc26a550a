"""What the programs of all benchmarks do: read their settings, print them, and do what --mode says."""

import os
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import nn

from detcore import UserError
from detcore.config import Words, describe, format_config, load
from detcore.detection import inference
from detcore.detection.benchmark import benchmark as measure
from detcore.detection.detector import Detector
from detcore.device import tpu
from detcore.processes.launcher import World, discover
from detcore.training import engine
from detcore.training.task import Context, Outcome, Task

Mode = Callable[[Any, World], int]


def program(
    argv: Sequence[str],
    *,
    module: str,
    intro: str,
    epilog: str = "",
    config_class: type,
    benchmark: str,
    detector: Detector,
    build_model: Callable[[Any, int], nn.Module],
    build_task: Callable[[Any, Context], Task],
    ignored_flags: Mapping[str, tuple[int, str]],
    translate: Callable[[Sequence[str]], list[str] | Words] = list,
    complete: Callable[[Any, dict[str, str]], Any] = lambda config, sources: config,
    modes: Mapping[str, Mode] | None = None,
) -> int:
    """The program `python -m module` of a benchmark with the words of its command line; returns the exit code.

    intro, epilog: for --help. benchmark: its name in the MLPerf log. build_model(config, number of classes): the model
    with its starting weights, on the CPU. ignored_flags: see `detcore.config.load`. translate: words for the original
    programs, and files that they name, into words for this one. complete(config, sources): the config with what a
    checkpoint knows, and the sources with where that came from; may refuse the config with UserError. modes: what a
    benchmark does for a --mode in place of what all do, or beyond; mode(config, world) returns the exit code.
    """
    if {"-h", "--help"} & set(argv):
        print(describe(config_class, f"python -m {module}", intro, epilog))
        return 0
    printing = "--print-config" in argv
    words = translate([word for word in argv if word != "--print-config"])
    config, sources, notices = load(config_class, words, os.environ, ignored_flags)
    config = complete(config, sources)
    if not printing:
        spread(config.num_cores, module, argv)
    world, _ = discover(os.environ)
    if world.rank == 0:
        print("\n".join([format_config(config, sources), *notices]), file=sys.stdout if printing else sys.stderr)
    if printing:
        return 0
    config.check_folders()

    def train(config: Any, world: World) -> int:
        outcome = engine.train(config, benchmark, lambda context: build_task(config, context))
        draw_gallery(config, outcome, detector, build_model, world)
        return outcome.code

    usual: dict[str, Mode] = {
        "train": train,
        "evaluate": lambda config, world: inference.evaluate(config, detector, build_model),
        "predict": lambda config, world: inference.predict(config, detector, build_model),
        "benchmark": lambda config, world: measure(config, detector, build_task),
    }
    return {**usual, **(modes or {})}[config.mode](config, world)


def draw_gallery(
    config: Any, outcome: Outcome, detector: Detector, build_model: Callable[[Any, int], nn.Module], world: World
) -> None:
    """Draws the pictures that --gallery asks for, on rank 0, once a training has a best checkpoint."""
    if config.gallery and outcome.best is not None and world.rank == 0:
        inference.gallery(config, detector, build_model)


def spread(processes: int, module: str, argv: Sequence[str], environ: MutableMapping[str, str] = os.environ) -> None:
    """Goes on as `processes` processes of `python -m module argv` on this machine, through torchrun in place of this
    process; does nothing where they are there already, and for 0.

    As through run_and_time.sh, torchrun hands signals on and makes exit code 1 of every failure. Raises `UserError`
    where a launcher has started another number.
    """
    world, _ = discover(environ)
    if processes in (0, world.local_size):
        return
    if world.size > 1 or "RANK" in environ:
        raise UserError(
            f"--num-cores {processes}: a launcher has started {world.local_size} processes on this machine already; "
            "leave the option out, or start the program once"
        )
    tpu.before_launch(processes)
    environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGUSR1")
    environ.setdefault("PET_SHUTDOWN_TIMEOUT", "300")
    environ.setdefault("OMP_NUM_THREADS", "1")  # they share the processor's cores
    together = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, "-m", "torch.distributed.run", *together, "-m", module, *argv], dict(environ)
    )
