#!/usr/bin/env bash
# Grids of runs, several at a time; run again, it does only what is missing.
#   bash scripts/hypersearch.sh students -- --model resnet8 --teacher_path runs/teachers/...
#   bash scripts/hypersearch.sh teachers -- --dataset cifar100 --model resnet56
#   bash scripts/hypersearch.sh FL+MDCA NLL+MMCE --seeds 3 -- --model resnet56    grids by name
#   bash scripts/hypersearch.sh KD DKD LSKD DIST -- --teacher_path ...     (students is KD)
# What follows -- goes to every command; {seed} in it becomes the run's seed.
#   --seeds N                       seeds 42, 43, ... (N of them)
#   --n-samples N                   the first N settings of each grid; with
#   --sampling-mode shuffled_grid   N at random, the same ones every time
#   --print                         print the commands, one a line, instead of running them
#   GPUS="0 1 2 3"                  one run on each; "0 0": two on one; no GPU: a run for each word
#   SBATCH="--gres=gpu:1 --time=2:00:00"     submit an array job to Slurm, with these options
#   ROOT=runs                       where teachers, students and logs go
#   T="1 4" Lambda=0.9 gamma= ...   other values than the grids' for a flag
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/runs.sh"

count() { [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "$1 '$2': give a whole number of at least 1"; }
doubled() { sed 's/[{}]/&&/g' <<<"$1"; } # braces, which simple_hypersearch makes single and leaves

names=()
seeds=1
sampling=(--sampling-mode grid --seed 0)
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
        --seeds)
            seeds=${2:-}
            count "$1" "$seeds"
            shift
            ;;
        --n-samples)
            count "$1" "${2:-}"
            sampling+=("$1" "$2")
            shift
            ;;
        --sampling-mode)
            sampling+=("$1" "${2:-}")
            [ $# -eq 1 ] || shift
            ;;
        --print) print=yes ;;
        -*) stop "$1 is none of its options; what goes to every command stands behind --" ;;
        teachers) names+=(NLL LS FL NLL+MDCA FL+MDCA NLL+MMCE) ;;
        students) names+=(KD) ;;
        *) names+=("$1") ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || { bash "$0" --help >&2; exit 2; }
grids=$(ask grids "${names[@]}") || exit 2
[ $# -eq 0 ] || shift # the --
instead=(
    [seed]="give --seeds N in front of the --"
    [loss]="name its grid in front of the --"
    [distill]="name its grid in front of the --"
    [checkpoint]="give ROOT=... in front"
)
while read -r _ kind flag default; do
    if [[ $kind = flag && -n ${!flag:-$default} ]]; then
        instead[$flag]="give $flag=... in front of the whole command"
    fi
done <<<"$grids"
refuse_set "$@"
behind=
for word; do behind+=" $(quote "$word")"; done

sweep=()
for name in "${names[@]}"; do
    if grep -qx "$name distillation" <<<"$grids"; then
        command="$python $(script train_student.py) --checkpoint $(quote "$root/students") --distill $name"
    else
        command="$python $(script train_teacher.py) --checkpoint $(quote "$root/teachers") --loss $name"
    fi
    pattern=$(doubled "$command")
    values=(-p seed '{seed}') # replaced below, for a sample of settings is the same for every seed
    while read -r loss kind flag default; do
        [[ $loss = "$name" && $kind = flag && -n ${!flag:-$default} ]] || continue
        pattern+=" --$flag {$flag}"
        values+=(-p "$flag" ${!flag:-$default})
    done <<<"$grids"
    pattern+=" --seed {seed}$(doubled "$behind")"
    made=$(simple_hypersearch "$pattern" "${sampling[@]}" "${values[@]}") || exit 2
    while read -r command; do
        for ((seed = 42; seed < 42 + seeds; seed++)); do sweep+=("${command//\{seed\}/$seed}"); done
    done <<<"$made"
done
run_stages sweep
