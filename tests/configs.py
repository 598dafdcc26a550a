"""What the configs of configs/ export, and what the programs make of it; for the tests of all benchmarks."""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
from pathlib import Path

from detcore.config import load

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs"
FILES = sorted(set(FOLDER.glob("config_*.sh")) - {FOLDER / "config_common.sh", FOLDER / "config_mounts.sh"})
MODULES = {
    path.parent.name: importlib.import_module(f"{path.parent.name}.config") for path in sorted(ROOT.glob("*/launch.sh"))
}
PROGRAMS = {  # the variables that each program reads
    name: {field.metadata["detcore.option"]["env"] for field in dataclasses.fields(module.Config)} - {None}
    for name, module in MODULES.items()
}


@functools.cache
def _exports(path: Path, environ: tuple[tuple[str, str], ...]) -> dict[str, str]:
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-euc", 'source "$0" && env -0', path, "a word", "of the caller"],
        env={"PATH": os.environ["PATH"], **dict(environ)}, capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    assert done.stderr == ""
    return variables(done.stdout)


def variables(printed: str) -> dict[str, str]:
    """What `env -0` printed, without the shell's own."""
    found = dict(entry.split("=", 1) for entry in printed.split("\0") if entry)
    return {name: value for name, value in found.items() if name not in ("PATH", "PWD", "OLDPWD", "SHLVL", "_")}


def exports(path: Path, **environ: str) -> dict[str, str]:
    """What a shell with nothing but PATH and `environ` exports after sourcing `path` from another folder."""
    return dict(_exports(path, tuple(environ.items())))


def settings(exported: dict[str, str], *more: str):
    """The program's settings as run_and_time.sh starts it."""
    module, words = MODULES[exported["BENCHMARK"]], [*exported["EXTRA_PARAMS"].split(), *more]
    if importlib.util.find_spec(flags := f"{exported['BENCHMARK']}.flags"):
        words = importlib.import_module(flags).translate_flags(words)
    loaded = load(module.Config, words, exported, module.IGNORED_FLAGS)
    assert loaded.notices == []
    return loaded.config


def configs_of(benchmark: str) -> dict[str, Path]:
    """The configs of a benchmark by the names of their systems, without the demonstrations on a CPU."""
    named = {path.stem.removeprefix("config_"): path for path in FILES if "cpu_demo" not in path.stem}
    return {name: path for name, path in named.items() if exports(path)["BENCHMARK"] == benchmark}


@functools.cache
def launch(benchmark: str) -> dict[str, str]:
    """The variables of a benchmark's launch.sh."""
    script = 'source "$0"; for name in container_data own_variables; do printf "%s=%s\\0" "$name" "${!name}"; done'
    command = ["bash", "-euc", script, ROOT / benchmark / "launch.sh"]
    return variables(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def triple(name: str) -> tuple[int, ...] | None:
    """Nodes, GPUs a node and images a GPU, as the name of a system ends with them."""
    found = re.search(r"_(\d{3})x(\d{2})x(\d{3})$", name)
    return tuple(map(int, found.groups())) if found else None
