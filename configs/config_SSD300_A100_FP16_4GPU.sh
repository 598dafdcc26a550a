# SSD300, DGX A100, 1 node x 4 GPUs x 256 images: global batch 1024.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP16_4GPU.sh.
# Expected: mAP .25 to .27, 1:30 hours with 128 images a GPU (published by NVIDIA); not measured here.

export BENCHMARK=ssd300

export BATCHSIZE=${BATCHSIZE:-256}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0027}
export WARMUP_STEPS=${WARMUP_STEPS:-1200}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp16 --workers 12"}

export DGXNNODES=1
export DGXNGPU=4
export DGXSOCKETCORES=64
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=240

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
