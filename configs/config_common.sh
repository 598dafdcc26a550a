# Sourced at the end of every config_<system>.sh: what is the same on all systems, and what follows from their exports.

# A config sourced before in this shell (DGXSYSTEM names it) would have its values stand in for this one's: those that it
# set and nobody has changed are taken back, then this one is read again.
config_taken_back() { # CONFIG
    local earlier taken="" entry name
    earlier=$(dirname "$1")/config_${DGXSYSTEM:-}.sh
    [[ -f $earlier && ! $earlier -ef $1 ]] || return 1
    while IFS= read -r -d "" entry; do
        name=${entry%%=*}
        [[ $name =~ ^[A-Z][A-Z0-9_]*$ && $name != PATH && ${!name-} == "${entry#*=}" ]] || continue
        unset "$name" && taken+=" $name"
    done < <(env -i PATH="$PATH" bash --noprofile --norc -c "unset PWD OLDPWD SHLVL; source ${earlier@Q} && env -0")
    unset DGXSYSTEM
    echo "${1##*/}: taken back what ${earlier##*/} had set:$taken" >&2
}
if config_taken_back "${BASH_SOURCE[1]}"; then
    # shellcheck disable=SC1090  # the config that sources this
    source "${BASH_SOURCE[1]}"
    return
fi
unset -f config_taken_back

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
