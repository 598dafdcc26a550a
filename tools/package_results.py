#!/usr/bin/env python3
"""The older name of `python -m tools.submission package`; see tools/submission/package.py."""

from run_module import run

run("tools.submission.package")
