# Mask R-CNN, FP32, DGX-1, 1 node x 8 GPUs x 2 images: global batch 16.
# Recipe: published by NVIDIA, the schedule of its README (configs/e2e_mask_rcnn_R_50_FPN_1x.yaml).
# Expected: box AP .377, mask AP .342, 6:21 hours (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-2} LR=${LR:-0.02} WALLTIME_RUNANDTIME=600
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/coco.sh" --config-file configs/e2e_mask_rcnn_R_50_FPN_1x.yaml --precision fp32
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
