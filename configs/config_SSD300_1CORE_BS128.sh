# SSD300 on a TPU, 1 core x 128 images: global batch 128.
# 924 iterations an epoch of COCO 2017.
# Recipe: published by the author of the original's fork for TPUs.
# Expected: 16 hours, 145 images/s, mAP .259 (published for a TPU of 2021).
# Not measured here, where there is no TPU: docs/tpu.md says what was.

source "$(dirname "${BASH_SOURCE[0]}")/systems/tpu.sh"
export DGXNNODES=1 WARMUP_STEPS=${WARMUP_STEPS:-924} LOG_INTERVAL=${LOG_INTERVAL:-10} WALLTIME_RUNANDTIME=1200
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/tpu.sh" fp32 4
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
