#!/usr/bin/env bash
# Grids of runs, several at a time; run again, it does only what is missing.
#   bash scripts/hypersearch.sh students -- --model resnet8 --teacher_path runs/teachers/...
#   bash scripts/hypersearch.sh teachers -- --dataset cifar100 --model resnet56
#   bash scripts/hypersearch.sh FL+MDCA NLL+MMCE --seeds 3 -- --model resnet56    grids by name
# What follows -- goes to every command; {seed} in it becomes the run's seed.
#   --seeds N    seeds 42, 43, ... (N of them)
#   --print      print the commands, one a line, instead of running them; as a Slurm array:
#                sbatch --array=1-24 --wrap 'eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p commands.txt)"'
#   GPUS="0 1 2 3"    one job on each; "0 0": two on one; without a GPU: as many jobs as words
#   ROOT=runs         where teachers, students and logs go
#   T="1 4" Lambda=0.9 alpha= gamma= beta= beta_MMCE=    other values than the grids'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The values of the original experiments.
T=${T:-1 1.5 2 3 4 5 10 20}
Lambda=${Lambda:-0.9 0.95 1}
alpha=${alpha:-0.1}
gamma=${gamma:-1 2 3 4 5}
beta=${beta:-1 5 10}
beta_MMCE=${beta_MMCE:-1 2 3 4 5}

quote() { # for a shell, where it needs that
    [[ $1 =~ ^[A-Za-z0-9_.,/:=+{}@%-]+$ ]] && echo "$1" || echo "${1@Q}"
}
root=${ROOT:-runs}
python=${PYTHON:-python}
teacher="$python train_teacher.py --checkpoint $(quote "$root/teachers") --loss"
student="$python train_student.py --checkpoint $(quote "$root/students")"
declare -A grids=(
    [students]="$student --T {T} --Lambda {Lambda}"
    [NLL]="$teacher NLL"
    [LS]="$teacher LS --alpha {alpha}"
    [FL]="$teacher FL --gamma {gamma}"
    [NLL+MDCA]="$teacher NLL+MDCA --beta {beta}"
    [FL+MDCA]="$teacher FL+MDCA --gamma {gamma} --beta {beta}"
    [NLL+MMCE]="$teacher NLL+MMCE --beta {beta_MMCE}"
)
usage() { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
stop() { echo "hypersearch.sh: error: $1" >&2; exit 2; }

names=() seeds=1 print=
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --seeds) seeds=${2:-}; [ $# -eq 1 ] || shift ;;
        --print) print=yes ;;
        --help | -h) usage; exit ;;
        teachers) names+=(NLL LS FL NLL+MDCA FL+MDCA NLL+MMCE) ;;
        *) [ -n "${grids[$1]:-}" ] || stop "no grid $1; give teachers or any of ${!grids[*]}"
           names+=("$1") ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || { usage >&2; exit 2; }
[[ $seeds =~ ^[1-9][0-9]*$ ]] || stop "--seeds '$seeds': give a whole number of at least 1"
seed=$(seq -s ' ' 42 $((41 + seeds)))
[ $# -eq 0 ] || shift # the --
behind=
for word; do behind+=" $(quote "$word")"; done

commands=()
for name in "${names[@]}"; do
    pattern="${grids[$name]} --seed {seed}$behind"
    values=()
    for parameter in T Lambda alpha gamma beta beta_MMCE seed; do
        [[ $pattern != *"{$parameter}"* ]] || values+=(-p "$parameter" ${!parameter})
    done
    made=$(simple_hypersearch "$pattern" --sampling-mode grid "${values[@]}")
    mapfile -t -O ${#commands[@]} commands <<<"$made"
done
if [ -n "$print" ]; then
    printf '%s\n' "${commands[@]}"
    exit
fi

log_of() { echo "$root/logs/$(cksum <<<"$1" | tr ' ' -).log"; }
is_complete() { # a run's log names its folder
    local line
    while read -r line; do
        [ ! -f "$line/result.json" ] || return 0
    done 2>/dev/null <"$1"
    return 1
}

# Runs at once share the cores: threads that are more than these wait for each other.
gpus=${GPUS:-0}
gpus=(${gpus//,/ })
threads=$(($(nproc) / ${#gpus[@]}))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}

mkdir -p "$root/logs"
trap : INT # Ctrl-C ends the runs; what follows still says how far they are
for command in "${commands[@]}"; do
    log=$(log_of "$command")
    is_complete "$log" || echo "$command </dev/null >>$(quote "$log") 2>&1"
done | simple_gpu_scheduler --gpus "${gpus[@]}" || true

complete=0 failed=0 missing=0
for command in "${commands[@]}"; do
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
[ "$complete" -eq ${#commands[@]} ] || exit 1
echo "Their tables: python -m scripts.report $(quote "$root")"
