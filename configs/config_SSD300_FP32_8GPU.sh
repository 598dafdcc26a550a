# SSD300, DGX-1 V100, 1 node x 8 GPUs x 32 images: global batch 256.
# Recipe: published by NVIDIA, examples/SSD300_FP32_8GPU.sh.
# Expected: mAP .25, 2:37 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-32} WALLTIME_RUNANDTIME=300
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia.sh" --precision fp32 --workers 4
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
