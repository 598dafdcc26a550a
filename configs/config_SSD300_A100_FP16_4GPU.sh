# SSD300, DGX A100, 1 node x 4 GPUs x 256 images: global batch 1024.
# Recipe: published by NVIDIA, examples/SSD300_A100_FP16_4GPU.sh.
# Expected: mAP .25 to .27, 1:30 hours with 128 images a GPU (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXA100.sh"
export DGXNNODES=1 DGXNGPU=4 BATCHSIZE=${BATCHSIZE:-256} WALLTIME_RUNANDTIME=240
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia_1024.sh" --precision fp16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
