"""The older name of `python -m tools.bench.evaluation`."""

from run_module import run

run("tools.bench.evaluation")
