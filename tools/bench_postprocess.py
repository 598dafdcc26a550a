"""The older name of `python -m tools.bench.postprocess`."""

from run_module import run

run("tools.bench.postprocess")
