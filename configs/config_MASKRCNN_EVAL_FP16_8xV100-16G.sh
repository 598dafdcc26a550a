# Mask R-CNN, evaluation with a checkpoint, FP16, 1 node x 8 GPUs x 1 image: global batch 8.
# Recipe: published by NVIDIA, scripts/eval.sh.
# Expected: the AP that its training had, .377 and .342 as published by NVIDIA; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/checkpoint.sh" --precision fp16
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
