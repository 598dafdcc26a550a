# SSD300, speed of inference, 1 node x 1 GPU x 64 images: global batch 64.
# Recipe: published by NVIDIA, examples/SSD300_FP16_INFERENCE_BENCHMARK.sh. Random weights find far more than
# trained ones, and are slower for it: ./run_and_time.sh --checkpoint FILE.
# Expected: 438.85 images/s on a V100, 910.17 on an A100 (batch 32), without decoding (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-64} WALLTIME_RUNANDTIME=15
export BENCHMARK=ssd300 EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp16 --workers 4 --mode benchmark-inference --no-pretrained"}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
