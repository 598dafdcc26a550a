# A demonstration on two CPU cores: a small SSD300 from random weights on generated scenes of six shapes (make demo-ssd300).
# Measured in fp32 without AVX-512: AP 0.280 after 3 epochs, 4:04 minutes; one thread beside other work 9:37 (docs/LOG.md).
# Beside other work OMP_NUM_THREADS=1 is faster: two threads wait for each other.
# No published result to compare it with.

source "$(dirname "${BASH_SOURCE[0]}")/systems/cpu.sh"
export BENCHMARK=ssd300 DGXNNODES=1 WALLTIME_RUNANDTIME=20
export DATASET_DIR=${DATASET_DIR:-build/demo-data-ssd300} BATCHSIZE=${BATCHSIZE:-8} EVALBATCHSIZE=${EVALBATCHSIZE:-20}
export NUMEPOCHS=${NUMEPOCHS:-8} LR=${LR:-0.004} WARMUP_STEPS=${WARMUP_STEPS:-20} LOG_INTERVAL=${LOG_INTERVAL:-10}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--dataset custom --backbone resnet18_x0_25 --no-pretrained --optimizer adam --weight-decay 0 \
--multistep 6 --ema-decay 0.98 --augmentation flip --max-boxes 32 --evaluation 0 1 2 3 4 5 6 7 --target-map 0.2 --workers 1 \
--drop-file-cache --gallery 12 --overwrite --device cpu \
--precision $(grep -qsm1 amx_bf16 /proc/cpuinfo && echo bf16 || echo fp32)"} # bf16 where it is fast
export MLPERF_SUBMISSION_ORG=${MLPERF_SUBMISSION_ORG:-demonstration}
source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
