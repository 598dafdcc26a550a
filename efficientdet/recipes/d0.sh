# EfficientDet-D0 as the scripts published by NVIDIA train it (scripts/D0/train_*.sh). A config sets LR and WARMUP_EPOCHS
# and sources it with options of the program as arguments: d0.sh --precision fp16 --workers 14 --lr-noise 0.4,0.9
export BENCHMARK=efficientdet SEED=${SEED:-12711}
export NUMEPOCHS=${NUMEPOCHS:-300} LR=${LR:-1.63} WARMUP_EPOCHS=${WARMUP_EPOCHS:-50} # LR is that of a step of all images
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--model efficientdet_d0 --sync-bn --ema-decay 0.999 --eval-after 200 \
--dllogger-file {output}/log.json${*:+ $*}"}
