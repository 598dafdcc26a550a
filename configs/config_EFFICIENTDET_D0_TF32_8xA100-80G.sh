# EfficientDet-D0, DGX A100, 1 node x 8 GPUs x 80 images: global batch 640.
# Recipe: published by NVIDIA, scripts/D0/train_TF32_8xA100-80G.sh.
# Expected: mAP .3399, 8:34 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-80} LR=${LR:-0.9} WARMUP_EPOCHS=${WARMUP_EPOCHS:-50} WALLTIME_RUNANDTIME=780
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision tf32 --workers 14 --lr-noise 0.4,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
