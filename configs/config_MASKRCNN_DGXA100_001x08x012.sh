# Mask R-CNN, MLPerf 3.1, DGX A100, 1 node x 8 GPUs x 12 images: global batch 96.
# Recipe: published by NVIDIA, its config_DGXH100.sh of training_results_v3.1, which partners ran on 8 A100.
# Expected: 14 epochs, 38 to 44 minutes (published by NVIDIA and partners); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-12} LR=${LR:-0.12} WARMUP_STEPS=${WARMUP_STEPS:-625} WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/mlperf.sh" SOLVER.STEPS 12000,16000 SOLVER.MAX_ITER 40000 \
    SOLVER.WARMUP_FACTOR 0.000192 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
