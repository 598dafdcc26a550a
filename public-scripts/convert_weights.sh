#!/usr/bin/env bash
# Makes of detectron2's, Detectron's, maskrcnn-benchmark's or torchvision's weights a file of the program maskrcnn.
#
#   public-scripts/convert_weights.sh IN OUT.pth [--config-file FILE] [KEY VALUE...]        -h says more
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for python in "${PYTHON:-}" "$root/.venv/bin/python" python python3; do
    [[ -z $python ]] || ! command -v "$python" >/dev/null || exec "$python" -m maskrcnn.convert "$@"
done
echo "convert_weights.sh: no Python found; set PYTHON to an interpreter, 3.11 or newer" >&2
exit 2
