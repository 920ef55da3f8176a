#!/usr/bin/env bash
# All that needs a GPU, on one of them and without network, in at most 10 minutes, and first what a
# first GPU is most likely to show:
#   bash scripts/gpu.sh [FOLDER]          KD_DATA names the folder of cifar10.npz, if any
#   bash scripts/gpu.sh --dry [FOLDER]    the same commands on a CPU, all of them made small
# KD_SECONDS=1200 gives it twice the time. KD_PARTS="7 8 10" goes on with these parts, numbered below,
# in the same FOLDER. Writes FOLDER/performance.md, the rows for docs/performance.md, and a log of each
# part, and ends with what has failed (exit code 1), what is slower than its target, and what there was
# no time for. Its runs lie in FOLDER/made-by-gpu.sh, which the next start of all parts empties; nothing
# else is deleted.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"
dry=
[ "${1:-}" != --dry ] || { dry=yes; shift; }
[[ $# -le 1 && ${1:-} != -* ]] || stop "$*: give --dry or nothing, then one FOLDER at most"
out=$(realpath -m "${1:-gpu}")
own=$out/made-by-gpu.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
limit=${KD_SECONDS:-600}
chosen=${KD_PARTS:-1 2 3 4 5 6 7 8 9 10}
[[ $chosen =~ ^\ *([1-9]|10)(\ +([1-9]|10))*\ *$ ]] || stop "KD_PARTS=$chosen: give some of 1 to 10"
[ -z "$dry" ] || limit=1800
[ ! -e "$out/performance.md" ] || [ -d "$own" ] ||
    stop "$out/performance.md: another hand has written it; give another FOLDER"
mkdir -p "$out"
[ -n "${KD_PARTS:-}" ] || rm -rf "$own"
mkdir -p "$own"
failed=()
slow=()
undone=()

if [ -n "$dry" ]; then
    export ACCELERATE_USE_CPU=true
    data=$own/tiny.npz
    step=eager
    net=wrn_10_1
    epochs=4
    numbers=1
    sizes=(--train-batch-size 16)
    small=(--seconds 0.01 --batch-size 4)
    workers=(--workers 0)
    tests=(--collect-only)
    at_once=(--seconds 0.01 --batch-size 16)
    $python -c '
import sys
import numpy as np

images, labels = np.zeros((80, 8, 8, 3), np.uint8), np.arange(80) % 4
np.savez(sys.argv[1], x_train=images, y_train=labels, x_test=images, y_test=labels)' "$data"
else
    data=synthetic
    step=graph
    net=resnet56
    epochs=160
    numbers="1 4"
    sizes=()
    small=()
    workers=()
    tests=(-p no:randomly)
    at_once=(--seconds 8)
    [ ! -f "${KD_DATA:-data}/cifar10.npz" ] || data=cifar10
fi

is_chosen() { [[ " $chosen " == *" $1 "* ]]; }
part() { # the seconds it may take, its name and its command; what it prints goes to a log
    local most=$1 name=$2 began=$SECONDS left=$((limit - SECONDS)) log=$out/$2.log code=0
    shift 2
    [ -z "$dry" ] || most=$limit
    [ "$left" -ge 15 ] || { undone+=("$name"); return 1; }
    # A program that hangs in the driver sees no SIGTERM.
    timeout --kill-after=5 $((left < most ? left : most)) "$@" >"$log" 2>&1 </dev/null || code=$?
    echo "$name: $((SECONDS - began)) s"
    case $code in
        0) return ;;
        124 | 137)
            if [ "$left" -lt "$most" ]; then
                undone+=("$name, which had $left s of $most")
            else
                failed+=("$name: it took more than $most s")
            fi
            ;;
        *) failed+=("$name: $(grep . "$log" | tail -n 1)") ;;
    esac
    return 1
}
run() { # the seconds it may take, its name, its precision, its script and flags
    local most=$1 name=$2 precision=$3 script=$4
    shift 4
    rm -rf "$own/runs/$name" # a finished run would be shown, and not trained
    part "$most" "$name" $python -m accelerate.commands.launch --num_processes 1 \
        --mixed_precision "$precision" "$script" --dataset "$data" --checkpoint "$own/runs/$name" \
        "${sizes[@]}" "$@"
}
short() { # the same, of a small net for two epochs
    run 40 "$@" --model resnet8 --epochs 2
}
graph() { # in graphs that must succeed
    short "$@" --step "$step"
}
agree() { # a captured run with the same run kernel by kernel, whose name ends in _eager
    local worst
    worst=$($python -c '
import json
import sys
from pathlib import Path

losses = []
for root in sys.argv[1:]:
    file = next(Path(root).rglob("metrics.jsonl"))
    losses.append([json.loads(line)["train_loss"] for line in file.read_text().splitlines()])
print(round(100 * max(abs(a / b - 1) for a, b in zip(*losses, strict=True)), 2))' \
        "$own/runs/$1" "$own/runs/$1_eager") || return
    echo "$1: its loss differs from that of an eager run by at most $worst %"
    awk -v worst="$worst" 'BEGIN { exit !(worst <= 3) }' ||
        failed+=("$1: its loss differs from that of an eager run by $worst %")
}
of_epochs() { # a run's name and a function of the values `seconds` and `rates` of its epochs
    $python -c '
import json
import sys
from pathlib import Path
from statistics import median

file = next(Path(sys.argv[1]).rglob("metrics.jsonl"))
records = [json.loads(line) for line in file.read_text().splitlines()]
seconds = [record["seconds"] for record in records]
rates = [record["images_per_second"] for record in records]
print(round(eval(sys.argv[2])))' "$own/runs/$1" "$2"
}
rows() { # a log's text table as Markdown
    grep -E '^[^ ]+.*  ' "$1" | sed -E 's/ {2,}/ | /g; s/^/| /; s/$/ |/'
}

# 1. The device, and what this build of torch has kernels for.
is_chosen 1 && part 30 device $python -c '
import torch
from utils.program.processes import start

device = start().device
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_arch_list())
if device.type == "cuda":
    print(torch.cuda.get_device_properties(device))
print(float(torch.ones(2, 2, device=device).mm(torch.ones(2, 2, device=device)).sum()))'
[ ! -f "$out/device.log" ] || cat "$out/device.log"

# 2. Graphs in each precision, one loss of each kind, mixtures, students.
is_chosen 2 && graph no_NLL no train_teacher.py --loss NLL
if is_chosen 2 && [ -z "$dry" ]; then
    graph fp16_FL+MMCE fp16 train_teacher.py --loss FL+MMCE
    graph bf16_LS+MDCA bf16 train_teacher.py --loss LS+MDCA
    graph cutmix no train_teacher.py --loss FLSD --mix cutmix
    graph fp16_AdaFocal fp16 train_teacher.py --loss AdaFocal
    graph bf16_Brier+CPC bf16 train_teacher.py --loss Brier+CPC
    graph no_DFL+MbLS no train_teacher.py --loss DFL+MbLS
    graph no_NLL+DCA no train_teacher.py --loss NLL+DCA
    graph student no train_student.py --teacher_path "$own/runs/no_NLL"
    graph student_fp16 fp16 train_student.py --teacher_path "$own/runs/no_NLL" --distill DKD
    graph ema_cutout fp16 train_teacher.py --loss NLL --ema 0.99 --cutout 8
    graph features bf16 train_student.py --teacher_path "$own/runs/no_NLL" --distill KD+FitNet
    graph views fp16 train_student.py --teacher_path "$own/runs/no_NLL" \
        --teacher_temperature views
    graph fills_cache bf16 train_student.py --teacher_path "$own/runs/no_NLL" \
        --teacher_cache "$own/cache" --T 1
    # A rate or a scale that a graph had frozen would show in the loss.
    graph fp16 fp16 train_teacher.py --loss NLL --scheduler cosine
    short fp16_eager fp16 train_teacher.py --loss NLL --scheduler cosine --step eager
    graph bf16 bf16 train_teacher.py --loss NLL --mix mixup --ema 0.9
    short bf16_eager bf16 train_teacher.py --loss NLL --mix mixup --ema 0.9 --step eager
    agree fp16
    agree bf16
fi
is_chosen 2 && graph cached bf16 train_student.py --teacher_path "$own/runs/no_NLL" \
    --teacher_cache "$own/cache"

# 3. The tests of steps and speed, but for those that may break a process.
hard="cannot_be_captured or deterministic or compiled"
is_chosen 3 && part 180 tests $python -m pytest -q "${tests[@]}" \
    tests/test_steps.py tests/test_speed.py tests/test_batches.py \
    -k "not day_of_a_gpu and not ($hard)"

# 4. Speed, in graphs.
is_chosen 4 && part 240 "benchmark_$step" $python -m scripts.benchmark --quick "${small[@]}" "${workers[@]}" \
    --step "$step"

# 5. A whole run against the sum of its epochs, on as many images as CIFAR has.
if is_chosen 5; then
    rm -f "$own/epochs.seconds"
    large=$data
    if [[ $data = synthetic ]]; then
        large=$own/random.npz
        $python -c '
import sys
import numpy as np

draw = np.random.default_rng(0).integers
arrays = {}
for split, images in (("train", 50_000), ("test", 10_000)):
    arrays[f"x_{split}"] = draw(256, size=(images, 32, 32, 3), dtype=np.uint8)
    arrays[f"y_{split}"] = np.arange(images) % 10
np.savez(sys.argv[1], **arrays)' "$large"
    fi
    began=$SECONDS
    data=$large run 120 epochs no train_teacher.py --model resnet8 --epochs $epochs --step "$step" &&
        echo $((SECONDS - began)) >"$own/epochs.seconds"
fi
wall=$(cat "$own/epochs.seconds" 2>/dev/null)

# 6. The kernels of a step.
is_chosen 6 && part 60 profile $python -m scripts.profile_step --model resnet8 --step "$step" \
    $([ -z "$dry" ] || echo --batch-size 4)

# 7. Runs at once: with CUDA's MPS, kernels of several processes overlap.
is_chosen 7 && part 120 at_once $python -m scripts.benchmark --at-once $numbers --step "$step" \
    "${at_once[@]}"
if is_chosen 7 && [ -z "$dry" ] && command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$out/mps CUDA_MPS_LOG_DIRECTORY=$out/mps
    mkdir -p "$out/mps"
    end_mps() { timeout 20 nvidia-cuda-mps-control <<<quit; }
    if timeout 20 nvidia-cuda-mps-control -d; then
        trap end_mps EXIT
        part 80 at_once_mps $python -m scripts.benchmark --at-once 4 --step "$step" "${at_once[@]}"
        end_mps
        trap - EXIT
    fi
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
fi

# 8. The same bits twice, and what no graph can hold.
if is_chosen 8 && [ -z "$dry" ]; then
    run 40 deterministic no train_teacher.py --model resnet8 --epochs 2 --loss FL --deterministic
    part 60 hard $python -m pytest -q "${tests[@]}" tests/test_steps.py \
        -k "cannot_be_captured or deterministic"
fi

# 9. Two GPUs against one.
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
if is_chosen 9 && [ -z "$dry" ] && [ "$gpus" -ge 2 ]; then
    rm -rf "$own/runs/two_gpus"
    part 60 two_gpus $python -m accelerate.commands.launch --multi_gpu --num_processes 2 \
        train_teacher.py --dataset $data --model resnet8 --epochs 3 --checkpoint "$own/runs/two_gpus"
fi

# 10. What is left is for the compiler.
if is_chosen 10 && [ -z "$dry" ]; then
    part 300 benchmark_compile $python -m scripts.benchmark --quick --step compile
    part 120 compiled $python -m pytest -q "${tests[@]}" tests/test_steps.py -k compiled
    run 200 compiled_bf16 bf16 train_teacher.py --model $net --epochs 2 --step compile
fi

{
    [ ! -f "$out/benchmark_$step.log" ] || sed -n '/^[0-9]\{4\}-/,/^$/p' "$out/benchmark_$step.log"
    for log in "$out/benchmark_$step.log" "$out/benchmark_compile.log"; do
        [ -f "$log" ] || continue
        printf '\n%s\n\n' "Steps: $(basename "$log" .log | sed s/benchmark_//)."
        rows "$log"
    done
    for log in "$out/at_once.log" "$out/at_once_mps.log"; do
        [ -f "$log" ] || continue
        printf '\n%s\n\n' "Runs at once, $([[ $log != *mps* ]] && echo without || echo with) MPS."
        rows "$log"
    done
    [ -z "$wall" ] ||
        printf '\n%s epochs of resnet8 on %s, the whole process: %s s; the sum of its epochs: %s s.\n' \
            "$epochs" "$(ls "$own/runs/epochs")" "$wall" "$(of_epochs epochs 'sum(seconds)')"
    [ ! -d "$own/runs/two_gpus" ] ||
        printf 'resnet8 on two GPUs %s images/s, on one %s.\n' \
            "$(of_epochs two_gpus 'rates[-1]')" "$(of_epochs epochs 'median(rates)')"
    if [ -f "$out/profile.log" ]; then
        printf '\nA step, 20 of them profiled:\n\n'
        grep -E 'kernels a step|conversions of layout' "$out/profile.log"
    fi
} | tee "$out/performance.md"

while IFS='|' read -r row column target what; do
    measured=$(awk -F'  +' -v row="$row" -v column="$column" \
        '$1 == row { gsub(",", "", $column); print $column + 0 }' "$out/benchmark_$step.log" 2>/dev/null)
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
resnet56 -> resnet8, cached|5|0.87|cached, of a bare step that is launched likewise
TARGETS
took=${wall:+$wall s}
[ "${wall:-999}" -le 60 ] || slow+=("$epochs epochs of resnet8: ${took:-not measured}, target 60 s")
[ ${#undone[@]} -eq 0 ] || printf 'no time was left for: %s\n' "${undone[@]}"
[ ${#slow[@]} -eq 0 ] || printf 'slower than its target: %s\n' "${slow[@]}"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
