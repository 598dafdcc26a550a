# SSD300, DGX A100, 1 node x 8 GPUs x 128 images: global batch 1024.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP32_8GPU.sh.
# Expected: mAP .25 to .27, 1:20 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-128} WALLTIME_RUNANDTIME=180
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia_1024.sh" --precision tf32 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
