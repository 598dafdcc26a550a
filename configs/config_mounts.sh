# shellcheck disable=SC2034  # the scripts that source this read the variables
# Sourced by run.sub and run_with_docker.sh: checks the variables of a job and says what lies where in a container.
# Takes DATADIR, BACKBONE_DIR, LOGDIR, CONT, EXTRA_MOUNTS and the config's exports; sets the arrays problems (what is
# wrong, all of it), mounts (SOURCE:TARGET[:ro]) and drop_caches (a command), and data, weights and LOGDIR as absolute
# paths of this host.

problems=()
for name in BENCHMARK DGXSYSTEM DGXNNODES DGXNGPU WALLTIME_RUNANDTIME; do
    [[ -n ${!name:-} ]] || problems+=("$name is missing: source configs/config_<system>.sh first (sbatch --export=NONE drops it)")
done
for name in DGXNNODES DGXNGPU WALLTIME_RUNANDTIME NEXP MASTER_PORT SEED; do
    [[ ${!name:-0} =~ ^[0-9]+$ ]] || problems+=("$name=${!name} is not a whole number")
done
[[ -n ${CONT+set} ]] || problems+=("CONT is missing: the container image, or CONT= (empty) to run without containers")
case ${VERIFY_MOUNTS:-0} in
0 | no) verify=no ;;
1 | quick) verify=quick ;;
full) verify=full ;;
*) problems+=("VERIFY_MOUNTS=$VERIFY_MOUNTS: choose 0, quick (or 1) or full") ;;
esac
synthetic=${USE_SYNTHETIC_DATA:-0} parameters=" ${EXTRA_PARAMS:-} "
if [[ -z ${DATADIR:-} && $synthetic != 1 ]]; then
    problems+=("DATADIR is missing: the folder of the data set")
fi
if [[ -z ${BACKBONE_DIR:-} && $synthetic != 1 && $parameters != *" --no-pretrained "* ]]; then
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
[[ -z $data ]] || mounts+=("$data:/datasets/open-images-v6:ro")
[[ -z $weights ]] || mounts+=("$weights:/torch-home:ro")
if [[ -n ${CONT:-} ]]; then
    [[ $data$weights$LOGDIR != *[,:]* ]] || problems+=("a , or : in DATADIR, BACKBONE_DIR or LOGDIR can't be mounted")
    IFS=, read -ra more <<<"${EXTRA_MOUNTS:-}"
    for mount in "${more[@]}"; do
        [[ $mount != /* || -e ${mount%%:*} ]] || problems+=("EXTRA_MOUNTS: ${mount%%:*} is not there on $HOSTNAME")
        mounts+=("$mount")
    done
fi
clock= # MHz to lock the GPUs at
[[ ${SET_MAXQ_CLK:-0} == 0 ]] || clock=${MAXQ_CLK:-}
[[ ${SET_MINEDP_CLK:-0} == 0 ]] || clock=${MINEDP_CLK:-}
[[ -n $clock || ${SET_MAXQ_CLK:-0}${SET_MINEDP_CLK:-0} == 00 ]] ||
    problems+=("SET_MAXQ_CLK or SET_MINEDP_CLK is 1, but this config has no MAXQ_CLK or MINEDP_CLK")
drop_caches=(/sbin/sysctl vm.drop_caches=3)
((EUID == 0)) || drop_caches=(sudo -n "${drop_caches[@]}")
[[ -z ${DROPCACHE_CMD:-} ]] || read -ra drop_caches <<<"$DROPCACHE_CMD"
for name in NVTX_FLAG TIME_TAGS EPOCH_PROF DISABLE_CG LOCALDISK_FROM_SQUASHFS TELEMETRY_SCRIPT POWERCMDDIR; do
    [[ ${!name:-0} == 0 ]] || echo "warning: $name=${!name} has no effect here"
done
