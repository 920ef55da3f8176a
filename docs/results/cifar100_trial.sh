#!/usr/bin/env bash
# A trial on CIFAR-100: does a temperature matched on training views make a calibrated student?
#   KD_DATA=/data TEACHER=cifar100_resnet20-chenyaofo.pth bash docs/results/cifar100_trial.sh
# TEACHER is the ResNet-20 of chenyaofo/pytorch-cifar-models, which has seen all 50,000 training
# images and is right on 68.83 % of the test images. The student is a ResNet-8 that trains for six
# epochs in float32, one seed. Written before the runs: the student of the teacher as it is will be
# overconfident, with a temperature near the matched one; that of the divided logits will have a
# temperature near 1, a smaller ECE, and at most a point less top-1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root=${ROOT:-runs/trial}
common="--dataset cifar100 --model resnet8 --epochs 6 --scheduler cosine --seed 42"
norm=0.5070,0.4865,0.4409/0.2673,0.2564,0.2761

distil() { # with what divides the teacher's logits
    # shellcheck disable=SC2086
    python train_student.py $common --checkpoint "$root/students" --teacher_cache "$root/cache" \
        --T 4 --Lambda 0.9 --teacher resnet20 --teacher_path "$TEACHER" --teacher_norm $norm \
        --teacher_loss NLL "$@"
}
# shellcheck disable=SC2086
python train_teacher.py $common --checkpoint "$root/scratch" --loss NLL
distil
distil --teacher_temperature views --teacher_accuracy 0.6883
python -m scripts.report "$root" --out "$root/report"
