#!/usr/bin/env python3
"""Says whether a data set is whole and fit to train on: see --help, and dataprep/verify.py."""

from run_module import run

run("dataprep.verify")
