# SSD300 on a TPU, 8 cores x 128 images: global batch 1024.
# 115 iterations an epoch of COCO 2017.
# Recipe: that of 1CORE_BS1024, published by the author of the original's fork for TPUs, on eight cores with a shard
# each.
# Expected: no time was published for a run that trains; 1,600 images/s for the fork's fake data.
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
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--device tpu --precision bf16 --workers 8 --save {output}/checkpoints \
--json-summary {output}/summary.json --num-cores 8"}

export DGXNNODES=1
export DGXNGPU=1 # the program itself starts the processes of the cores
export DGXSOCKETCORES=48
export DGXNSOCKET=2
export DGXHT=2
export WALLTIME_RUNANDTIME=300

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
