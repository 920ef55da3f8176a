# Sourced by the sweeps. Relative paths are the caller's: nothing here changes the folder.
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

# Run what is not complete of the commands in the arguments, one for each word of GPUS at a time.
# Says at the end what is complete, failed and missing; fails where not all are complete.
run_commands() {
    local gpus=${GPUS:-0} command log complete=0 failed=0 missing=0
    gpus=(${gpus//,/ })
    # Runs at once share the cores: threads that are more than these wait for each other.
    local threads=$(($(nproc) / ${#gpus[@]}))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

    mkdir -p "$root/logs"
    trap : INT # Ctrl-C ends the runs; what follows still says how far they are
    for command; do
        log=$(log_of "$command")
        is_complete "$log" || echo "$command </dev/null >>$(quote "$log") 2>&1"
    done | simple_gpu_scheduler --gpus "${gpus[@]}" || true

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
