# SSD300, evaluation of a checkpoint, 1 node x 1 GPU x 32 images: global batch 32.
# Recipe: published by NVIDIA, examples/SSD300_FP32_EVAL.sh. Say which: ./run_and_time.sh --checkpoint FILE
# Expected: the mAP that its training had; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-32} EVALBATCHSIZE=${EVALBATCHSIZE:-32} WALLTIME_RUNANDTIME=30
export BENCHMARK=ssd300 EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp32 --workers 4 --mode evaluation"}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
