# Sourced by cifar10.sh and its like. They set dataset, teachers, students and recipe, and losses if
# these are not the paper's. Leaves the commands in teaching and learning.
source "$(dirname "${BASH_SOURCE[0]}")/runs.sh"

of_one_loss="hypersearch.sh and train_teacher.py take other ones"
instead=(
    [alpha]=$of_one_loss [beta]=$of_one_loss [gamma]=$of_one_loss [loss]=$of_one_loss
    [checkpoint]="give ROOT=... in front"
    [dataset]="baselines.sh takes another one: DATASET=... in front"
    [distill]="baselines.sh has every one"
    [exp_name]="give ROOT=... in front"
    [model]="baselines.sh takes other ones: TEACHERS=... STUDENTS=... in front"
    [seed]='give SEEDS="1 2 3" in front'
    [teacher_path]="give ROOT=... in front, where the teachers are"
    [T]="give T=... in front"
    [Lambda]="give Lambda=... in front"
)
refuse_set "$@"
for name in T Lambda; do
    words=(${!name:-})
    [ ${#words[@]} -le 1 ] || stop "$name='${!name}': this sweep takes one value, hypersearch.sh several"
done
common="--dataset $(quote "$dataset") $recipe"
for word; do
    case $word in
        --print) print=yes ;;
        *) common+=" $(quote "$word")" ;;
    esac
done

# One line per way to train a teacher, with the weights that did best in the original experiments:
# the beginning of the run's name, and the flags.
[ -n "${losses:-}" ] || losses=(
    "NLL                    --loss NLL"
    "LS_alpha=0.1           --loss LS --alpha 0.1"
    "NLL+MMCE_beta=2        --loss MMCE --beta 2"
    "FL_gamma=3             --loss FL --gamma 3"
    "NLL+MDCA_beta=1        --loss NLL+MDCA --beta 1"
    "FL+MDCA_gamma=3_beta=1 --loss FL+MDCA --gamma 3 --beta 1"
)

# The folder of each teacher's runs, which may be called otherwise than data set and net.
declare -A folder_of=()
folders=$(ask folders "$dataset" $teachers) || exit 2
while read -r teacher folder; do folder_of[$teacher]=$root/teachers/$folder; done <<<"$folders"
# A net of the user's own, mynet.py:tiny, is named again by its students.
naming() { if [[ $1 == *.py:* ]]; then echo " --teacher $1"; fi; }

train="$python $(script train_teacher.py) $common --checkpoint $(quote "$root/teachers")"
distil="$python $(script train_student.py) $common --checkpoint $(quote "$root/students")"
teaching=()
learning=()
for seed in ${SEEDS:-42}; do
    for loss in "${losses[@]}"; do
        flags=$(xargs <<<"${loss#* }")
        for model in $teachers $students; do # the students from scratch are the baseline
            teaching+=("$train --model $model $flags --seed $seed")
        done
        for model in $students; do
            for teacher in $teachers; do
                run="${folder_of[$teacher]}/${loss%% *}_seed=$seed"
                learning+=("$distil --model $model --seed $seed --teacher_path $(quote "$run")$(naming "$teacher") \
--T ${T:-2} --Lambda ${Lambda:-0.9}")
            done
        done
    done
done
