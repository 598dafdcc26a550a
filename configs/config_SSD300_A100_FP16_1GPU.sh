# SSD300, DGX A100, 1 node x 1 GPU x 256 images: global batch 256.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP16_1GPU.sh.
# Expected: mAP .26 to .27, 2:57 hours (published by NVIDIA); not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-256}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0026}
export WARMUP_STEPS=${WARMUP_STEPS:-300}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp16 --workers 12"}

export DGXNNODES=1
export DGXNGPU=1
export DGXSOCKETCORES=64
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=480

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
