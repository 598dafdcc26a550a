#!/usr/bin/env bash
# Fetches COCO 2017: val2017, train2017 and annotations, checked by size and md5, unpacked.
#
#   public-scripts/download_coco2017.sh [-d DIR] [-o OUTPUT] [OPTION...]        -h lists the options
#
# DIR: the data set, or with -o only its archives. Default: /workspace/ssd_dataset/coco2017.
# An interrupted download goes on where it stopped: run the same command again.
set -euo pipefail

exec "$(dirname "${BASH_SOURCE[0]}")/start_download.sh" coco2017 coco2017 "$@"
