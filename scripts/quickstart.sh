#!/usr/bin/env bash
# From a fresh machine to a calibration table:  bash scripts/quickstart.sh [FOLDER]
# Two teachers, a student of each, and the same student from scratch, on data made in memory.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
[[ $# -le 1 && ${1:-} != -* ]] || stop "$*: give one FOLDER at most"
root=$(realpath -m "${1:-quickstart}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

shared="--dataset synthetic --train-batch-size 64 --checkpoint"
teacher="--model resnet14 --epochs 15"
student="--model resnet8 --epochs 15"

python train_teacher.py $shared "$root" $teacher --loss NLL
python train_teacher.py $shared "$root" $teacher --loss FL+MDCA --gamma 2 --beta 1
python train_teacher.py $shared "$root" $student --loss NLL
for loss in NLL FL+MDCA_gamma=2_beta=1; do
    python train_student.py $shared "$root" $student \
        --teacher_path "$root/synthetic/resnet14/${loss}_seed=42" --teacher_select last
done

# The last epoch: on 200 validation images the best one is a matter of luck.
python -m scripts.report "$root" --epoch last --out "$root/report"
echo "Reliability diagrams and learning curves, in a browser: $root/report/report.html"
