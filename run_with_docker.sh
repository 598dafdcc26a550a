#!/usr/bin/env bash
# One machine with Docker and without Slurm: all trials of run.sub in one container of an image built from Dockerfile.
#
#   source configs/config_<system>.sh
#   CONT=detectors DATADIR=... BACKBONE_DIR=... LOGDIR=... ./run_with_docker.sh
#
# The variables are run.sub's; CONT names the image. DOCKER: the engine (default: docker; podman works too).
# DOCKER_ARGS: more words for its run command, such as "--privileged --user 0:0", which lets run.sub drop the page cache.
# The engine takes this script's place, so that SIGTERM, SIGINT and SIGUSR1 reach run.sub and its exit code comes back.
set -euo pipefail
(($# == 0)) || { sed -n '/^# One machine/,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit "$([[ $1 =~ ^--?h ]] && echo 0 || echo 2)"; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What the container gets to know of this environment: variables that run.sub and the program read. Their paths of this
# host are replaced by those in the container, and nothing else of the environment is told.
passed='BENCHMARK|BATCHSIZE|EVALBATCHSIZE|NUMEPOCHS|LR|LOG_INTERVAL|OPS|GRAPHS|VARIANTS|CUDNN_BENCHMARK_LIMIT'
passed+='|EXTRA_PARAMS|SEED|USE_SYNTHETIC_DATA'
passed+='|DGX[A-Z]+|MAXQ_CLK|MINEDP_CLK|SET_MAXQ_CLK|SET_MINEDP_CLK|WALLTIME|WALLTIME_RUNANDTIME|BIND|MASTER_PORT'
passed+='|MLPERF_[A-Z_]+|NEXP|DATESTAMP|RESUME|CLEAR_CACHES|DROPCACHE_CMD|CHECK_COMPLIANCE|VERIFY_MOUNTS|INIT_EXPECTED_MOUNTS'
passed+='|NCCL_[A-Z_0-9]+|HANG_MONITOR_TIMEOUT|OMP_NUM_THREADS|GOMP_SPINCOUNT|SYSTEM_DESCRIPTION'
passed+='|NVTX_FLAG|TIME_TAGS|EPOCH_PROF|DISABLE_CG|LOCALDISK_FROM_SQUASHFS|TELEMETRY_SCRIPT|POWERCMDDIR'

# --- Everything that is wrong is said at once, before anything starts.
source "$here/configs/config_mounts.sh"
docker=${DOCKER:-docker}
command -v "$docker" >/dev/null || problems+=("DOCKER=$docker is not on PATH")
[[ -z ${CONT+set} || -n $CONT ]] || problems+=("CONT is empty: the name of the image, such as detectors")
[[ ${DGXNNODES:-1} == 1 ]] || problems+=("DGXNNODES=$DGXNNODES: Docker runs on one machine; several need Slurm or torchrun")
for mount in "${mounts[@]}"; do # Docker would take any other word for the name of a volume of its own
    [[ $mount == /* ]] || problems+=("EXTRA_MOUNTS: $mount must begin with /")
done
if ((${#problems[@]})); then
    printf 'run_with_docker.sh: error: %s\n' "${problems[@]}" "nothing was started" >&2
    exit 2
fi

# --- The container: the user's own uid, this host's network and shared memory, no limit on locked memory.
options=(--rm --init --network=host --ipc=host --ulimit=memlock=-1 --ulimit=stack=67108864 --stop-timeout=300)
user=(--user "$(id -u):$(id -g)") gpus=(--gpus all)
[[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || gpus=(--gpus "\"device=$CUDA_VISIBLE_DEVICES\"")
if [[ ${docker##*/} == podman ]]; then
    gpus=()
    IFS=, read -ra chosen <<<"${CUDA_VISIBLE_DEVICES:-all}"
    for gpu in "${chosen[@]}"; do
        gpus+=(--device "nvidia.com/gpu=$gpu")
    done
    ((EUID == 0)) || user=(--userns=keep-id) # without root, only this maps the user to itself
fi
options+=("${user[@]}")
if nvidia-smi --list-gpus >/dev/null 2>&1; then
    options+=("${gpus[@]}")
fi
for mount in "${mounts[@]}"; do
    [[ $mount == *:* ]] || mount+=:$mount # Pyxis's short form
    options+=(--volume "$mount")
done
options+=(--env CONT= --env LOGDIR=/results)
[[ -z $data ]] || options+=(--env "DATADIR=$container_data")
[[ -z $weights ]] || options+=(--env BACKBONE_DIR=/torch-home)
# Without values, which the engine reads from its own environment.
for name in $(compgen -e); do
    [[ ! $name =~ ^($passed|$own_variables)$ ]] || options+=(--env "$name")
done
read -r -d '' -a more <<<"${DOCKER_ARGS:-}" || true

command=("$docker" run "${options[@]}" --workdir "${WORK_DIR:-/workspace/ssd}" "${more[@]}" "$CONT" ./run.sub)
echo "+ ${command[*]@Q}"
exec "${command[@]}"
