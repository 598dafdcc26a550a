# Mask R-CNN, MLPerf 3.1, DGX H100, 8 nodes x 8 GPUs x 4 images: global batch 256.
# Recipe: published by NVIDIA, its config_DGXH100_multi_8x8x4.sh of training_results_v3.1.
# Expected: 17 epochs, those of the reference convergence points published by MLCommons; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=8 BATCHSIZE=${BATCHSIZE:-4} LR=${LR:-0.24} WARMUP_STEPS=${WARMUP_STEPS:-2300} MAXQ_CLK=1185 MINEDP_CLK=1485 \
    WALLTIME_RUNANDTIME=30
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/mlperf.sh" SOLVER.STEPS 6125,8000 SOLVER.MAX_ITER 20000 \
    SOLVER.WARMUP_FACTOR 0.00010434782608695652 MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 1000 MODEL.RPN.FPN_POST_NMS_PER_BATCH False \
    --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
