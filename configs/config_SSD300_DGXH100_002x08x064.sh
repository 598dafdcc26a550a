# SSD300, DGX H100, 2 nodes x 8 GPUs x 64 images: global batch 1024.
# Recipe: published by NVIDIA for 8 A100, examples/SSD300_A100_FP16_8GPU.sh: the same global batch, with bf16.
# Expected: mAP .25 to .27, nobody published a time; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=2 BATCHSIZE=${BATCHSIZE:-64} WALLTIME_RUNANDTIME=45
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia_1024.sh" --precision bf16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
