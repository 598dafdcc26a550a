#!/usr/bin/env bash
# Starts one rank of a benchmark with the variables of a config, times it and ends with its exit code.
#
#   source configs/config_<system>.sh
#   ./run_and_time.sh [options of the program, after those of EXTRA_PARAMS]
#
# {output} in a word of EXTRA_PARAMS stands for the run's folder: --output-dir or --output, else OUTPUT_DIR, else the
# program's default.
# Under srun or mpirun, call it once for each GPU. Without them, where DGXNGPU is more than 1, it starts all ranks of this
# machine through torchrun, which turns every failure of a rank into exit code 1. On several machines (DGXNNODES) without
# srun, call it once on each, with NODE_RANK=0..., and MASTER_ADDR and MASTER_PORT the same everywhere.
#
# PYTHON: the interpreter (default: python, else python3). BIND=1: run on the cores of the GPU's socket.
# EXITS_FILE: gets the line "rank host exit-code unix-seconds" at the end (run.sub reads it), however that comes.
# SIGTERM, SIGUSR1, SIGINT and SIGHUP reach the program, which writes a checkpoint and ends with code 4. SIGQUIT makes
# each of several ranks print its stacks, where srun or mpirun started them (torchrun would end with it).
set -euo pipefail

fail() {
    echo "run_and_time.sh: $*" >&2
    exit 2
}

# bound_cpus LOCAL_RANK: the cores of this rank's socket as numactl counts them: sockets one after the other, then the
# second hardware thread of each core in the same order.
bound_cpus() {
    local sockets=${DGXNSOCKET:-1} cores=${DGXSOCKETCORES:?is unset; a config sets it, BIND=1 needs it}
    local socket=$(($1 * sockets / gpus))
    local first=$((socket * cores))
    local cpus="$first-$((first + cores - 1))"
    if [[ ${DGXHT:-1} == 2 ]]; then
        first=$((first + sockets * cores))
        cpus+=",$first-$((first + cores - 1))"
    fi
    echo "$cpus"
}

# leave CODE: the line of EXITS_FILE, whatever ends this script, also before the program starts.
# shellcheck disable=SC2329  # the trap calls it
leave() {
    [[ -n ${EXITS_FILE:-} ]] || return 0
    echo "$rank $host $1 $(date +%s)" >>"$EXITS_FILE" || echo "run_and_time.sh: $EXITS_FILE can't be written" >&2
}

gpus=${DGXNGPU:-1}
host=${SLURMD_NODENAME:-${HOSTNAME:-unknown}}
rank=0
launched=1
if [[ -n ${RANK:-} ]]; then
    rank=$RANK local_rank=${LOCAL_RANK:-0}
elif [[ -n ${SLURM_STEP_ID:-} && ${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}} != 1 ]]; then
    rank=$SLURM_PROCID local_rank=$SLURM_LOCALID
elif [[ -n ${OMPI_COMM_WORLD_RANK:-} ]]; then
    rank=$OMPI_COMM_WORLD_RANK local_rank=$OMPI_COMM_WORLD_LOCAL_RANK
else
    launched=0 local_rank=0
fi
trap 'leave $?' EXIT

[[ -n ${BENCHMARK:-} ]] || fail "BENCHMARK is unset: source configs/config_<system>.sh first"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $here/$BENCHMARK/train.py ]] || fail "BENCHMARK=$BENCHMARK: there is no $here/$BENCHMARK/train.py"
python=${PYTHON:-$(command -v python || command -v python3)} || fail "no python found: activate .venv, or set PYTHON"

read -r -d '' -a extra <<<"${EXTRA_PARAMS:-}" || true
trains=1 asks=0 output=${OUTPUT_DIR:-results/run} before=''
for word in "${extra[@]}" "$@"; do
    case ${before//_/-} in
    --output-dir | --output) output=$word ;;
    esac
    before=$word
    case ${word//_/-} in
    --output-dir=* | --output=*) output=${word#*=} ;;
    --mode | --mode=* | --test-only | --inference) trains=0 ;;
    -h | --help | --print-config) trains=0 asks=1 ;;
    esac
done
extra=("${extra[@]//\{output\}/"$output"}")
if ((asks)); then # one process can answer
    gpus=1
elif ((! launched && ${DGXNNODES:-1} > 1)); then
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} && -n ${MASTER_PORT:-} ]] ||
        fail "DGXNNODES=$DGXNNODES: several nodes need srun or mpirun, which call this script once for each GPU; or call" \
            "it once on each machine with NODE_RANK=0, 1, ..., MASTER_ADDR (machine 0) and MASTER_PORT"
    ((NODE_RANK == 0)) || rank=$((NODE_RANK * gpus))
fi

export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
# Several ranks share the cores of this host; each has loader processes of its own.
((gpus == 1)) || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

command=("$python" -m "$BENCHMARK.train")
if ((! launched && ! asks && gpus * ${DGXNNODES:-1} > 1)); then
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR1}
    export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
    together=(--standalone --local-addr=127.0.0.1) # also where this machine's own name does not resolve
    if ((${DGXNNODES:-1} > 1)); then
        together=(--nnodes="$DGXNNODES" --node_rank="$NODE_RANK" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT")
    fi
    command=("$python" -m torch.distributed.run "${together[@]}" --nproc_per_node="$gpus")
    [[ ${BIND:-0} != 1 ]] || command+=(--numa-binding socket)
    command+=(-m "$BENCHMARK.train")
elif [[ ${BIND:-0} == 1 ]]; then
    if command -v numactl >/dev/null; then
        command=(numactl --physcpubind="$(bound_cpus "$local_rank")" -- "${command[@]}")
    elif ((rank == 0)); then
        echo "run_and_time.sh: BIND=1 has no effect, numactl is not installed" >&2
    fi
fi

# The program runs in a process group of its own, so that a signal reaches it once: from here.
# shellcheck disable=SC2329  # the traps call it
forward() {
    if [[ -z ${!:-} ]]; then # nothing runs yet
        [[ $1 != QUIT && $1 != CONT ]] || return 0
        exit 143
    fi
    again=1
    kill -s "$1" "$!" 2>/dev/null || true
}
trap 'forward TERM' TERM HUP
trap 'forward USR1' USR1
trap 'forward INT' INT
if ((launched)); then
    trap 'forward QUIT' QUIT # the program prints its stacks
    trap 'forward CONT' CONT
else
    trap '' QUIT
fi
begin=$(date '+%Y-%m-%d %H:%M:%S')
SECONDS=0
set -m
"${command[@]}" "${extra[@]}" "$@" </dev/null &
again=1
while ((again)); do # a signal interrupts wait before the program has ended
    again=0
    status=0
    wait "$!" || status=$?
    if ((! again)) && kill -0 "$!" 2>/dev/null; then # it is only stopped (SIGSTOP), which ends a wait too
        again=1
        sleep 1
    fi
done

if ((status > 128)); then
    echo "run_and_time.sh: rank $rank on $host: the program was killed by signal $((status - 128))" \
        "($(kill -l "$status"))" >&2
fi
if ((status == 0 && rank == 0 && trains)); then
    echo "RESULT,${BENCHMARK^^},,$SECONDS,$(id -un),$begin"
fi
exit "$status"
