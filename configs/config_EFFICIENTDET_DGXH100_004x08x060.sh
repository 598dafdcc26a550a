# EfficientDet-D0, DGX H100, 4 nodes x 8 GPUs x 60 images: global batch 1920.
# Recipe: published by NVIDIA for 32 V100, scripts/D0/train_AMP_32xV100-32G.sub, with bf16.
# Expected: mAP .337 to .342, nobody published a time; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=4 BATCHSIZE=${BATCHSIZE:-60} LR=${LR:-2.42} WARMUP_EPOCHS=${WARMUP_EPOCHS:-90} WALLTIME_RUNANDTIME=240
export NUMEPOCHS=${NUMEPOCHS:-400} SEED=${SEED:-31}
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision bf16 --workers 12 --lr-noise 0.55,0.9
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
