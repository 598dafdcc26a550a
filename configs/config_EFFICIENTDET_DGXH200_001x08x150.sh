# EfficientDet-D0, DGX H200, 1 node x 8 GPUs x 150 images: global batch 1200.
# Recipe: published by NVIDIA for 8 A100, scripts/D0/train_AMP_8xA100-80G.sh, with bf16.
# Expected: mAP .34, nobody published a time; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH200.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-150} LR=${LR:-1.63} WARMUP_EPOCHS=${WARMUP_EPOCHS:-50} WALLTIME_RUNANDTIME=480
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision bf16 --workers 12 --lr-noise 0.4,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
