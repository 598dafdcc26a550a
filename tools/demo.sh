#!/usr/bin/env bash
# make demo, make demo-ssd300: renders the scenes, trains on them with a config of configs/, has the official checker
# read the log, and draws the report.
#
#   tools/demo.sh [single_stage_detector | ssd300]
#
# PYTHON: the interpreter (default: python). Exit codes: those of the training (3: target not reached), 1 if the checker
# refuses the log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
case ${1:-single_stage_detector} in
single_stage_detector) config=configs/config_cpu_demo.sh out=results/demo data=build/demo-data scenes=() ;;
ssd300)
    config=configs/config_ssd300_cpu_demo.sh out=results/demo-ssd300 data=build/demo-data-ssd300
    scenes=(--train 600 --val 60 --most 3 --radius 18 38)
    ;;
*) echo "demo: there is no demo of $1; choose single_stage_detector or ssd300" >&2 && exit 2 ;;
esac
export PYTHON=$python DATASET_DIR=$data OUTPUT_DIR=$out RESULT_INDEX=0

last=$DATASET_DIR/annotations/instances_val.json
if [[ ! -f $last || tools/make_scenes.py -nt $last ]]; then
    rm -rf "$DATASET_DIR"
    "$python" -m tools.make_scenes --out "$DATASET_DIR" "${scenes[@]}"
fi

# shellcheck source=configs/config_cpu_demo.sh
source "$config"
status=0
./run_and_time.sh || status=$?
if ((status != 0 && status != 3)); then
    echo "demo: the training ended with code $status; its messages stand above" >&2
    exit "$status"
fi

log=$OUTPUT_DIR/result_0.txt
verdict=$OUTPUT_DIR/compliance.out
rm -f "$verdict"
checked=0
said=$("$python" tools/trials.py check "$log" --ruleset 5.1.0 --append "$verdict") || checked=$?
if ((checked == 0)); then
    echo "$said"
fi
"$python" tools/report.py "$OUTPUT_DIR"

if ((checked != 0)); then
    echo "demo: $said; all that the checker said: $verdict" >&2
    exit 1
fi
if ((status == 3)); then
    echo "demo: the target was not reached in the last epoch; the report shows how far it came" >&2
fi
exit "$status"
