# EfficientDet-D0, DGX-1 V100, 1 node x 8 GPUs x 60 images: global batch 480.
# Recipe: published by NVIDIA, scripts/D0/train_AMP_8xV100-32G.sh.
# Expected: mAP .3413, 10:30 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-60} LR=${LR:-0.65} WARMUP_EPOCHS=${WARMUP_EPOCHS:-20} WALLTIME_RUNANDTIME=900
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp16 --workers 4 --lr-noise 0.4,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
