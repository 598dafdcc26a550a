#!/usr/bin/env python3
"""OpenImages the original way: see --help, and dataprep/openimages_fiftyone.py."""

from run_module import run

run("dataprep.openimages_fiftyone")
