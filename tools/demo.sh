#!/usr/bin/env bash
# make demo, make demo-<benchmark>: renders the scenes, trains on them with a config of configs/, has the official checker
# read the log, and draws the report.
#
#   tools/demo.sh [BENCHMARK]      default: single_stage_detector, whose demo bears no name
#
# PYTHON: the interpreter (default: python). Exit codes: those of the training (3: target not reached), 1 if the checker
# refuses the log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python}
benchmark=${1:-single_stage_detector} name=${1:-}
[[ $name != single_stage_detector ]] || name=''
config=configs/config_${name:+${name}_}cpu_demo.sh
if [[ ! -f $config || ! -f $benchmark/launch.sh ]]; then
    others=(*/launch.sh)
    echo "demo: there is no demo of $benchmark; choose one of ${others[*]%/launch.sh}" >&2 && exit 2
fi
# shellcheck source=ssd300/launch.sh
source "$benchmark/launch.sh"
export PYTHON=$python DATASET_DIR=build/demo-data${name:+-$name} OUTPUT_DIR=results/demo${name:+-$name} RESULT_INDEX=0

last=$DATASET_DIR/annotations/instances_val.json
if [[ ! -f $last || tools/make_scenes.py -nt $last ]]; then
    rm -rf "$DATASET_DIR"
    "$python" -m tools.make_scenes --out "$DATASET_DIR" "${demo_scenes[@]}"
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
said=$("$python" tools/trials.py check "$log" --ruleset "${MLPERF_RULESET:-5.1.0}" --append "$verdict") || checked=$?
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
