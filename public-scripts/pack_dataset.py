#!/usr/bin/env python3
"""Packs the images of a data set into large tar files: see --help, and dataprep/pack.py."""

from run_module import run

run("dataprep.pack")
