#!/usr/bin/env bash
# The whole comparison on one data set: a teacher of each loss, its student (KD), and the student's
# net from scratch; of the NLL teacher also a student by each other distillation, by KD with each
# term on features, one whose teacher is calibrated by temperature (auto), and one of an ensemble of
# three. FEATURES= in front leaves out the terms on features, which want nets of ours.
#   bash scripts/baselines.sh                                   synthetic: 51 short runs
#   DATASET=cifar10 TEACHERS=resnet56 STUDENTS=resnet8 bash scripts/baselines.sh --epochs 160
#   SEEDS="42 43 44" bash scripts/baselines.sh --epochs 2       anything behind goes to every command
# --print, GPUS, SBATCH and ROOT: see hypersearch.sh.
# KD has T=4 and Lambda=0.9. The losses and the other distillations have their defaults, but for a
# gamma of 3 in FL.
set -euo pipefail

dataset=${DATASET:-synthetic}
teachers=${TEACHERS:-resnet14}
students=${STUDENTS:-resnet8}
recipe="--epochs 15 --train-batch-size 64"
T=${T:-4} ensemble="42 43 44"
source "$(dirname "${BASH_SOURCE[0]}")/runs.sh"
registered=$(ask losses) || exit 2
mapfile -t losses <<<"$registered"
imitations=$(ask imitations) || exit 2
{ read -r distillations && read -r features; } <<<"$imitations"
source "$repository/scripts/grid.sh"

for teacher in $teachers; do
    # Seeds of the ensemble that are no seeds of the sweep are trained for it alone.
    run="${folder_of[$teacher]}/NLL_seed="
    members=
    for seed in $ensemble; do
        members+=" $(quote "$run$seed")"
        [[ " ${SEEDS:-42} " == *" $seed "* ]] || teaching+=("$train --model $teacher --loss NLL --seed $seed")
    done
    for seed in ${SEEDS:-42}; do
        teacher_run=$(quote "$run$seed")
        for model in $students; do
            for taught in \
                "$teacher_run --T $T --teacher_temperature auto" \
                "${members# } --T $T"; do
                learning+=("$distil --model $model --seed $seed --teacher_path $taught$(naming "$teacher")")
            done
            for distillation in $distillations; do
                learning+=("$distil --model $model --seed $seed --teacher_path $teacher_run \
--distill $distillation$(naming "$teacher")")
            done
            for term in ${FEATURES-$features}; do
                learning+=("$distil --model $model --seed $seed --teacher_path $teacher_run \
--distill KD+$term --T $T$(naming "$teacher")")
            done
        done
    done
done
run_stages teaching learning
