"""The older name of `python -m tools.bench.shards`."""

from run_module import run

run("tools.bench.shards")
