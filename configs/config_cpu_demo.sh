# A demonstration on two CPU cores: a small RetinaNet from random weights on generated scenes of six shapes (make demo).
# Expected: AP 0.42 after about 7 epochs, 3 minutes with bf16. No MLPerf result, and no published one to compare it with.

source "$(dirname "${BASH_SOURCE[0]}")/systems/cpu.sh"
export DGXNNODES=1 WALLTIME_RUNANDTIME=20
export BATCHSIZE=${BATCHSIZE:-8} EVALBATCHSIZE=${EVALBATCHSIZE:-40} LR=${LR:-0.0005}
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/demo.sh" \
    --target-map 0.42 --workers 1 --drop-file-cache --gallery 12 --overwrite
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
