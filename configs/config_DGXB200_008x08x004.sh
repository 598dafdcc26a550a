# DGX B200, 8 nodes x 8 GPUs x 4 images: global batch 256.
# Recipe: none is published for this system; it is that of DGXH100_008x08x004, published by NVIDIA. The clocks are those
# published for one node of this system.
# Expected: not known for this system (DGX H100: 6.0 minutes, published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXB200.sh"
export DGXNNODES=8 MAXQ_CLK=1260 MINEDP_CLK=1620 WALLTIME_RUNANDTIME=30
source "$(dirname "${BASH_SOURCE[0]}")/../single_stage_detector/recipes/nvidia_8_nodes.sh" --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
