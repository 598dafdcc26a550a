# DGX A100, 1 node x 8 GPUs x 32 images: global batch 256.
# Recipe: published by MLCommons as the reference's for this system.
# Expected: 84.4 minutes (published by NVIDIA, v2.0), 4 to 5 epochs; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-32} WALLTIME_RUNANDTIME=150
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/reference.sh" --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
