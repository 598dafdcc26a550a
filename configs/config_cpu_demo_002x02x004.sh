# The demonstration of config_cpu_demo.sh as 2 nodes x 2 ranks x 4 images: global batch 16. For trying a Slurm cluster.
# Expected: AP 0.2 after about 5 epochs, where config_cpu_demo.sh goes on to 0.42. No MLPerf result.
# Division open: the model, the image size and the data set are not the benchmark's. Caches are dropped by run.sub.

export BENCHMARK=single_stage_detector

export DATASET_DIR=${DATASET_DIR:-build/demo-data}
export BATCHSIZE=${BATCHSIZE:-4}
export EVALBATCHSIZE=${EVALBATCHSIZE:-45}
export NUMEPOCHS=${NUMEPOCHS:-14}
export LR=${LR:-0.0007}
export LOG_INTERVAL=${LOG_INTERVAL:-10}
export WARMUP_EPOCHS=${WARMUP_EPOCHS:-0.4}
export EXTRA_PARAMS=${EXTRA_PARAMS:-"--dataset custom --backbone resnet18 --norm batch --trainable-backbone-layers 5 \
--no-pretrained --fpn-channels 64 --head-convs 1 --image-size 128 128 --anchor-sizes 16,32,64,128,256 --max-boxes 32 \
--ema-decay 0.98 --target-map 0.2 --workers 1 --device cpu \
--precision $(grep -qsm1 amx_bf16 /proc/cpuinfo && echo bf16 || echo fp32)"} # bf16 where the processor multiplies it fast

# Threads spin only briefly while they wait: without a limit, one other busy process on these cores slows training tenfold.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}

export MLPERF_DIVISION=${MLPERF_DIVISION:-open}
export MLPERF_SUBMISSION_ORG=${MLPERF_SUBMISSION_ORG:-demonstration}
export MLPERF_SUBMISSION_PLATFORM=${MLPERF_SUBMISSION_PLATFORM:-"$(nproc) CPU cores $(uname -m)"}

export DGXNNODES=2
export DGXNGPU=2
DGXSOCKETCORES=$(nproc)
export DGXSOCKETCORES
export DGXNSOCKET=1
export DGXHT=1
export WALLTIME_RUNANDTIME=20

source "$(dirname "${BASH_SOURCE[0]}")/config_common.sh"
