#!/usr/bin/env python3
"""Turns OpenImages' tables and images into COCO files: see --help, and dataprep/openimages.py."""

from run_module import run

run("dataprep.openimages")
