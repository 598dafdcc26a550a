# A checkpoint of EfficientDet-D0 on the validation images, as the scripts published by NVIDIA do it with batches of 8
# (scripts/D0/validation_*.sh, inference_*.sh). Say which: ./run_and_time.sh --checkpoint FILE
# Arguments: options of the program, as d0_checkpoint.sh --precision fp16
export BENCHMARK=efficientdet BATCHSIZE=${BATCHSIZE:-8} EVALBATCHSIZE=${EVALBATCHSIZE:-8}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--use-ema --dllogger-file {output}/log.json $*"}
