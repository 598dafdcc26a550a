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

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DOWNLOAD_CALLED_AS=${BASH_SOURCE[0]##*/}
for python in "${PYTHON:-}" "$here/../.venv/bin/python" python python3; do
    [[ -z $python ]] || ! command -v "$python" >/dev/null || exec "$python" "$here/download.py" openimages "$@"
done
echo "download_openimages_mlperf.sh: no Python found; set PYTHON to an interpreter, 3.11 or newer" >&2
exit 2
