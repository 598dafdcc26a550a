# DGX H200, 1 node x 8 GPUs x 32 images: global batch 256.
# Recipe: published by NVIDIA (v4.1), the same as for DGX H100.
# Expected: 34.3 minutes (published by NVIDIA, v4.0); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH200.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-32} MAXQ_CLK=1260 MINEDP_CLK=1620 WALLTIME_RUNANDTIME=80
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/nvidia.sh" --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
