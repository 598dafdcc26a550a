# SSD300, DGX A100, 1 node x 1 GPU x 64 images: global batch 64.
# Recipe: published by NVIDIA in its tables; its script SSD300_A100_TF32_1GPU.sh does not exist. BATCHSIZE=128 is its other row.
# Expected: mAP .25, 16:00 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-64} WALLTIME_RUNANDTIME=1440
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia.sh" --precision tf32 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
