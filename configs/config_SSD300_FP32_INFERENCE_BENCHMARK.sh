# SSD300, speed of inference, 1 node x 1 GPU x 32 images: global batch 32.
# Recipe: published by NVIDIA, examples/SSD300_FP32_INFERENCE_BENCHMARK.sh. Random weights find far more than
# trained ones, and are slower for it: ./run_and_time.sh --checkpoint FILE.
# Expected: 271.73 images/s on a V100 (batch 32), without decoding (published by NVIDIA); not measured here.

source "$(dirname "${BASH_SOURCE[0]}")/systems/DGX1.sh"
export DGXNNODES=1 DGXNGPU=1 BATCHSIZE=${BATCHSIZE:-32} WALLTIME_RUNANDTIME=15
export BENCHMARK=ssd300 EXTRA_PARAMS=${EXTRA_PARAMS:-"--precision fp32 --workers 4 --mode benchmark-inference --no-pretrained"}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
