"""The older name of `python -m tools.gpu_check`."""

from run_module import run

run("tools.gpu_check")
