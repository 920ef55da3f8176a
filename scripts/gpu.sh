#!/usr/bin/env bash
# All that needs a GPU, on one of them and without network, in at most 10 minutes:
#   bash scripts/gpu.sh [FOLDER]          KD_DATA names the folder of cifar10.npz, if any
#   bash scripts/gpu.sh --dry [FOLDER]    the same commands on a CPU, all of them made small
# Writes FOLDER/performance.md, the rows for docs/performance.md, and a log of each part, and ends
# with what has failed (exit code 1) and what is slower than its target.
set -uo pipefail
dry=
[ "${1:-}" != --dry ] || { dry=yes; shift; }
out=$(realpath -m "${1:-gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
data=synthetic
if [ -n "$dry" ]; then
    device=--cpu net=resnet8 steps=eager judged=eager numbers=1 epochs=2 few=1
    batch="--batch-size 8"
    tests=--collect-only size="--quick --rounds 1 --seconds 0.05 --workers 0 $batch"
else
    device= net=resnet56 steps="eager graph compile" judged=graph numbers="1 2 4 8" epochs=160 few=5
    tests="-p no:randomly" size=--quick batch=
    [ ! -f "${KD_DATA:-data}/cifar10.npz" ] || data=cifar10
fi
mkdir -p "$out"
rm -rf "$out/runs"
failed=() slow=()

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
cell() { # of a log's table: the number in that row and column
    awk -F'  +' -v row="$2" -v column="$3" \
        '$1 == row { gsub(",", "", $column); print $column + 0 }' "$1"
}
at_least() { # what, as measured, its target
    awk -v measured="$2" -v target="$3" 'BEGIN { exit !(measured >= target) }' ||
        slow+=("$1: ${2:-not measured}, target $3")
}

part tests $python -m pytest -q $tests tests/test_steps.py tests/test_speed.py
part fp16 $python -m accelerate.commands.launch $device --num_processes 1 --mixed_precision fp16 \
    train_teacher.py --dataset $data --model $net --loss cross_entropy --epochs $few \
    --checkpoint "$out/runs"
for step in $steps; do
    part "benchmark_$step" $python -m scripts.benchmark $size --step "$step"
done
part at_once $python -m scripts.benchmark --at-once $numbers $batch
part epochs $python train_teacher.py --dataset $data --model resnet8 --epochs $epochs \
    --checkpoint "$out/runs"

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

log="$out/benchmark_$judged.log"
at_least "resnet20, images/s" "$(cell "$log" resnet20 3)" 3658 # a GTX 1080 with an ordinary loader
at_least "resnet56, images/s" "$(cell "$log" resnet56 3)" 1372 # likewise
at_least "resnet8 over the conventional loop" "$(cell "$log" resnet8 4)" 8
at_least "resnet20 over the conventional loop" "$(cell "$log" resnet20 4)" 8
at_least "resnet56 over the conventional loop" "$(cell "$log" resnet56 4)" 5
at_least "a student over the conventional loop" "$(cell "$log" "resnet56 -> resnet8" 4)" 10
at_least "cached, over the conventional loop" "$(cell "$log" "resnet56 -> resnet8, cached" 4)" 20
at_least "cached, of a bare step" "$(cell "$log" "resnet56 -> resnet8, cached" 5)" 0.87
at_least "seconds to spare of 60 for $epochs epochs of resnet8" $((60 - took)) 0
[ ${#slow[@]} -eq 0 ] || printf 'slower than its target: %s\n' "${slow[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
