# SSD300, DGX H100, 1 node x 8 GPUs x 128 images: global batch 1024.
# Recipe: published by NVIDIA for 8 A100, examples/SSD300_A100_FP16_8GPU.sh, with bf16.
# Expected: mAP .25 to .27, nobody published a time; not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGXH100.sh"
export DGXNNODES=1 BATCHSIZE=${BATCHSIZE:-128} WALLTIME_RUNANDTIME=60
source "$(dirname "${BASH_SOURCE[0]}")/../ssd300/recipes/nvidia_1024.sh" --precision bf16 --workers 12
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
