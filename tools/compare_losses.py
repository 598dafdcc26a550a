"""The older name of `python -m tools.compare_losses`."""

from run_module import run

run("tools.compare_losses")
