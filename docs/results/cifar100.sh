#!/usr/bin/env bash
# Every run behind docs/results/cifar100.md: CIFAR-100 at 40 epochs, students are ResNet-8.
#   KD_DATA=/data TEACHERS=/teachers bash docs/results/cifar100.sh [ROW ...]
# TEACHERS holds the ResNet-20 and ResNet-56 of chenyaofo/pytorch-cifar-models
# (cifar100_resnet20-chenyaofo.pth, cifar100_resnet56-chenyaofo.pth).
# Rows, by default all but the last four:
#   plain               student of the published ResNet-20 as it is
#   views               student of its logits, divided by the temperature matched on training views
#   undivided           student of it as it is, at T = 1 in place of 4
#   scratch             no teacher
#   scratch_calibrated  no teacher, FL+MDCA in place of NLL
#   teacher             a ResNet-20 trained with FL+MDCA
#   calibrated          its student
#   teacher_nll         a ResNet-20 trained with NLL, and nothing else changed
#   overconfident       its student
#   overconfident_undivided   its student at T = 1
#   overconfident_divided     its student, its logits divided by the temperature of validation
#   together            student of the ResNet-20 trained with NLL of seeds 42, 43 and 44 together,
#                       after SEED=43 and SEED=44 of teacher_nll
#   together_undivided  the same at T = 1
#   scratch_adafocal    no teacher, AdaFocal
#   scratch_cpc         no teacher, CPC
# PYTHON="accelerate launch --cpu --mixed_precision bf16" trains in bfloat16, as seed 44 was, the rows
# from teacher_nll on, and seed 43 of teacher and calibrated. SEED=43 makes a second seed.
# EPOCHS=6 ROOT=runs/trial makes the first trial of plain and views, and with PUBLISHED=resnet56 that
# of the ResNet-56. DATASET=cifar10 makes the rows of cifar10_whole.md, of nets trained here alone.
# cifar100_predictions.md has what was predicted before each row, and what came.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${ROOT:-runs/published}
python=${PYTHON:-python}
seed=${SEED:-42}
published=${PUBLISHED:-resnet20}
dataset=${DATASET:-cifar100}
declare -A accuracy=([resnet20]=0.6883 [resnet56]=0.7263)
norm=0.5070,0.4865,0.4409/0.2673,0.2564,0.2761
common="--dataset $dataset --epochs ${EPOCHS:-40} --scheduler cosine --lr 0.1 --wd 5e-4 --seed $seed"
calibrated="--loss FL+MDCA --gamma 1 --beta 1"

train() { # a net and its loss
    # shellcheck disable=SC2086
    $python train_teacher.py $common "$@"
}

distil() { # from which teacher, at which T
    # shellcheck disable=SC2086
    $python train_student.py $common --model resnet8 --checkpoint "$root/students" --Lambda 0.9 "$@"
}

of_published() { # at which T, and what divides its logits before
    distil --teacher "$published" --teacher_norm $norm --teacher_loss NLL --teacher_cache "$root/cache" \
        --teacher_path "${TEACHERS:-.}/cifar100_$published-chenyaofo.pth" "$@"
}

of_ours() { # by its loss, and flags
    local loss=$1
    shift
    distil --teacher_select last --teacher_path "$root/teachers/$dataset/resnet20/${loss}_seed=$seed" \
        --teacher_cache "$root/cache" "$@"
}

of_all_three() { # at which T
    local run=$root/teachers/$dataset/resnet20/NLL_seed
    distil --teacher_select last --teacher_path "$run=42" "$run=43" "$run=44" --teacher_cache "$root/cache" "$@"
}

all="plain views undivided scratch scratch_calibrated teacher calibrated"
all+=" teacher_nll overconfident overconfident_undivided overconfident_divided"
for row in ${*:-$all}; do
    # shellcheck disable=SC2086
    case $row in
    plain) of_published --T 4 ;;
    views) of_published --T 4 --teacher_temperature views --teacher_accuracy "${accuracy[$published]}" ;;
    undivided) of_published --T 1 ;;
    scratch) train --model resnet8 --checkpoint "$root/scratch" --loss NLL ;;
    scratch_calibrated) train --model resnet8 --checkpoint "$root/scratch" $calibrated ;;
    scratch_adafocal) train --model resnet8 --checkpoint "$root/scratch" --loss AdaFocal ;;
    scratch_cpc) train --model resnet8 --checkpoint "$root/scratch" --loss CPC ;;
    teacher) train --model resnet20 --checkpoint "$root/teachers" $calibrated ;;
    calibrated) of_ours FL+MDCA_gamma=1_beta=1 --T 4 ;;
    teacher_nll) train --model resnet20 --checkpoint "$root/teachers" --loss NLL ;;
    overconfident) of_ours NLL --T 4 ;;
    overconfident_undivided) of_ours NLL --T 1 ;;
    overconfident_divided) of_ours NLL --T 4 --teacher_temperature auto ;;
    together) of_all_three --T 4 ;;
    together_undivided) of_all_three --T 1 ;;
    *)
        echo "there is no row $row" >&2
        exit 2
        ;;
    esac
done
python -m scripts.report "$root" --out "$root/report"
