# DGX H200, 8 nodes x 8 GPUs x 4 images: global batch 256.
# Recipe: none is published for this system; it is that of DGXH100_008x08x004, published by NVIDIA.
# Expected: not known for this system (DGX H100: 6.0 minutes, published by NVIDIA); not measured here.
# mAP after epochs 1 to 4 with this recipe: .195 .280 .320 .344; 4 epochs in 147 of 165 published runs, else 5.
# 4 images a GPU are little work: the processor that starts the kernels may well be the limit (not measured). --graphs on,
# untried on several GPUs, records the step: EXTRA_PARAMS="--workers 12 --graphs on".

export BENCHMARK=single_stage_detector

export BATCHSIZE=${BATCHSIZE:-4}
export EVALBATCHSIZE=${EVALBATCHSIZE:-32}
export NUMEPOCHS=${NUMEPOCHS:-6}
export LR=${LR:-0.0001}
export WARMUP_EPOCHS=${WARMUP_EPOCHS:-1}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--workers 12"}

export DGXNNODES=8
export DGXNGPU=8
export DGXSOCKETCORES=56
export DGXNSOCKET=2
export DGXHT=2
export MAXQ_CLK=1410
export MINEDP_CLK=1830
export WALLTIME_RUNANDTIME=30

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
