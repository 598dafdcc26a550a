"""The older name of `python -m tools.preflight`."""

from run_module import run

run("tools.preflight")
