#!/usr/bin/env bash
# Fetches COCO 2014: val2014, train2014 and annotations, checked by size and md5, unpacked.
#
#   public-scripts/download_coco2014.sh [-d DIR] [-o OUTPUT] [OPTION...]        -h lists the options
#
# DIR: the data set, or with -o only its archives. Default: /workspace/ssd_dataset/coco2014.
# An interrupted download goes on where it stopped: run the same command again.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/start_download.sh" coco2014 coco2014 "$@"
