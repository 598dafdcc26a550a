# SSD300, DGX-1 V100, 1 node x 4 GPUs x 64 images: global batch 256.
# Recipe: published by NVIDIA, examples/SSD300_FP16_4GPU.sh.
# Expected: mAP .25, 2:25 hours (published by NVIDIA); not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-64}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0026}
export WARMUP_STEPS=${WARMUP_STEPS:-300}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp16 --workers 4"}

export DGXNNODES=1
export DGXNGPU=4
export DGXSOCKETCORES=20
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=300

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
