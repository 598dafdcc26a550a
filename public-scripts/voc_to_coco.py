#!/usr/bin/env python3
"""Turns Pascal VOC's XML files and masks into COCO files: see --help, and dataprep/voc.py."""

from run_module import run

run("dataprep.voc")
