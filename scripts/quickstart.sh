#!/usr/bin/env bash
# From a fresh machine to a calibration table:  bash scripts/quickstart.sh [FOLDER]
# Two teachers, a student of each, and the same student from scratch, on data made in memory.
# SEED=43 in front repeats it with another seed. In the same folder both become one row.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
[[ $# -le 1 && ${1:-} != -* ]] || stop "$*: give one FOLDER at most"
root=$(realpath -m "${1:-quickstart}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
mkdir -p "$root"

seed=${SEED:-42}
calibrated="FL+MDCA --gamma 1 --beta 1"
shared="--dataset synthetic --epochs 10 --train-batch-size 64 --seed $seed --checkpoint"
teachers=$root/synthetic/resnet14

trainings=5
number=0
share_left=100 # of the whole work, in percent
share_trained=0
seconds_trained=0

finished_runs() {
    find "$root" -name result.json | wc -l
}

time_left() { # of all trainings, judged by those that this call has done
    if [ "$share_trained" -eq 0 ]; then
        echo "all take two to eight minutes on two idle cores"
        return
    fi
    local seconds=$((seconds_trained * share_left / share_trained))
    local end
    end=$(date -d "+$seconds seconds" +%H:%M 2>/dev/null) || end=$(date -v "+${seconds}S" +%H:%M)
    echo "about $((seconds / 60)) min $((seconds % 60)) s left, until $end"
}

stopped() { # exit code of the training
    echo "quickstart.sh: training $number of $trainings has stopped (see above); the same command" \
        "goes on there, and 'bash scripts/quickstart.sh FOLDER' with another FOLDER starts anew" >&2
    exit "$1"
}

training() { # its share of the work in percent, what it is, its command
    local share=$1 what=$2
    shift 2
    number=$((number + 1))
    printf '\n== training %s of %s: %s (%s)\n' "$number" "$trainings" "$what" "$(time_left)"
    local before began=$SECONDS
    before=$(finished_runs)
    "$@" || stopped $?
    share_left=$((share_left - share))
    # One that was finished before is only shown, and says nothing about the time.
    if [ "$(finished_runs)" -gt "$before" ]; then
        share_trained=$((share_trained + share))
        seconds_trained=$((seconds_trained + SECONDS - began))
    fi
}

training 22 "teacher resnet14 with NLL" \
    python train_teacher.py $shared "$root" --model resnet14 --loss NLL
training 22 "teacher resnet14 with FL+MDCA" \
    python train_teacher.py $shared "$root" --model resnet14 --loss $calibrated
training 13 "resnet8 from scratch with NLL" \
    python train_teacher.py $shared "$root" --model resnet8 --loss NLL
# The last epoch of a teacher teaches, and the table shows the last epoch: the same net.
training 21 "student resnet8 of the NLL teacher" \
    python train_student.py $shared "$root" --model resnet8 --teacher_select last \
    --teacher_path "$teachers/NLL_seed=$seed"
training 22 "student resnet8 of the FL+MDCA teacher" \
    python train_student.py $shared "$root" --model resnet8 --teacher_select last \
    --teacher_path "$teachers/FL+MDCA_gamma=1_beta=1_seed=$seed"

echo
python -m scripts.report "$root" --epoch last --out "$root/report"
echo "Reliability diagrams and learning curves, in a browser: $root/report/report.html"
