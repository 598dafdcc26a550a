# EfficientDet-D0, DGX-1 V100, 1 node x 8 GPUs x 30 images: global batch 240.
# Recipe: published by NVIDIA, scripts/D0/train_FP32_8xV100-32G.sh, which had --amp by mistake.
# Expected: mAP .3410, 16 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-30} LR=${LR:-0.375} WARMUP_EPOCHS=${WARMUP_EPOCHS:-20} WALLTIME_RUNANDTIME=1440
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp32 --workers 4 --lr-noise 0.4,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
