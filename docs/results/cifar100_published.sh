#!/usr/bin/env bash
# CIFAR-100 at 40 epochs: what do students of a published teacher gain, and from what?
#   KD_DATA=/data TEACHERS=/teachers bash docs/results/cifar100_published.sh [ROW ...]
# TEACHERS holds the ResNet-20 and ResNet-56 of chenyaofo/pytorch-cifar-models
# (cifar100_resnet20-chenyaofo.pth, cifar100_resnet56-chenyaofo.pth).
# Rows, all of them by default:
#   plain               student of the teacher as it is
#   views               student of its logits, divided by the temperature matched on training views
#   undivided           student of the teacher as it is, at T = 1 in place of 4
#   scratch             ResNet-8 without a teacher
#   scratch_calibrated  the same, trained with FL+MDCA
# EPOCHS=6 ROOT=runs/trial makes the first trial of plain and views, and
# EPOCHS=6 ROOT=runs/trial TEACHER=resnet56 the same of the ResNet-56.
#
# Before the first trial it was said: the student of the divided logits will have a temperature
# near 1, and at most a point less top-1.
#
# Before the 40 epochs of plain and views, from that trial (own temperatures 1.55 and 0.91, 4.5
# points lost):
# - The student of the teacher as it is has a temperature of its own within 0.1 of the matched one.
# - The student of the divided logits has one below 1, and a raw ECE below 4 %.
# - It loses between 1 and 4 points of top-1: less than after six epochs, but not nothing.
# - Scaled by its own temperature, the student of the teacher as it is has the lower NLL.
#
# Before the 40 epochs of the other rows:
# - From scratch the net has a raw ECE below 5 %, and less top-1 than the student of the teacher as
#   it is, but more than the student of the divided logits.
# - With FL+MDCA (gamma 1, beta 1) it is underconfident: a temperature below 1.
# - At T = 1 the student's own temperature is within 0.1 of 1, its raw ECE is below that of every
#   other student, and its top-1 is below that of the student at T = 4.
# - Scaled, the lowest NLL of all rows stays that of the student of the teacher as it is.
#
# Before the six epochs of the ResNet-56, which knows its training images by heart:
# - Its matched temperature is above 2, and its student's own one above 1.7, but below the matched.
# - Divided, the student has a temperature below 1, and loses more than the 4.5 points of top-1 that
#   the student of the ResNet-20 lost.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${ROOT:-runs/published}
teacher=${TEACHER:-resnet20}
declare -A accuracy=([resnet20]=0.6883 [resnet56]=0.7263)
common="--dataset cifar100 --model resnet8 --epochs ${EPOCHS:-40} --scheduler cosine --lr 0.1 --wd 5e-4 --seed 42"
norm=0.5070,0.4865,0.4409/0.2673,0.2564,0.2761

distil() { # with T, and with what divides the teacher's logits before
    # shellcheck disable=SC2086
    python train_student.py $common --checkpoint "$root/students" --teacher_cache "$root/cache" \
        --Lambda 0.9 --teacher "$teacher" --teacher_norm $norm --teacher_loss NLL \
        --teacher_path "$TEACHERS/cifar100_$teacher-chenyaofo.pth" "$@"
}

scratch() { # with the loss
    # shellcheck disable=SC2086
    python train_teacher.py $common --checkpoint "$root/scratch" "$@"
}

for row in ${*:-plain views undivided scratch scratch_calibrated}; do
    case $row in
    plain) distil --T 4 ;;
    views) distil --T 4 --teacher_temperature views --teacher_accuracy "${accuracy[$teacher]}" ;;
    undivided) distil --T 1 ;;
    scratch) scratch --loss NLL ;;
    scratch_calibrated) scratch --loss FL+MDCA --gamma 1 --beta 1 ;;
    *)
        echo "there is no row $row" >&2
        exit 2
        ;;
    esac
done
python -m scripts.report "$root" --out "$root/report"
