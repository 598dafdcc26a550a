"""The older name of `python -m tools.bench.loader`."""

from run_module import run

run("tools.bench.loader")
