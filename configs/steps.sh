# shellcheck disable=SC2034,SC2154,SC2329,SC2016  # run.sub shares variables and calls functions; words for other shells
# Sourced by run.sub: how things are started. on_hosts: on each node; on_first: on the first node, with CONT in its
# container; preflight and train: once for each GPU, there too. Without Slurm, all of it on this machine. Then the containers,
# and what is asked after a trial that failed.

if [[ -n $job ]]; then
    step=(srun --export=ALL --overlap --no-kill --kill-on-bad-exit=0 --wait=0)
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
    for pair in "/results:$LOGDIR" "/datasets/open-images-v6:$data" "/torch-home:$weights"; do
        # shellcheck disable=SC2001  # what & means in a replacement of bash depends on its version
        path=$(sed 's/[&#\\]/\\&/g' <<<"${pair#*:}")
        [[ -z $path ]] || named+=(-e "s#(^|[^[:alnum:]_./-])${pair%%:*}\\>#\\1$path#g")
    done
fi

# Waits for a line, for the end of the batch script or, once the job is cancelled, nearly as long as Slurm lets it live.
# Pyxis does not hand the user's ENROOT_DATA_PATH on to enroot, so neither does this.
remover='remove() { env -u ENROOT_DATA_PATH enroot remove -f "$0"; exit; }
trap "read -rt $1; remove" TERM
trap "" USR1
read -r
remove'

# enter_containers COMMAND...: one container on each node; COMMAND (the table) waits in that of the first.
enter_containers() {
    local code=0 patience work=${WORK_DIR:-/workspace/ssd}
    on_hosts bash -c '[[ -x $(command -v enroot) ]] || { echo "run.sub: enroot is not on PATH on $SLURMD_NODENAME" >&2; exit 1; }
        env -u ENROOT_DATA_PATH enroot remove -f "$0" &>/dev/null || true' "pyxis_$name" || # an earlier start left it
        refuse "containers need enroot on every node"
    # Once the job is cancelled no step can be started, so that this one and the table's wait from now on.
    patience=$(sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' <<<"$slurm")
    patience=$((${patience:-30} > 10 ? ${patience:-30} - 5 : 5))
    coproc REMOVER { "${hosts[@]}" bash -c "$remover" "pyxis_$name" "$patience" &>/dev/null; }
    on_hosts --container-image="$CONT" "${container[@]}" --container-workdir=/ \
        sh -c '[ -f "$0/run_and_time.sh" ] || exit 9' "$work" || code=$?
    ((code != 9)) || refuse "CONT=$CONT holds no $work/run_and_time.sh: WORK_DIR is where it has the repository"
    ((code == 0)) || refuse "no container from CONT=$CONT, see above (has this Slurm Pyxis?)"
    exec {table}> >(exec "${first[@]}" "${inside[@]}" bash -c 'trap "" TERM USR1; read -r && exec "$@"' - "$@" 2>&1)
    table_step=$!
}

# let_table: where no step can be started any more, the one that waits for it prints the table.
let_table() {
    echo >&"$table" && exec {table}>&- && timeout 60 tail -f /dev/null --pid="$table_step"
}

# look_around: why no further trial can run here, in down (a sentence, empty if one can) and gone (nodes that do not answer).
look_around() {
    local code=0 free need=50 # MiB; trials.py names a disk with less as the reason of a failure
    local look='for path; do [[ -e $path ]] || { echo "$path is gone on ${SLURMD_NODENAME:-$HOSTNAME}"; code=9; }; done; exit ${code:-0}'
    down='' gone=''
    [[ -d $folder ]] || { down="LOGDIR: $folder was removed" && return; }
    free=$(df --output=avail -BM "$folder" | tr -dc '0-9\n' | tail -n 1)
    ((${free:-$need} >= need)) || { down="the disk of LOGDIR=$LOGDIR is full" && return; }
    local ask=(bash -c "$look" - "$folder" ${data:+"$data"} ${weights:+"$weights"})
    [[ -z $job ]] || ask=(timeout 20 "${hosts[@]}" --immediate=15 "${ask[@]}")
    down=$("${ask[@]}" 2>/dev/null) || code=$?
    down=${down//$'\n'/, }
    ((code != 0 && code != 9)) || return 0
    down=''
    [[ -n $job ]] || return 0
    gone=$(
        for node in "${nodes[@]}"; do
            timeout 20 "${step[@]}" --immediate=15 --nodes=1 --ntasks=1 --nodelist="$node" true &>/dev/null || echo "$node" &
        done
        wait
    )
    gone=$(sort -V <<<"$gone" | paste -sd ,)
    [[ -z $gone ]] || down="no answer from $gone: a node is lost"
}

# watch: while the trial runs, hands stop on to its ranks and ends what hangs; then status is its exit code.
watch() {
    local limit=0 lost='' told=''
    while kill -0 "$trial" 2>/dev/null; do
        sleep 1 || true # scancel reaches it too
        if [[ -n $stop && -z $told ]]; then
            say "SIG$stop: every rank writes a checkpoint and ends"
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
            kill -KILL "$trial" 2>/dev/null || true # srun itself waits minutes for a node that is gone
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
    [[ $status == [03] || -n $stop ]] || look_around
    if [[ ${CHECK_COMPLIANCE:-1} == 1 && $status =~ ^[03]$ ]]; then
        with_host_paths on_first "$python" tools/trials.py check "$OUTPUT_DIR/result_$RESULT_INDEX.txt" \
            --called "$folder/result_$RESULT_INDEX.txt" --append "$logs/compliance_$stamp.out" \
            --ruleset "${MLPERF_RULESET:-5.1.0}" || true
    fi
}
