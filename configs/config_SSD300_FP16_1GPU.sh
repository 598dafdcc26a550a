# SSD300, DGX-1 V100, 1 node x 1 GPU x 64 images: global batch 64.
# Recipe: published by NVIDIA, examples/SSD300_FP16_1GPU.sh.
# Expected: mAP .25, 9:28 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-64} WALLTIME_RUNANDTIME=960
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia.sh" --precision fp16 --workers 4
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
