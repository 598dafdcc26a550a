#!/usr/bin/env python3
"""Makes COCO 2014's minival and valminusminival: see --help, and dataprep/coco_minival.py."""

from run_module import run

run("dataprep.coco_minival")
