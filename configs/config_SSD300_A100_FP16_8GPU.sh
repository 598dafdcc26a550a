# SSD300, DGX A100, 1 node x 8 GPUs x 128 images: global batch 1024.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP16_8GPU.sh.
# Expected: mAP .25 to .27, 0:43 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-128} WALLTIME_RUNANDTIME=120
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia_1024.sh" --precision fp16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
