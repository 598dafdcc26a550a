# SSD300, DGX A100, 1 node x 4 GPUs x 64 images: global batch 256.
# Recipe: published by NVIDIA in its tables; its script SSD300_A100_TF32_4GPU.sh does not exist. BATCHSIZE=128 is its other row.
# Expected: mAP .25, 3:00 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 DGXNGPU=4 BATCHSIZE=${BATCHSIZE:-64} WALLTIME_RUNANDTIME=360
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia.sh" --precision tf32 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
