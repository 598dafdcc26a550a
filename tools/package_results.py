#!/usr/bin/env python3
"""The older name of `python -m tools.submission package`; see tools/submission/package.py."""

if __package__:
    from tools.run_module import run  # python -m tools.package_results
else:
    from run_module import run

run("tools.submission.package")
