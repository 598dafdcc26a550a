#!/usr/bin/env python3
"""Fetches data sets and weights: see --help, and dataprep/download.py."""

from run_module import run

run("dataprep.download")
