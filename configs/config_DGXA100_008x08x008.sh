# DGX A100, 8 nodes x 8 GPUs x 8 images: global batch 512.
# Recipe: published by MLCommons; learning rate and warm-up are those of its convergence table for this batch.
# Expected: 5 epochs in all 20 runs of that table (published by MLCommons); no time is published. Not measured here.

export BENCHMARK=single_stage_detector

export BATCHSIZE=${BATCHSIZE:-8}
export EVALBATCHSIZE=${EVALBATCHSIZE:-32}
export NUMEPOCHS=${NUMEPOCHS:-8}
export LR=${LR:-0.0001}
export WARMUP_EPOCHS=${WARMUP_EPOCHS:-1}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--workers 12"}

export DGXNNODES=8
export DGXNGPU=8
export DGXSOCKETCORES=64
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=45

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
