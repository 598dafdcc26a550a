#!/usr/bin/env bash
# Fetches the MLPerf subset of OpenImages-v6 (264 classes, 1.2 million images, 352 GB), writes its COCO files and
# verifies it. No fiftyone is needed; --with-fiftyone keeps the original way.
#
#   public-scripts/download_openimages_mlperf.sh [-d DIR] [OPTION...]        -h lists the options
#
# DIR: the data set. Default: $DATASET_PATH, else /workspace/ssd_dataset/open-images-v6, the disk that a container of
#      this project was given: docker run -it --rm -v DATA:/workspace/ssd_dataset IMAGE
# An interrupted download goes on where it stopped: run the same command again.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/start_download.sh" openimages_mlperf openimages "$@"
