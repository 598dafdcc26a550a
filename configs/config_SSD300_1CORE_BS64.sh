# SSD300 on a TPU, 1 core x 64 images: global batch 64.
# 1848 iterations an epoch of COCO 2017.
# Recipe: that of BS128, published by the author of the original's fork for TPUs, with another batch; its README names
# it.
# Expected: no time and no mAP were published.
# Not measured here, where there is no TPU: docs/tpu.md says what was.

source "$(dirname "${BASH_SOURCE[0]}")/systems/tpu.sh"
export DGXNNODES=1 WALLTIME_RUNANDTIME=1200
export BATCHSIZE=${BATCHSIZE:-64} EVALBATCHSIZE=${EVALBATCHSIZE:-64} WARMUP_STEPS=${WARMUP_STEPS:-1848} LOG_INTERVAL=${LOG_INTERVAL:-10}
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/tpu.sh" fp32 4
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
