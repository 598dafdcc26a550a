"""Downloading, converting, verifying and packing data sets: what the commands of public-scripts/ do.

Each command is a module too: python -m dataprep.download, openimages, openimages_fiftyone, verify, pack. They start
without torch; only `verify_images`, which decodes every image, imports it. detcore never imports this package.
"""
