# Sourced by cifar10.sh and cifar100.sh, which set dataset, teachers and students.
seeds=${SEEDS:-42}
root=${ROOT:-runs}
python=${PYTHON:-python}
common="--dataset $dataset --lr 0.1 --wd 5e-4 --train-batch-size 128 $*"

# One line per way to train a teacher, with the weights that did best in the original experiments.
losses=(
    "--loss NLL"
    "--loss LS --alpha 0.1"
    "--loss MMCE --beta 2"
    "--loss FL --gamma 3"
    "--loss NLL+MDCA --beta 1"
    "--loss FL+MDCA --gamma 3 --beta 1"
)

for seed in $seeds; do
    for loss in "${losses[@]}"; do
        for model in $teachers $students; do # the students from scratch are the baseline
            $python train_teacher.py $common --model "$model" $loss --seed "$seed" \
                --checkpoint "$root/teachers"
        done
    done
    for model in $students; do
        for teacher in $teachers; do
            for run in "$root/teachers/$dataset/$teacher"/*_seed="$seed"; do
                $python train_student.py $common --model "$model" --teacher_path "$run" \
                    --T 4 --Lambda 0.9 --seed "$seed" --checkpoint "$root/students"
            done
        done
    done
done
