# The processors of this machine, without a GPU.
export DGXNGPU=1 DGXNSOCKET=1 DGXHT=1
DGXSOCKETCORES=$(nproc)
export DGXSOCKETCORES
export MLPERF_SUBMISSION_PLATFORM=${MLPERF_SUBMISSION_PLATFORM:-"$(nproc) CPU cores $(uname -m)"}
# Threads spin only briefly while they wait: without a limit, one other busy process on these cores slows training tenfold.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
