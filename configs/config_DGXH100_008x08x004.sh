# DGX H100, 8 nodes x 8 GPUs x 4 images: global batch 256.
# Recipe: published by NVIDIA. Its runs used SHARP, which a fabric that has it offers with NCCL_COLLNET_ENABLE=1.
# Expected: 6.0 minutes (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=8 MAXQ_CLK=1410 MINEDP_CLK=1830 WALLTIME_RUNANDTIME=30
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/nvidia_8_nodes.sh" --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
