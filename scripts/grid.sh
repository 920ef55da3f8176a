# Sourced by cifar10.sh and its like, which set dataset, teachers, students and recipe.
source "$(dirname "${BASH_SOURCE[0]}")/runs.sh"
seeds=${SEEDS:-42}

common="--dataset $dataset $recipe"
for word; do
    [[ $word != --exp_name* ]] || stop "--exp_name: give ROOT=..."
    [ "$word" != --print ] || continue
    common+=" $(quote "$word")"
done

# One line per way to train a teacher, with the weights that did best in the original experiments:
# the beginning of the run's name, and the flags.
losses=(
    "NLL                    --loss NLL"
    "LS_alpha=0.1           --loss LS --alpha 0.1"
    "NLL+MMCE_beta=2        --loss MMCE --beta 2"
    "FL_gamma=3             --loss FL --gamma 3"
    "NLL+MDCA_beta=1        --loss NLL+MDCA --beta 1"
    "FL+MDCA_gamma=3_beta=1 --loss FL+MDCA --gamma 3 --beta 1"
)

teaching=() learning=()
for seed in $seeds; do
    for loss in "${losses[@]}"; do
        flags=$(xargs <<<"${loss#* }")
        for model in $teachers $students; do # the students from scratch are the baseline
            teaching+=("$python $(script train_teacher.py) $common --model $model $flags \
--seed $seed --checkpoint $(quote "$root/teachers")")
        done
        for model in $students; do
            for teacher in $teachers; do
                run="$root/teachers/$dataset/$teacher/${loss%% *}_seed=$seed"
                learning+=("$python $(script train_student.py) $common --model $model \
--teacher_path $(quote "$run") --T ${T:-2} --Lambda ${Lambda:-0.9} --seed $seed --checkpoint $(quote "$root/students")")
            done
        done
    done
done

if [[ " $* " == *" --print "* ]]; then
    printf '%s\n' "${teaching[@]}" "${learning[@]}"
else
    # A run that fails is said at the end of its round; the others go on.
    run_commands "${teaching[@]}" || failed=yes
    run_commands "${learning[@]}" || failed=yes
    echo "Their tables: python -m scripts.report $(quote "$root")"
    [ -z "${failed:-}" ]
fi
