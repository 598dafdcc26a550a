#!/usr/bin/env python3
"""The older name of `python -m tools.submission report`; see tools/submission/report.py."""

if __package__:
    from tools.run_module import run  # python -m tools.report
else:
    from run_module import run

run("tools.submission.report")
