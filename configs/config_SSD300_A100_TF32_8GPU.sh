# SSD300, DGX A100, 1 node x 8 GPUs x 128 images: global batch 1024.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP32_8GPU.sh, under the name that its tables have.
# Expected: mAP .25, 1:20 hours (published by NVIDIA); not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-128}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0027}
export WARMUP_STEPS=${WARMUP_STEPS:-1200}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision tf32 --workers 12"}

export DGXNNODES=1
export DGXNGPU=8
export DGXSOCKETCORES=64
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=180

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
