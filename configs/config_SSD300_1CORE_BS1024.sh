# SSD300 on a TPU, 1 core x 128 images x 8 micro-batches: global batch 1024.
# 115 iterations of 8 micro-batches an epoch of COCO 2017, then one of 4.
# Recipe: published by the author of the original's fork for TPUs.
# Expected: 16 hours, mAP .257 (published for a TPU of 2021, with 115 steps of warm-up).
# Not measured here, where there is no TPU: docs/tpu.md says what was.

export BENCHMARK=ssd300

export DATASET_DIR=${DATASET_DIR:-${DATA_DIR:-${COCO_DIR:-/datasets/coco2017}}}
export BATCHSIZE=${BATCHSIZE:-128}
export EVALBATCHSIZE=${EVALBATCHSIZE:-128}
export NUMEPOCHS=${NUMEPOCHS:-65}
export LR=${LR:-0.0026} # of 32 images; scaled by those of a step
export WARMUP_STEPS=${WARMUP_STEPS:-300}
export LOG_INTERVAL=${LOG_INTERVAL:-16}
export SEED=${SEED:-42}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--device tpu --precision fp32 --workers 8 --save {output}/checkpoints \
--json-summary {output}/summary.json --accumulate 8"}

export DGXNNODES=1
export DGXNGPU=1
export DGXSOCKETCORES=48
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=1200

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
