#!/usr/bin/env python3
"""Turns Cityscapes' instances into COCO files: see --help, and dataprep/cityscapes.py."""

from run_module import run

run("dataprep.cityscapes")
