# DGX A100, 8 nodes x 8 GPUs x 8 images: global batch 512.
# Recipe: published by MLCommons; learning rate and warm-up are those of its convergence table for this batch.
# Expected: 5 epochs in all 20 runs of that table (published by MLCommons); no time is published. Not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=8 BATCHSIZE=${BATCHSIZE:-8} WALLTIME_RUNANDTIME=45
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/reference.sh" --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
