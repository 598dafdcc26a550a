# Mask R-CNN, speed of inference, FP32, 1 node x 1 GPU x 1 image: global batch 1.
# Recipe: published by NVIDIA, scripts/inference_benchmark.sh; other batches: EVALBATCHSIZE=8 after sourcing.
# Expected: 15.3 images/s in batches of 8 (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../maskrcnn/recipes/checkpoint.sh" --precision fp32 --skip-eval
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
