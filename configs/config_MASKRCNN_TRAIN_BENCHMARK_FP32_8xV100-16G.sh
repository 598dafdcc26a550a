# Mask R-CNN, speed of training, FP32, DGX-1, 1 node x 8 GPUs x 4 images: global batch 32.
# Recipe: published by NVIDIA, scripts/train_benchmark.sh.
# Expected: 62.7 images/s (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-4} LR=${LR:-0.04} WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/coco.sh" --config-file configs/e2e_mask_rcnn_R_50_FPN_1x_bs32_2014.yaml --precision fp32 \
    SOLVER.MAX_ITER 3665 SOLVER.STEPS 30000,40000 --skip-test
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
