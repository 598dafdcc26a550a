# EfficientDet-D0, DGX A100, 1 node x 8 GPUs x 150 images: global batch 1200.
# Recipe: published by NVIDIA, scripts/D0/train_AMP_8xA100-80G.sh.
# Expected: mAP .3407, 6:30 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-150} LR=${LR:-1.63} WARMUP_EPOCHS=${WARMUP_EPOCHS:-50} WALLTIME_RUNANDTIME=600
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp16 --workers 14 --lr-noise 0.4,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
