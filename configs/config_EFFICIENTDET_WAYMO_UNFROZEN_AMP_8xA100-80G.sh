# EfficientDet-D0 at 1536 pixels on Waymo, DGX A100, 1 node x 8 GPUs x 8 images: global batch 64.
# Recipe: published by NVIDIA, scripts/waymo/train_waymo_AMP_8xA100-80G.sh, nothing frozen.
# Expected: L2_ALL_NS .512 (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-8} WALLTIME_RUNANDTIME=2880
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/waymo.sh" --precision fp16 --workers 14
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
