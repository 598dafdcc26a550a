"""The older name of `python -m tools.bench.ssd_augment`."""

from run_module import run

run("tools.bench.ssd_augment")
