# EfficientDet-D0, speed of training, 1 node x 8 GPUs x 60 images: global batch 480.
# Recipe: published by NVIDIA, scripts/D0/train-benchmark_AMP_V100-32G.sh.
# Expected: 1040 images/s on 8 GPUs (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-60} WALLTIME_RUNANDTIME=30
source "$(dirname "${BASH_SOURCE[0]}")/../efficientdet/recipes/d0.sh" --precision fp16 --workers 4 --mode benchmark-training --benchmark-iterations 500
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
