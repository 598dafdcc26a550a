# EfficientDet-D0, DGX-1 V100, 4 nodes x 8 GPUs x 60 images: global batch 1920.
# Recipe: published by NVIDIA, scripts/D0/train_AMP_32xV100-32G.sub.
# Expected: mAP .3373, 4:57 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=4 BATCHSIZE=${BATCHSIZE:-60} LR=${LR:-2.42} WARMUP_EPOCHS=${WARMUP_EPOCHS:-90} WALLTIME_RUNANDTIME=480
export NUMEPOCHS=${NUMEPOCHS:-400} SEED=${SEED:-31}
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp16 --workers 4 --lr-noise 0.55,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
