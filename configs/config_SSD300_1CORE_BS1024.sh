# SSD300 on a TPU, 1 core x 128 images x 8 micro-batches: global batch 1024.
# 115 iterations of 8 micro-batches an epoch of COCO 2017, then one of 4.
# Recipe: published by the author of the original's fork for TPUs.
# Expected: 16 hours, mAP .257 (published for a TPU of 2021, with 115 steps of warm-up).
# Not measured here, where there is no TPU: docs/tpu.md says what was.

source "$(dirname "${BASH_SOURCE[0]}")/systems/tpu.sh"
export DGXNNODES=1 WARMUP_STEPS=${WARMUP_STEPS:-300} LOG_INTERVAL=${LOG_INTERVAL:-16} WALLTIME_RUNANDTIME=1200
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/tpu.sh" fp32 8 --accumulate 8
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
