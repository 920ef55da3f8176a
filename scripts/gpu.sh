#!/usr/bin/env bash
# All that needs a GPU, on one of them and without network, in at most 10 minutes:
#   bash scripts/gpu.sh [FOLDER]          KD_DATA names the folder of cifar10.npz, if any
#   bash scripts/gpu.sh --dry [FOLDER]    the same commands on a CPU, all of them made small
# Writes FOLDER/performance.md, the rows for docs/performance.md, and a log of each part, and ends
# with what has failed (exit code 1) and what is slower than its target.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
dry=
[ "${1:-}" != --dry ] || { dry=yes; shift; }
[[ $# -le 1 && ${1:-} != -* ]] || stop "$*: give --dry or nothing, then one FOLDER at most"
out=$(realpath -m "${1:-gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
data=synthetic
if [ -n "$dry" ]; then
    device=--cpu net=wrn_10_1 steps=eager numbers=1 epochs=2 few=1
    tests=--collect-only small="--seconds 0.01 --batch-size 4" workers="--workers 0"
else
    device= net=resnet56 steps="eager compile graph" numbers="1 2 4 8" epochs=160 few=5
    tests="-p no:randomly" small= workers=
    [ ! -f "${KD_DATA:-data}/cifar10.npz" ] || data=cifar10
fi
mkdir -p "$out"
rm -rf "$out/runs"
failed=() slow=() runs=(--dataset $data --checkpoint "$out/runs")

part() { # its name and its command; what it prints goes to a log
    local name=$1 began=$SECONDS
    shift
    timeout $((began < 600 ? 600 - began : 1)) "$@" >"$out/$name.log" 2>&1 </dev/null ||
        failed+=("$name: $(grep . "$out/$name.log" | tail -n 1)")
    took=$((SECONDS - began))
    echo "$name: $took s"
}
rows() { # a log's text table as Markdown
    grep -E '^[^ ]+.*  ' "$1" | sed -E 's/ {2,}/ | /g; s/^/| /; s/$/ |/'
}

part tests $python -m pytest -q $tests tests/test_steps.py tests/test_speed.py
part fp16 $python -m accelerate.commands.launch $device --num_processes 1 --mixed_precision fp16 \
    train_teacher.py "${runs[@]}" --model $net --loss cross_entropy --epochs $few
for step in $steps; do
    part "benchmark_$step" $python -m scripts.benchmark --quick $small $workers --step "$step"
done
part at_once $python -m scripts.benchmark --at-once $numbers $small
part epochs $python train_teacher.py "${runs[@]}" --model resnet8 --epochs $epochs

{
    head -n 2 "$out/benchmark_eager.log"
    for step in $steps; do
        printf '\nSteps: %s.\n\n' "$step"
        rows "$out/benchmark_$step.log"
    done
    echo
    rows "$out/at_once.log"
    printf '\n%s epochs of resnet8 on %s, the whole process: %s s.\n' $epochs $data $took
} | tee "$out/performance.md"

while IFS='|' read -r row column target what; do # of the last way to launch a step
    measured=$(awk -F'  +' -v row="$row" -v column="$column" \
        '$1 == row { gsub(",", "", $column); print $column + 0 }' "$out/benchmark_$step.log")
    awk -v measured="$measured" -v target="$target" 'BEGIN { exit !(measured >= target) }' ||
        slow+=("$what: ${measured:-not measured}, target $target")
done <<TARGETS
resnet20|3|3658|resnet20, images/s; a GTX 1080 with an ordinary loader
resnet56|3|1372|resnet56, images/s; likewise
resnet8|4|8|resnet8 over the conventional loop
resnet20|4|8|resnet20 over the conventional loop
resnet56|4|5|resnet56 over the conventional loop
resnet56 -> resnet8|4|10|a student over the conventional loop
resnet56 -> resnet8, cached|4|20|cached, over the conventional loop
resnet56 -> resnet8, cached|5|0.87|cached, of a bare step
TARGETS
[ $took -le 60 ] || slow+=("$epochs epochs of resnet8: $took s, target 60 s")
[ ${#slow[@]} -eq 0 ] || printf 'slower than its target: %s\n' "${slow[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
