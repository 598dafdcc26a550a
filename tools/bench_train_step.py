"""The older name of `python -m tools.bench.train_step`."""

from run_module import run

run("tools.bench.train_step")
