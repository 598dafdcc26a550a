# shellcheck disable=SC2034,SC2154,SC2329,SC2016  # run.sub shares variables and calls functions; words for other shells
# Sourced by run.sub: how things are started. on_hosts: on each node; on_first: on the first node, with CONT in its
# container; preflight and train: once for each GPU, there too. Without Slurm, all of it on this machine. Then the containers,
# and what run.sub does before, during and after a trial.

if [[ -n $job ]]; then
    step=(srun --export=ALL --mpi=none --overlap --no-kill --kill-on-bad-exit=0 --wait=0)
    slurm=$(scontrol show config)
    # Where Slurm binds at all, it would give each task a single core; BIND=1 binds to sockets.
    grep 'TaskPlugin .*task/none' <<<"$slurm" >/dev/null || step+=(--cpu-bind=none)
    hosts=("${step[@]}" --nodes="$DGXNNODES" --ntasks="$DGXNNODES" --ntasks-per-node=1)
    first=("${step[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${container[@]}")
    on_gpus=("${step[@]}" --nodes="$DGXNNODES" --ntasks=$((DGXNNODES * DGXNGPU)) --ntasks-per-node="$DGXNGPU" "${container[@]}")
    on_hosts() { "${hosts[@]}" "$@"; }
    on_first() { timeout 300 "${first[@]}" "${inside[@]}" "$@"; }
    preflight() { TORCH_CPP_LOG_LEVEL=ERROR "${on_gpus[@]}" --kill-on-bad-exit=1 "${inside[@]}" "$python" tools/preflight.py "$@"; }
    train() {
        exec "${on_gpus[@]}" --job-name="trial_$k" --time="$WALLTIME_RUNANDTIME" --output="$folder/rank_%t.log" "${inside[@]}" ./run_and_time.sh "$@" \
            2> >(tee -a "$folder/srun.log" >&2)
    }
    signal() { # to every rank; in the background, because it waits for a node that is gone
        { squeue -hs -j "$job" -o '%i %j' | awk -v name="trial_$k" '$2 == name { print $1 }' | xargs -r scancel -s "$1"; } 2>/dev/null &
    }
else
    on_hosts() { "$@"; }
    torchrun=(-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node="$DGXNGPU")
    ((DGXNGPU > 1)) || torchrun=()
    preflight() { "$python" "${torchrun[@]}" tools/preflight.py "$@"; }
    train() { exec ./run_and_time.sh "$@" >>"$folder/rank_0.log" 2>&1; }
    signal() { kill -s "$1" "$trial" || true; }
fi
# Here that needs no step, and works also while the job is being cancelled and can start none.
[[ -n $CONT ]] || on_first() { env -u SLURM_PROCID "$@"; }

# with_host_paths COMMAND...: what it says about paths of the containers is said about those of this host.
with_host_paths() { "$@"; }
if [[ -n $CONT ]]; then
    with_host_paths() { "$@" 2>&1 | (trap '' TERM USR1 && exec sed -uE "${named[@]}"); }
    named=()
    for pair in "/results:$LOGDIR" "$container_data:$data" "/torch-home:$weights"; do
        # shellcheck disable=SC2001  # what & means in a replacement of bash depends on its version
        path=$(sed 's/[&#\\]/\\&/g' <<<"${pair#*:}")
        [[ -z $path ]] || named+=(-e "s#(^|[^[:alnum:]_./-])${pair%%:*}\\>#\\1$path#g")
    done
fi

# Waits for a line, for the end of the batch script or, once the job is cancelled, nearly as long as Slurm lets it live. In
# the GraceTime of a preemption TERM comes to a job that runs on: there it waits for the end of that too.
# Pyxis does not hand the user's ENROOT_DATA_PATH on to enroot, so neither does this.
remover='remove() { env -u ENROOT_DATA_PATH enroot remove -f "$0"; exit; }
end() {
    local patience=$1
    while [[ $(timeout 5 squeue -ho %T -j "$SLURM_JOB_ID" 2>/dev/null) == RUNNING ]]; do
        read -rt 3 || (($? > 128)) || remove
        patience=$(($1 > 5 ? $1 - 4 : 1))
    done
    read -rt "$patience"
    remove
}
trap "end $1" TERM
trap "" USR1
read -r
remove'

# refuse WORDS: ends the job before its first trial. A preemption is no fault of the job's: it starts again.
refuse() {
    notice_preemption
    status=2
    [[ -z $preempted ]] || requeue "before the first trial" "$preempted"
    say "error: ${stop:+stopped by ${preempted:-SIG$stop}, so }$*; no trial was started" >&2
    exit 2
}

# requeue WHEN WHY: ends this start of the job and asks for another; returns where the site has none.
requeue() {
    scontrol requeue "$job" || { say "this site does not requeue" && return; }
    say "requeued $1; the job goes on when it starts again${2:+: $2}"
    for _ in {1..300}; do [[ $stop == TERM ]] || sleep 1 || true; done # until Slurm ends this start
    exit "$status"
}

# enter_containers COMMAND...: one container on each node; COMMAND (the table) waits in that of the first.
enter_containers() {
    local code=0 patience work=${WORK_DIR:-/workspace/ssd}
    on_hosts bash -c '[[ -x $(command -v enroot) ]] || { echo "run.sub: enroot is not on PATH on $SLURMD_NODENAME" >&2; exit 1; }
        env -u ENROOT_DATA_PATH enroot remove -f "$0" &>/dev/null || true' "pyxis_$name" || # an earlier start left it
        refuse "containers need enroot on every node"
    # Once the job is cancelled no step can be started, so that this one and the table's wait from now on.
    patience=$(sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' <<<"$slurm")
    patience=$((${patience:-30} > 7 ? ${patience:-30} * 2 / 3 : 5)) # removing an image of 20 GB takes seconds
    coproc REMOVER { "${hosts[@]}" bash -c "$remover" "pyxis_$name" "$patience" &>/dev/null; }
    on_hosts --container-image="$CONT" "${container[@]}" --container-workdir=/ \
        sh -c '[ -f "$0/run_and_time.sh" ] || exit 9' "$work" || code=$?
    ((code != 9)) || refuse "CONT=$CONT holds no $work/run_and_time.sh: WORK_DIR is where it has the repository"
    ((code == 0)) || refuse "no container from CONT=$CONT, see above (has this Slurm Pyxis?)"
    # A signal to the job must end neither the step nor what filters its words.
    exec {table}> >(trap : TERM INT USR1 && with_host_paths "${first[@]}" "${inside[@]}" \
        bash -c 'trap "" TERM USR1; read -r word; if [[ $word == print ]]; then exec "$@"; fi' - "$@")
    table_step=$!
}

# close_table WORD: ends the step that waits with the table, which prints it where WORD is print.
close_table() {
    [[ -n $table ]] || return 0
    trap '' PIPE
    echo "$1" >&"$table" || true
    exec {table}>&-
    table=''
    timeout 60 tail -f /dev/null --pid="$table_step"
}

# open_log: the folder of trial k with what the logs of a submission begin with.
open_log() {
    mkdir -p "$folder" && rm -f "$folder"/{exits,killed,interrupted}.txt "$folder/exit_code" && {
        echo ":::DLPAL ${CONT:-none} ${job:-none} ${#nodes[@]} ${SLURM_JOB_NODELIST:-$HOSTNAME}" \
            "${MLPERF_CLUSTER_NAME:-unknown} $DGXSYSTEM"
        echo ":::SYSJSON $(tr -d '\n' <"$LOGDIR/${stamp}_system.json")"
        echo ":::GITCOMMITID $code $launcher"
    } >>"$folder/rank_0.log" && ln -sfn "${stamp}_$k/rank_0.log" "$LOGDIR/${stamp}_$k.log"
}

# check_folders: why no further trial can run here, in down (a sentence, empty if one can) and gone (nodes that do not
# answer). Every look has its time, because a file server that hangs would hold up this script too.
check_folders() {
    local code=0 look ask
    down='' gone=''
    # trials.py names a disk with less than 50 MiB as the reason of a failure; a quota shows only where something is written.
    # Ranks that still write may have made the folder anew, but not what run.sub had put beside it.
    look='for path in "$0" "$2"; do [[ -e $path ]] || { echo "LOGDIR: $path was removed"; exit; }; done
        free=$(df --output=avail -BM "$0" | tr -dc "0-9\n" | tail -n 1)
        ((${free:-50} >= 50)) || { echo "the disk of LOGDIR=$1 is full"; exit; }
        said=$(LC_ALL=C dd if=/dev/zero of="$0/.written" bs=1M count=1 conv=fsync status=none 2>&1) ||
            echo "LOGDIR=$1: nothing can be written: ${said##*: }"
        rm -f "$0/.written"'
    down=$(timeout -k 5 20 bash -c "$look" "$folder" "$LOGDIR" "$LOGDIR/${stamp}_system.json" 2>/dev/null) || code=$?
    ((code != 124 && code != 137)) || down="LOGDIR=$LOGDIR does not answer: does its file server hang?"
    [[ -z $down ]] || return 0
    look='for path; do [[ -e $path ]] || { echo "$path is gone on ${SLURMD_NODENAME:-$HOSTNAME}"; code=9; }; done; exit ${code:-0}'
    ask=(bash -c "$look" - "$folder" ${data:+"$data"} ${weights:+"$weights"})
    [[ -z $job ]] || ask=("${hosts[@]}" --immediate=15 "${ask[@]}")
    code=0
    down=$(timeout -k 5 20 "${ask[@]}" 2>/dev/null) || code=$?
    down=${down//$'\n'/, }
    ((code != 0 && code != 9)) || return 0
    down=''
    if [[ -z $job ]]; then
        ((code != 124 && code != 137)) || down="DATADIR or BACKBONE_DIR does not answer: does a file server hang?"
        return 0
    fi
    gone=$(silent_nodes)
    # This script runs on the first: if all are silent, Slurm was too busy for an answer.
    if [[ -n $gone && $(wc -l <<<"$gone") == "${#nodes[@]}" ]]; then
        sleep 10 || true
        gone=$(silent_nodes)
    fi
    gone=$(paste -sd , <<<"$gone")
    [[ -z $gone ]] || down="no answer from $gone: a node is lost"
}
silent_nodes() {
    local node
    for node in "${nodes[@]}"; do
        timeout -k 5 20 "${step[@]}" --immediate=15 --nodes=1 --ntasks=1 --nodelist="$node" true &>/dev/null || echo "$node" &
    done | sort -V
}

# notice_preemption: a preemption with GraceTime signals a job that goes on running; it is to be resumed, as at a time limit.
notice_preemption() {
    [[ -n $job && -z $preempted ]] || return 0
    local about
    about=$(timeout 10 scontrol show job "$job" 2>/dev/null) || return 0
    [[ ! $about =~ JobState=RUNNING || ! $about =~ PreemptTime=[0-9] ]] || stop=USR1 preempted="Slurm's preemption"
}

# wait_for_steps: until Slurm has ended the training step of an earlier trial, whose processes may hold GPUs and ports.
wait_for_steps() {
    local old
    for _ in {1..45}; do
        old=$(squeue -hs -j "$job" -o '%j %N' 2>/dev/null | awk '$1 ~ /^trial_/ { print $2; exit }') || true
        [[ -n $old && -z $stop ]] || return 0
        sleep 2 || true
    done
    say "warning: after 90 s Slurm has not ended the step of an earlier trial on $old: drain the node whose processes hang"
}

# watch: while the trial runs, hands stop on to its ranks and ends what hangs; then status is its exit code.
watch() {
    local limit=0 lost='' told=''
    while kill -0 "$trial" 2>/dev/null; do
        sleep 1 || true # scancel reaches it too
        if [[ -n $stop && -z $told ]]; then
            notice_preemption
            say "${preempted:-SIG$stop}: every rank writes a checkpoint and ends"
            told=$SECONDS
            signal "$stop"
        elif [[ -n $stop && -n $job ]] && ((SECONDS >= told + 10)) && ! all_ended; then
            told=$SECONDS # a rank that had not started yet did not get it
            signal "$stop"
        fi
        # A rank has failed: the watchdogs of the others end them in 30 s (code 6), and then all within seconds.
        if ((! limit)) && grep -qsE '^[0-9]+ [^ ]+ (1|2|5|6|1[2-9][0-9]|2[0-9]{2}) ' "$folder/exits.txt"; then
            limit=$((SECONDS + 45))
        elif ((limit > SECONDS + 10)) && grep -qs ' 6 [0-9]*$' "$folder/exits.txt"; then
            limit=$((SECONDS + 10))
        elif ((limit && SECONDS > limit)); then
            say "some ranks do not end although others failed: they print their stacks and are killed"
            signal CONT && signal QUIT && sleep 3
            date +%s >"$folder/killed.txt" || true                          # trials.py blames no rank for it
            lost=$(awk '$3 { print $3; exit }' "$folder/exits.txt" || true) # the code of the first that failed
            signal KILL && sleep 3
            limit=$((SECONDS + 10))
            # srun itself waits minutes for a node that is gone. Its child first: where srun is killed, that one has
            # slurmctld kill the step, also on that node once it is back, even if it then runs the job's next start.
            pkill -KILL -P "$trial" -x srun || true
            kill -KILL "$trial" 2>/dev/null || true
            wait "$trial" 2>/dev/null || true # without the shell's own words about it
        fi
    done
    wait "$trial" || status=$?
    status=${lost:-$status}
}
all_ended() { (($(cat "$folder/exits.txt" 2>/dev/null | wc -l) >= DGXNNODES * DGXNGPU)); }

# judge: says why the trial failed and whether its log is compliant.
judge() {
    if ((status)) && [[ -n $job && -z $stop ]] && ((SECONDS - began >= WALLTIME_RUNANDTIME * 60)); then
        say "trial $k took longer than WALLTIME_RUNANDTIME=$WALLTIME_RUNANDTIME minutes" && status=124
    elif ((status)) && [[ $stop == TERM ]]; then # no step can be started any more, which could explain it
        if [[ -f $folder/last.pt ]]; then
            say "trial $k was stopped; its checkpoint is in $folder"
        else
            say "trial $k was stopped and left no checkpoint in $folder"
        fi
    elif ((status)) && [[ -d $folder ]]; then
        with_host_paths on_first "$python" tools/trials.py explain "$OUTPUT_DIR" --code "$status" \
            --ranks-per-node "$DGXNGPU" --nodes "$(IFS=, && echo "${nodes[*]}")" || say "trial $k failed with code $status"
    fi
    [[ $status == [03] || -n $stop ]] || check_folders
    if [[ ${CHECK_COMPLIANCE:-1} == 1 && $status =~ ^[03]$ ]]; then
        with_host_paths on_first "$python" tools/trials.py check "$OUTPUT_DIR/result_$RESULT_INDEX.txt" \
            --called "$folder/result_$RESULT_INDEX.txt" --append "$logs/compliance_$stamp.out" \
            --ruleset "${MLPERF_RULESET:-5.1.0}" || true
    fi
}
