"""The older name of `python -m tools.bench.openimages`."""

from run_module import run

run("tools.bench.openimages")
