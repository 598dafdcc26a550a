# shellcheck disable=SC2034,SC2154  # the scripts that source this read the variables, and say where the repository is: here
# Sourced by run.sub and run_with_docker.sh: checks the variables of a job and says what lies where in a container.
# Takes DATADIR, BACKBONE_DIR, LOGDIR, CONT, EXTRA_PARAMS, EXTRA_MOUNTS and the config's exports; sets the arrays problems
# (what is wrong, all of it), checks (words for the preflight), mounts (SOURCE:TARGET[:ro]) and drop_caches (a command),
# data, weights and LOGDIR as absolute paths of this host, and what the benchmark's launch.sh says, such as container_data.

problems=()
missing=()
for name in BENCHMARK DGXSYSTEM DGXNNODES DGXNGPU WALLTIME_RUNANDTIME; do
    [[ -n ${!name:-} ]] || missing+=("$name")
done
[[ ${#missing[@]} == 0 ]] ||
    problems+=("${missing[*]} missing: source configs/config_<system>.sh first (sbatch --export=NONE drops what it exports)")
for name in DGXNNODES DGXNGPU WALLTIME_RUNANDTIME NEXP MASTER_PORT; do
    [[ ${!name:-1} =~ ^[1-9][0-9]*$ ]] || problems+=("$name=${!name} is not a whole number above 0")
done
[[ ${SEED:-0} =~ ^[0-9]+$ ]] || problems+=("SEED=$SEED is not a whole number")
for name in REQUEUE RESUME NCCL_TEST CHECK_COMPLIANCE BIND USE_SYNTHETIC_DATA INIT_EXPECTED_MOUNTS SET_MAXQ_CLK SET_MINEDP_CLK; do
    [[ ${!name:-0} == [01] ]] || problems+=("$name=${!name}: choose 0 or 1")
done
[[ ${RESUME:-0} == 0 || -n ${DATESTAMP:-} ]] || problems+=("RESUME=1 needs the DATESTAMP of the job to go on with")
[[ ${CLEAR_CACHES:-1} =~ ^(0|1|files)$ ]] || problems+=("CLEAR_CACHES=$CLEAR_CACHES: choose 0, 1 or files")
[[ -n ${CONT+set} ]] || problems+=("CONT is missing: the container image, or CONT= (empty) to run without containers")
checks=(--ranks-per-node "${DGXNGPU:-1}") # of the preflight
case ${VERIFY_MOUNTS:-0} in
0 | no) ;;
1 | quick) checks+=(--verify quick) ;;
full) checks+=(--verify full) ;;
*) problems+=("VERIFY_MOUNTS=$VERIFY_MOUNTS: choose 0, quick (or 1) or full") ;;
esac
[[ -z ${DATADIR:-} || ${INIT_EXPECTED_MOUNTS:-0} == 0 ]] || checks+=(--write-manifest)
[[ ${NCCL_TEST:-1} == 1 ]] || checks+=(--bandwidth-mib 0)

# What EXTRA_PARAMS says about all this, in any spelling that the programs read, such as --mode=evaluation or --no_cuda.
spelt=${EXTRA_PARAMS:-} mode=train device=auto pretrained=1 flag=''
spelt=${spelt//=/ }
read -r -d '' -a words <<<"${spelt//_/-}" || true
for word in "${words[@]}"; do
    case $flag in
    --mode) mode=$word ;;
    --device) device=$word ;;
    esac
    case $word in
    --test-only) mode=evaluate ;;
    --no-cuda) device=cpu ;;
    --no-pretrained | --checkpoint | --weights | --backbone-path) pretrained=0 ;;
    esac
    flag=$word
done
[[ $device != cpu && $device != tpu ]] || checks+=(--device cpu) # without GPUs
[[ $mode == train || $mode == training ]] ||
    problems+=("EXTRA_PARAMS has --mode $mode, but trials are trainings (--mode train): call ./run_and_time.sh for it")

synthetic=${USE_SYNTHETIC_DATA:-0} container_data='' own_variables=''
launch=$here/${BENCHMARK:-}/launch.sh
# shellcheck disable=SC1090  # the benchmark's
if [[ -f $launch ]]; then
    source "$launch"
elif [[ -n ${BENCHMARK:-} ]]; then
    problems+=("BENCHMARK=$BENCHMARK: there is no $launch")
fi
if [[ -z ${DATADIR:-} && $synthetic != 1 ]]; then
    problems+=("DATADIR is missing: the folder of the data set")
fi
if [[ -z ${BACKBONE_DIR:-} && $synthetic != 1 && $pretrained == 1 && $mode == train* ]]; then
    problems+=("BACKBONE_DIR is missing: the folder that public-scripts/download_backbone.sh -d filled")
fi
for name in DATADIR BACKBONE_DIR; do
    [[ -z ${!name:-} || -d ${!name} ]] || problems+=("$name=${!name}: there is no such folder on $HOSTNAME")
done

data=${DATADIR:+$(realpath -m "$DATADIR")}
if [[ -n $data && ! -e $data/train && ! -e $data/train2017 ]]; then # DATADIR may also be the folder around the data set
    inner=("$data"/*/train)
    [[ ! -d ${inner[0]} || ${#inner[@]} -gt 1 ]] || data=${inner[0]%/train}
fi
weights=${BACKBONE_DIR:+$(realpath -m "$BACKBONE_DIR")}
LOGDIR=$(realpath -m "${LOGDIR:-results}")
mkdir -p "$LOGDIR" 2>/dev/null && [[ -w $LOGDIR ]] || problems+=("LOGDIR=$LOGDIR can't be written on $HOSTNAME")
[[ $LOGDIR != *[%\\]* ]] || problems+=("LOGDIR=$LOGDIR holds % or \\, which Slurm would replace in the names of the logs")

mounts=("$LOGDIR:/results")
[[ -z $data ]] || mounts+=("$data:$container_data:ro")
[[ -z $weights ]] || mounts+=("$weights:/torch-home:ro")
if [[ -n ${CONT:-} ]]; then
    [[ $data$weights$LOGDIR != *[,:]* ]] || problems+=("a , or : in DATADIR, BACKBONE_DIR or LOGDIR can't be mounted")
    IFS=, read -ra more <<<"${EXTRA_MOUNTS:-}"
    for mount in "${more[@]}"; do
        [[ $mount != /* || -e ${mount%%:*} ]] || problems+=("EXTRA_MOUNTS: ${mount%%:*} is not there on $HOSTNAME")
        mounts+=("$mount")
    done
fi

# pyxis_version: of the plugin on this node, such as 0.24; empty where it can't be found. Pyxis tells it only in slurmd's log.
pyxis_version() {
    local config stack folder files plugin
    config=$(scontrol show config)
    stack=$(sed -n 's/^PlugStackConfig *= *//p' <<<"$config")
    folder=$(sed -n 's/^PluginDir *= *\([^:]*\).*/\1/p' <<<"$config")
    mapfile -t files < <(sed -nE 's/^[[:space:]]*include[[:space:]]+//p' "$stack" 2>/dev/null)
    # shellcheck disable=SC2068  # an include may be a pattern, also one that matches nothing
    plugin=$(cd "$(dirname "$stack")" && { cat "$stack" ${files[@]} 2>/dev/null || true; } |
        grep -oE '^[[:space:]]*(required|optional)[[:space:]]+[^[:space:]]*pyxis[^[:space:]]*') || return 0
    plugin=${plugin##*[[:space:]]}
    [[ $plugin == /* ]] || plugin=$folder/$plugin
    grep -aohE 'pyxis: version v[0-9]+\.[0-9]+' "$plugin" 2>/dev/null | head -n 1 | grep -oE '[0-9.]+$' || true
}

# What this Pyxis can't mount, although it is there: enroot reads the mounts as lines of a shell script.
pyxis_mounts() {
    local version pair name value
    version=$(pyxis_version)
    for pair in "DATADIR=$data" "BACKBONE_DIR=$weights" "LOGDIR=$LOGDIR" "${more[@]/#/EXTRA_MOUNTS=}"; do
        name=${pair%%=*} value=${pair#*=}
        [[ $value != *[\$\"\`\\]* ]] || problems+=("$name=$value holds one of \$ \" \` \\, which Pyxis (here: ${version:-unknown}) can't mount")
        [[ $value != *[[:space:]]* || -z $version || ${version#0.} -ge 24 || $version != 0.* ]] ||
            problems+=("$name=$value holds a blank, which Pyxis can mount from 0.24 on; here it is $version")
    done
}

nodes=("$HOSTNAME")
if [[ -n ${SLURM_JOB_ID:-} ]]; then
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for cores in ${SLURM_JOB_CPUS_PER_NODE//,/ }; do # such as 2(x2),4
        [[ ${cores%%[(]*} -ge ${DGXNGPU:-1} ]] ||
            problems+=("this job has ${cores%%[(]*} cores of a node for $DGXNGPU processes: sbatch --ntasks-per-node=$DGXNGPU")
    done
    [[ ! -f ${CONT:-} ]] || CONT=$(realpath "$CONT")
    [[ ${CONT:-} != /* && ${CONT:-} != *.sqsh || -f $CONT ]] || problems+=("CONT=$CONT: no such image on $HOSTNAME")
    [[ -z ${CONT:-} ]] || pyxis_mounts
fi

clock= # MHz to lock the GPUs at
[[ ${SET_MAXQ_CLK:-0} == 0 ]] || clock=${MAXQ_CLK:-}
[[ ${SET_MINEDP_CLK:-0} == 0 ]] || clock=${MINEDP_CLK:-}
[[ -n $clock || ${SET_MAXQ_CLK:-0}${SET_MINEDP_CLK:-0} == 00 ]] ||
    problems+=("SET_MAXQ_CLK or SET_MINEDP_CLK is 1, but this config has no MAXQ_CLK or MINEDP_CLK")
# A config's name says nodes x GPUs x batch: <system>_008x08x004. The log has the name.
if [[ ${DGXSYSTEM:-} =~ _([0-9]{3})x([0-9]{2})x([0-9]{3})$ ]]; then
    for pair in "DGXNNODES ${BASH_REMATCH[1]}" "DGXNGPU ${BASH_REMATCH[2]}" "BATCHSIZE ${BASH_REMATCH[3]}"; do
        name=${pair% *} value=$((10#${pair#* }))
        [[ ${!name:-$value} == "$value" ]] ||
            echo "warning: $name=${!name}, but the name DGXSYSTEM=$DGXSYSTEM says $value: was another config sourced before?"
    done
fi
drop_caches=(/sbin/sysctl vm.drop_caches=3)
((EUID == 0)) || drop_caches=(sudo -n "${drop_caches[@]}")
[[ -z ${DROPCACHE_CMD:-} ]] || read -ra drop_caches <<<"$DROPCACHE_CMD"
for name in NVTX_FLAG TIME_TAGS EPOCH_PROF DISABLE_CG LOCALDISK_FROM_SQUASHFS SCRATCH_SPACE TELEMETRY_SCRIPT POWERCMDDIR \
    POWERLOGDIR MLPERF_POWER_TRAIN_AFTER_RUN_STOP NCCL_TEST_WALLTIME; do
    [[ ${!name:-0} == 0 ]] || echo "warning: $name=${!name} has no effect here"
done
