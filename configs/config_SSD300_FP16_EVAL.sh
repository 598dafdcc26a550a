# SSD300, evaluation of a checkpoint, 1 node x 1 GPU x 32 images: global batch 32.
# Recipe: published by NVIDIA, examples/SSD300_FP16_EVAL.sh. Say which: ./run_and_time.sh --checkpoint FILE
# Expected: the mAP that its training had; not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-32}
export EVALBATCHSIZE=${EVALBATCHSIZE:-32}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp16 --workers 4 --mode evaluation"}

export DGXNNODES=1
export DGXNGPU=1
export DGXSOCKETCORES=20
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=30

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
