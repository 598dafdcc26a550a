"""The older name of `python -m tools.bench.index`."""

from run_module import run

run("tools.bench.index")
