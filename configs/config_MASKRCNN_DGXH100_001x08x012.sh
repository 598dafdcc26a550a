# Mask R-CNN, MLPerf 3.1, DGX H100, 1 node x 8 GPUs x 12 images: global batch 96.
# Recipe: published by NVIDIA, its config_DGXH100.sh of training_results_v3.1.
# Expected: 14 epochs, 19.2 minutes, 187 images/s a GPU (published by NVIDIA and partners); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-12} LR=${LR:-0.12} WARMUP_STEPS=${WARMUP_STEPS:-625} MAXQ_CLK=1275 MINEDP_CLK=1635 WALLTIME_RUNANDTIME=45
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/mlperf.sh" SOLVER.STEPS 12000,16000 SOLVER.MAX_ITER 40000 \
    SOLVER.WARMUP_FACTOR 0.000192 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
