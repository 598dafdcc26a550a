#!/usr/bin/env bash
# start_download.sh NAME COMMAND [WORD...]: download.py with the first Python there is, for the script download_NAME.sh.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DOWNLOAD_CALLED_AS=download_$1.sh
for python in "${PYTHON:-}" "$here/../.venv/bin/python" python python3; do
    [[ -z $python ]] || ! command -v "$python" >/dev/null || exec "$python" "$here/download.py" "${@:2}"
done
echo "download_$1.sh: no Python found; set PYTHON to an interpreter, 3.11 or newer" >&2
exit 2
