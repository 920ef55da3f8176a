# Sourced by the sweeps. Relative paths are the caller's: nothing here changes the folder.
# For --print, GPUS, SBATCH and ROOT see hypersearch.sh.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${ROOT:-runs}
root=${root/#\~\//$HOME/}
python=${PYTHON:-python}

quote() { # for a shell, where it needs that
    [[ $1 =~ ^[A-Za-z0-9_.,/:=+{}@%-]+$ ]] && echo "$1" || echo "${1@Q}"
}
script() { # an entry script, as seen from here
    [ "$PWD" = "$repository" ] && echo "$1" || quote "$repository/$1"
}
stop() { echo "$(basename "$0"): error: $1" >&2; exit 2; }

log_of() { echo "$root/logs/$(cksum <<<"$1" | tr ' ' -).log"; }
is_complete() { # a run's log names its folder
    local line
    while read -r line; do
        [ ! -f "$line/result.json" ] || return 0
    done 2>/dev/null <"$1"
    return 1
}

# Run each stage, an array of commands, after the one before. A run that fails stops no other.
run_stages() {
    local stage failed=
    for stage; do
        local -n commands=$stage
        if [ -n "${print:-}" ]; then
            printf '%s\n' "${commands[@]}"
        else
            run_commands "${commands[@]}" || failed=yes
            [ -z "${interrupted:-}" ] || break
        fi
    done
    [ -n "${print:-}" ] || echo "Their tables: python -m scripts.report $(quote "$root")"
    [ -z "$failed" ]
}

# Run what is not complete of the commands in the arguments. Says at the end what is complete,
# failed and missing; fails where not all are complete.
run_commands() {
    local gpus=${GPUS:-0} command log complete=0 failed=0 missing=0 pending=()
    gpus=(${gpus//,/ })
    mkdir -p "$root/logs"
    for command; do
        log=$(log_of "$command")
        is_complete "$log" || pending+=("$command </dev/null >>$(quote "$log") 2>&1")
    done
    if [ -n "${SBATCH+given}" ]; then
        submit
        return
    fi
    # Runs at once share the cores: threads that are more than these wait for each other.
    local threads=$(($(nproc) / ${#gpus[@]}))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}
    trap 'interrupted=yes' INT # Ctrl-C ends the runs; what follows still says how far they are
    printf '%s\n' "${pending[@]}" | grep . | simple_gpu_scheduler --gpus "${gpus[@]}" || true

    for command; do
        log=$(log_of "$command")
        if is_complete "$log"; then
            complete=$((complete + 1))
        elif [ -f "$log" ]; then
            failed=$((failed + 1))
            printf 'failed: %s\n    %s\n    %s\n' "$command" "$log" "$(grep . "$log" | tail -n 1)"
        else
            missing=$((missing + 1))
        fi
    done
    echo "runs: $complete complete, $failed failed, $missing missing"
    [ "$complete" -eq $# ]
}

# Submit what is pending as one array job, which starts when that of the stage before has ended.
# A task that is requeued goes on after its last epoch, and its log with it.
submit() {
    [ ${#pending[@]} -gt 0 ] || { echo "runs: all complete"; return; }
    local list
    list=$(mktemp "$root/logs/commands-XXXXXX")
    printf 'exec %s\n' "${pending[@]}" >"$list"
    submitted=$(
        sbatch --parsable --job-name "$(basename "$0" .sh)" --array "1-${#pending[@]}" --requeue \
            --open-mode append --output "$root/logs/slurm-%A_%a.log" \
            ${submitted:+--dependency afterany:$submitted} $SBATCH <<SCRIPT
#!/usr/bin/env bash
eval "\$(sed -n "\${SLURM_ARRAY_TASK_ID}p" $(quote "$list"))"
SCRIPT
    ) || stop "SBATCH='$SBATCH': sbatch has submitted nothing"
    echo "array job $submitted: ${#pending[@]} runs, in $list; squeue shows them"
}
