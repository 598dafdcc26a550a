# RetinaNet as published by MLCommons. 256 images a step: mAP .195 .280 .320 .344 after epochs 1 to 4; 4 epochs in 147 of 165
# published runs, else 5. A config sources it with options of the program as arguments: reference.sh --workers 12
export BENCHMARK=single_stage_detector
export EVALBATCHSIZE=${EVALBATCHSIZE:-32} NUMEPOCHS=${NUMEPOCHS:-8} LR=${LR:-0.0001} WARMUP_EPOCHS=${WARMUP_EPOCHS:-1}
export EXTRA_PARAMS=${EXTRA_PARAMS:-$*}
