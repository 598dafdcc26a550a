# Mask R-CNN, MLPerf 3.1, DGX H100, 32 nodes x 8 GPUs x 1 image: global batch 256.
# Recipe: published by NVIDIA, its config_DGXH100_oldhp_48x8x1.sh of training_results_v3.1: 32 nodes train there too, and
# 16 more do nothing but evaluate; here the 32 evaluate between the epochs.
# Expected: 17 epochs, 1.47 minutes with the 16 further nodes (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=32 BATCHSIZE=${BATCHSIZE:-1} LR=${LR:-0.24} WARMUP_STEPS=${WARMUP_STEPS:-1800} WALLTIME_RUNANDTIME=20
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/mlperf.sh" SOLVER.STEPS 5625,7500 SOLVER.MAX_ITER 20000 \
    SOLVER.WARMUP_FACTOR 0.000133 MODEL.RPN.FPN_POST_NMS_TOP_N_TRAIN 1000 MODEL.RPN.FPN_POST_NMS_PER_BATCH False --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
