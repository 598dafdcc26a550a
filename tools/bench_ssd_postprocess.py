"""The older name of `python -m tools.bench.ssd_postprocess`."""

from run_module import run

run("tools.bench.ssd_postprocess")
