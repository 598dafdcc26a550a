# SSD300 on a TPU, 1 core x 128 images x 16 micro-batches: global batch 2048.
# 57 iterations of 16 micro-batches an epoch of COCO 2017, then one of 12.
# Recipe: published by the author of the original's fork for TPUs.
# Expected: 16 hours; no mAP was published.
# Not measured here, where there is no TPU: docs/tpu.md says what was.

source "$(dirname "${BASH_SOURCE[0]}")/systems/tpu.sh"
export DGXNNODES=1 WARMUP_STEPS=${WARMUP_STEPS:-300} LOG_INTERVAL=${LOG_INTERVAL:-16} WALLTIME_RUNANDTIME=1200
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/tpu.sh" fp32 8 --accumulate 16
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
