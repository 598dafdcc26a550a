#!/usr/bin/env python3
"""Turns the Waymo Open Dataset's TFRecord or Parquet files into COCO files: see --help, and dataprep/waymo.py."""

from run_module import run

run("dataprep.waymo")
