# Sourced by cifar10.sh and cifar100.sh, which set dataset, teachers and students.
seeds=${SEEDS:-42}
root=${ROOT:-runs}
python=${PYTHON:-python}
common="--dataset $dataset --lr 0.1 --wd 5e-4 --train-batch-size 128 $*"

[[ " $* " != *" --exp_name"* ]] || { echo "grid.sh: error: --exp_name: give ROOT=..." >&2; exit 2; }

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

for seed in $seeds; do
    for loss in "${losses[@]}"; do
        flags=${loss#* }
        for model in $teachers $students; do # the students from scratch are the baseline
            $python train_teacher.py $common --model "$model" $flags --seed "$seed" \
                --checkpoint "$root/teachers"
        done
    done
    for model in $students; do
        for teacher in $teachers; do
            for loss in "${losses[@]}"; do
                run="$root/teachers/$dataset/$teacher/${loss%% *}_seed=$seed"
                $python train_student.py $common --model "$model" --teacher_path "$run" \
                    --T 4 --Lambda 0.9 --seed "$seed" --checkpoint "$root/students"
            done
        done
    done
done
