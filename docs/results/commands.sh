#!/usr/bin/env bash
# Every run behind docs/results.md: CIFAR-10, ResNet-20 teachers, ResNet-8 students, three seeds.
#   KD_DATA=/data bash docs/results/commands.sh --print      the commands, teachers first
#   OMP_NUM_THREADS=1 GPUS="0 0" ROOT=runs KD_DATA=/data PUBLISHED=resnet56-4bfd9763.th \
#       bash docs/results/commands.sh                        two at a time on a CPU
# PUBLISHED is the ResNet-56 of akamaster/pytorch_resnet_cifar10. See scripts/runs.sh for the rest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/runs.sh"
[ "${1:-}" != --print ] || print=yes

launch="accelerate launch --cpu --num_processes 1 --mixed_precision bf16"
recipe="--dataset cifar10 --scheduler cosine --epochs 40"
train="$launch $(script train_teacher.py) $recipe --checkpoint $(quote "$root/teachers")"
distil="$launch $(script train_student.py) $recipe --checkpoint $(quote "$root/students")"
distil+=" --teacher_cache $(quote "$root/cache")"
published="$(quote "${PUBLISHED:-resnet56-4bfd9763.th}") --teacher resnet56 --teacher_norm imagenet --teacher_loss NLL"

teachers=(NLL "FL+MDCA --gamma 1 --beta 1" "FL+MDCA --gamma 3 --beta 1" "LS --alpha 0.1")
for seed in 42 43 44; do
    for loss in "${teachers[@]}"; do
        teaching+=("$train --model resnet20 --seed $seed --loss $loss")
    done
    for loss in "${teachers[@]:0:2}"; do # from scratch
        teaching+=("$train --model resnet8 --seed $seed --loss $loss")
    done
    runs=$root/teachers/cifar10/resnet20 calibrated=FL+MDCA_gamma=1_beta=1_seed=$seed
    nll=$(quote "$runs/NLL_seed=$seed") all=
    for member in 42 43 44; do all+=" $(quote "$runs/NLL_seed=$member")"; done
    for T in 4 1; do
        for teacher in "$nll" "$(quote "$runs/$calibrated")" \
            "$(quote "$runs/FL+MDCA_gamma=3_beta=1_seed=$seed")" \
            "$(quote "$runs/LS_alpha=0.1_seed=$seed")" \
            "$nll --teacher_temperature auto" "${all# }" "$published"; do
            learning+=("$distil --model resnet8 --seed $seed --T $T --teacher_path $teacher")
        done
    done
    small=$(quote "${runs%20}8/$calibrated") # teaches a larger net
    learning+=("$distil --model resnet20 --seed $seed --T 4 --teacher_path $small")
done
run_stages teaching learning
