# SSD300, DGX A100, 1 node x 1 GPU x 256 images: global batch 256.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP16_1GPU.sh.
# Expected: mAP .26 to .27, 2:57 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-256} WALLTIME_RUNANDTIME=480
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia.sh" --precision fp16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
