# Mask R-CNN, AMP, DGX A100, 1 node x 8 GPUs x 12 images: global batch 96.
# Recipe: published by NVIDIA, scripts/train.sh of its last version.
# Expected: box AP .3763, mask AP .3417, 1:51 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-12} LR=${LR:-0.12} WARMUP_STEPS=${WARMUP_STEPS:-800} WALLTIME_RUNANDTIME=240
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/coco.sh" --config-file configs/e2e_mask_rcnn_R_50_FPN_1x_bs96.yaml --precision fp16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
