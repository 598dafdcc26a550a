#!/usr/bin/env python3
"""Check, explain and summary: what became of the trials of a job; see tools/submission/trials.py."""

if __package__:
    from tools.run_module import run  # python -m tools.trials
else:
    from run_module import run

run("tools.submission.trials")
