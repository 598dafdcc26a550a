# EfficientDet-D0, inference with a checkpoint, 1 node x 1 GPU x 8 images: global batch 8.
# Recipe: published by NVIDIA, scripts/D0/inference_FP32_V100-32G.sh.
# Expected: 38.81 images/s (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0_checkpoint.sh" --precision fp32 --workers 4 --mode evaluate --inference --results '{output}/results.json'
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
