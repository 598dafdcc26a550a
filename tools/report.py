#!/usr/bin/env python3
"""The older name of `python -m tools.submission report`; see tools/submission/report.py."""

from run_module import run

run("tools.submission.report")
