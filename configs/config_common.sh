# Sourced at the end of every config_<system>.sh: what is the same on all systems, and what follows from their exports.

export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-1}
export NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0}
export NCCL_LOCAL_REGISTER=${NCCL_LOCAL_REGISTER:-0}

# The system's name is that of the file which sources this one.
DGXSYSTEM=$(basename "${BASH_SOURCE[1]}" .sh)
export DGXSYSTEM=${DGXSYSTEM#config_}

# Minutes. One run takes longer with locked clocks; a job has NEXP runs, each with a pause, and its own start.
if [[ ${SET_MAXQ_CLK:-0} == 1 ]]; then
    WALLTIME_RUNANDTIME=$((WALLTIME_RUNANDTIME + WALLTIME_RUNANDTIME / 2))
elif [[ ${SET_MINEDP_CLK:-0} == 1 ]]; then
    WALLTIME_RUNANDTIME=$((WALLTIME_RUNANDTIME + WALLTIME_RUNANDTIME / 3))
fi
export WALLTIME_RUNANDTIME
export WALLTIME=$((12 + ${NEXP:-1} * (WALLTIME_RUNANDTIME + 5)))
