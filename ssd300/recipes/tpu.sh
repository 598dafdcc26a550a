# SSD300 as published by the author of the original's fork for TPUs. Arguments: precision, loader processes, then more
# options of the program, as in tpu.sh fp32 8 --accumulate 8
export BENCHMARK=ssd300 DATASET_DIR=${DATASET_DIR:-${DATA_DIR:-${COCO_DIR:-/datasets/coco2017}}} SEED=${SEED:-42}
export BATCHSIZE=${BATCHSIZE:-128} EVALBATCHSIZE=${EVALBATCHSIZE:-128}
export NUMEPOCHS=${NUMEPOCHS:-65} LR=${LR:-0.0026} # of 32 images; scaled by those of a step
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--device tpu --precision $1 --workers $2 --save {output}/checkpoints \
--json-summary {output}/summary.json${3:+ ${*:3}}"}
