#!/usr/bin/env bash
# Every run behind docs/results/cifar10.md: CIFAR-10, ResNet-20 teachers, ResNet-8 students, three seeds.
#   OMP_NUM_THREADS=1 GPUS="0 0" ROOT=runs KD_DATA=/data PUBLISHED=resnet56-4bfd9763.th \
#       bash docs/results/cifar10.sh            two at a time on a CPU; --print prints the commands
# PUBLISHED is the ResNet-56 of akamaster/pytorch_resnet_cifar10. See scripts/hypersearch.sh for the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/runs.sh"
[ "${1:-}" != --print ] || print=yes

run() { # a script, and where its runs go
    echo "accelerate launch --cpu --num_processes 1 --mixed_precision bf16 $(script "$1") --dataset cifar10" \
        "--scheduler cosine --epochs 40 --checkpoint $(quote "$root/$2")"
}
train=$(run train_teacher.py teachers)
distil="$(run train_student.py students) --teacher_cache $(quote "$root/cache")"
of() { quote "$root/teachers/cifar10/$1_seed=$2"; } # the folder of a teacher's run
published="$(quote "${PUBLISHED:-resnet56-4bfd9763.th}") --teacher resnet56 --teacher_norm imagenet --teacher_loss NLL"
losses=(NLL "FL+MDCA --gamma 1 --beta 1" "FL+MDCA --gamma 3 --beta 1" "LS --alpha 0.1")
for seed in 42 43 44; do
    for loss in "${losses[@]}"; do
        teaching+=("$train --model resnet20 --seed $seed --loss $loss")
    done
    for loss in "${losses[@]:0:2}"; do
        teaching+=("$train --model resnet8 --seed $seed --loss $loss")
    done

    teachers=(
        "$(of resnet20/NLL $seed)"
        "$(of resnet20/FL+MDCA_gamma=1_beta=1 $seed)"
        "$(of resnet20/FL+MDCA_gamma=3_beta=1 $seed)"
        "$(of resnet20/LS_alpha=0.1 $seed)"
        "$(of resnet20/NLL $seed) --teacher_temperature auto"
        "$(of resnet20/NLL 42) $(of resnet20/NLL 43) $(of resnet20/NLL 44)"
        "$published"
    )
    for T in 4 1; do
        for teacher in "${teachers[@]}"; do
            learning+=("$distil --model resnet8 --seed $seed --T $T --teacher_path $teacher")
        done
    done
    small=$(of resnet8/FL+MDCA_gamma=1_beta=1 $seed)
    learning+=("$distil --model resnet20 --seed $seed --T 4 --teacher_path $small")
done
run_stages teaching learning
