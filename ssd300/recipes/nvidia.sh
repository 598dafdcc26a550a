# SSD300 as the scripts published by NVIDIA train it (examples/SSD300_*.sh). A config sources it with options of the program as
# arguments: nvidia.sh --precision fp16 --workers 4
export BENCHMARK=ssd300
export NUMEPOCHS=${NUMEPOCHS:-65} LR=${LR:-0.0026} WARMUP_STEPS=${WARMUP_STEPS:-300} # LR is that of 32 images
export EXTRA_PARAMS=${EXTRA_PARAMS:-$*}
