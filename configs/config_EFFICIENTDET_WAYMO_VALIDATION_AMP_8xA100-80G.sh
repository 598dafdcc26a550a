# EfficientDet-D0 on Waymo, evaluation of a checkpoint, DGX A100, 1 node x 8 GPUs x 10 images: global batch 80.
# Recipe: published by NVIDIA, scripts/waymo/validation_AMP_8xA100-80G.sh.
# Expected: L2_ALL_NS .504 with the weights published by NVIDIA; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-10} EVALBATCHSIZE=${EVALBATCHSIZE:-10} WALLTIME_RUNANDTIME=240
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0_checkpoint.sh" --precision fp16 --workers 14 --mode evaluate --waymo --dataset waymo --input-size 1536
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
