# SSD300 on a TPU, 8 cores x 128 images: global batch 1024.
# 115 iterations an epoch of COCO 2017.
# Recipe: that of 1CORE_BS1024, published by the author of the original's fork for TPUs, on eight cores with a shard
# each.
# Expected: no time was published for a run that trains; 1,600 images/s for the fork's fake data.
# Not measured here, where there is no TPU: docs/tpu.md says what was.

source "$(dirname "${BASH_SOURCE[0]}")/systems/tpu.sh"
export DGXNNODES=1 WARMUP_STEPS=${WARMUP_STEPS:-300} LOG_INTERVAL=${LOG_INTERVAL:-16} WALLTIME_RUNANDTIME=300
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/tpu.sh" bf16 8 --num-cores 8
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
