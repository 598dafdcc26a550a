# EfficientDet-D0, DGX-1 V100, 4 nodes x 8 GPUs x 30 images: global batch 960.
# Recipe: published by NVIDIA, scripts/D0/train_FP32_32xV100-32G.sub.
# Expected: mAP .3418, 6 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=4 BATCHSIZE=${BATCHSIZE:-30} LR=${LR:-1.5} WARMUP_EPOCHS=${WARMUP_EPOCHS:-120} WALLTIME_RUNANDTIME=600
export NUMEPOCHS=${NUMEPOCHS:-400} SEED=${SEED:-31}
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp32 --workers 4 --lr-noise 0.55,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
