#!/usr/bin/env bash
# Fetches COCO 2017: val2017, train2017 and annotations, checked by size and md5, unpacked.
#
#   public-scripts/download_coco2017.sh [-d DIR] [-o OUTPUT] [OPTION...]        -h lists the options
#
# DIR: the data set, or with -o only its archives. Default: /workspace/ssd_dataset/coco2017.
# An interrupted download goes on where it stopped: run the same command again.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DOWNLOAD_CALLED_AS=${BASH_SOURCE[0]##*/}
for python in "${PYTHON:-}" "$here/../.venv/bin/python" python python3; do
    [[ -z $python ]] || ! command -v "$python" >/dev/null || exec "$python" "$here/download.py" coco2017 "$@"
done
echo "download_coco2017.sh: no Python found; set PYTHON to an interpreter, 3.11 or newer" >&2
exit 2
