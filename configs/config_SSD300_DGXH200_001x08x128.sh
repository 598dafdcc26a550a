# SSD300, DGX H200, 1 node x 8 GPUs x 128 images: global batch 1024.
# Recipe: published by NVIDIA for 8 A100, examples/SSD300_A100_FP16_8GPU.sh, with bf16.
# Expected: mAP .25 to .27, nobody published a time; not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-128}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0027}
export WARMUP_STEPS=${WARMUP_STEPS:-1200}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision bf16 --workers 12"}

export DGXNNODES=1
export DGXNGPU=8
export DGXSOCKETCORES=56
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=60

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
