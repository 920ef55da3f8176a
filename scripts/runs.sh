# Sourced by the sweeps. Relative paths are the caller's: nothing here changes the folder.
# For --print, GPUS, SBATCH and ROOT see hypersearch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${ROOT:-runs}
root=${root/#\~\//$HOME/}
python=${PYTHON:-python}

quote() { # for a shell, where it needs that, as {a,b} and {1..3} do
    if [[ $1 =~ ^[A-Za-z0-9_.,/:=+{}@%-]+$ && ! $1 =~ \{.*(,|\.\.).*\} ]]; then
        printf '%s\n' "$1"
    else
        printf "'%s'\n" "${1//\'/\'\\\'\'}" # as every shell reads it, in whatever locale
    fi
}
script() { # an entry script, as seen from here
    [ "$PWD" = "$repository" ] && echo "$1" || quote "$repository/$1"
}
ask() { # what only the code knows: see sweep.py
    python "$repository/scripts/sweep.py" "$(basename "$0")" "$@"
}

# Flags that the sweep sets itself, and what to give instead of them. --overwrite would start runs
# from the first epoch also where a sweep that was killed goes on.
declare -A instead=()
refuse_set() {
    local word flag
    for word; do
        flag=${word%%=*}
        flag=${flag#--}
        flag=${flag//-/_}
        [ "$word" != --overwrite ] || stop "$word: ROOT=... in front trains anew, and keeps what there is"
        if [[ $word = --?* && -n ${instead[$flag]:-} ]]; then
            stop "$word: the sweep sets this flag itself; ${instead[$flag]}"
        fi
    done
}

log_of() { echo "$root/logs/$(cksum <<<"$1" | tr ' ' -).log"; }
finished_folder() { # a run's log names its folder; fails where that is not complete
    local line
    while read -r line; do
        [ ! -f "$line/result.json" ] || { echo "$line"; return; }
    done 2>/dev/null <"$1"
    return 1
}
is_complete() { finished_folder "$1" >/dev/null; }

# Run each stage, an array of commands, after the one before. A run that fails stops no other.
run_stages() {
    local stage failed=
    for stage; do
        local -n given=$stage
        printf '%s\n' "${given[@]}"
    done | ask check || exit 2
    for stage; do
        local -n commands=$stage
        # A net may be asked for twice, as a teacher and as a student from scratch.
        mapfile -t commands < <(printf '%s\n' "${commands[@]}" | awk '!seen[$0]++')
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

# Run what is not complete of the commands in the arguments; fails where not all are complete then.
run_commands() {
    local command log folder pending=() finished=()
    mkdir -p "$root/logs" || stop "ROOT=$root: its folder cannot be made; give another one"
    for command; do
        log=$(log_of "$command")
        if folder=$(finished_folder "$log"); then
            finished+=("$folder")
        else
            pending+=("$command </dev/null >>$(quote "$log") 2>&1")
        fi
    done
    [ ${#finished[@]} -eq 0 ] || ask finished $# "${finished[@]}" >&2
    if [ -n "${SBATCH+given}" ]; then
        submit "${pending[@]}"
    else
        schedule "${pending[@]}"
        count_outcomes "$@"
    fi
}

# Run the commands in the arguments, one on each of GPUS at a time.
schedule() {
    local gpus=${GPUS:-0} command threads ended say
    gpus=(${gpus//,/ })
    [ ${#gpus[@]} -gt 0 ] || stop "GPUS='$GPUS': give a number for each run that is to go on at once"

    # Runs at once share the cores: threads that are more than these wait for each other.
    threads=$(($(nproc) / ${#gpus[@]}))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

    ended=$(mktemp "$root/logs/ended-XXXXXX") || stop "ROOT=$root: nothing can be written there"
    say="python $(quote "$repository/scripts/sweep.py") $(basename "$0") ended"
    say+=" $(quote "$ended") $# $(date +%s)"
    trap 'interrupted=yes' INT # Ctrl-C ends the runs; what follows still says how far they are
    for command; do
        echo "$command; $say"
    done | ask schedule "${gpus[@]}" || true
    rm -f "$ended"
}

# Say how many of the commands are complete, failed, stopped by a signal and missing; fails where
# not all are complete.
count_outcomes() {
    local command log last complete=0 failed=0 stopped=0 missing=0
    for command; do
        log=$(log_of "$command")
        if is_complete "$log"; then
            complete=$((complete + 1))
            continue
        elif [ ! -f "$log" ]; then
            missing=$((missing + 1))
            continue
        fi
        # A launcher of several processes prints its own traceback behind the run's line.
        last=$(tail -n 60 "$log" | grep -E '^train_(teacher|student)\.py: ' | tail -n 1) ||
            last=$(grep . "$log" | tail -n 1)
        if [[ $last = *": stopped by SIG"* ]]; then
            stopped=$((stopped + 1))
        else
            failed=$((failed + 1))
            printf 'failed: %s\n    %s\n    %s\n' "$command" "$log" "$last"
        fi
    done
    echo "runs: $complete complete, $failed failed, $stopped stopped, $missing missing"
    [ "$complete" -eq $# ]
}

# Submit the commands in the arguments as one array job, which starts when that of the stage before
# has ended. A task that is requeued goes on after its last epoch, and its log with it.
previous_job= # of the stage before
submit() {
    [ $# -gt 0 ] || { echo "runs: all complete"; return; }
    local list after=()
    list=$(mktemp "$root/logs/commands-XXXXXX") || stop "ROOT=$root: nothing can be written there"
    # env: a command may begin with a variable
    printf 'exec env %s\n' "$@" >"$list" || stop "$list: it cannot be written"
    [ -z "$previous_job" ] || after=(--dependency "afterany:$previous_job")
    previous_job=$(
        sbatch --parsable --job-name "$(basename "$0" .sh)" --array "1-$#" --requeue \
            --open-mode append --output "$root/logs/slurm-%A_%a.log" "${after[@]}" $SBATCH <<SCRIPT
#!/usr/bin/env bash
eval "\$(sed -n "\${SLURM_ARRAY_TASK_ID}p" $(quote "$list"))"
SCRIPT
    ) || stop "SBATCH='$SBATCH': sbatch has submitted nothing"
    echo "array job $previous_job: $# runs, in $list; squeue shows them"
}
