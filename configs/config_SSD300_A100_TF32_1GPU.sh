# SSD300, DGX A100, 1 node x 1 GPU x 64 images: global batch 64.
# Recipe: published by NVIDIA in its tables; its script SSD300_A100_TF32_1GPU.sh does not exist. BATCHSIZE=128 is its other row.
# Expected: mAP .25, 16:00 hours (published by NVIDIA); not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-64}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0026}
export WARMUP_STEPS=${WARMUP_STEPS:-300}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision tf32 --workers 12"}

export DGXNNODES=1
export DGXNGPU=1
export DGXSOCKETCORES=64
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=1440

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
