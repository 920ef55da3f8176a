"""What is said of a word on the command line that is no flag: what its user most likely means."""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise

ALIKE = 0.8  # as difflib measures it, of names without dashes: `epoch` and `epochs` have 0.91
SHORTEST = 3  # letters of a beginning that stands for a flag

# What other code bases call a flag. Of several, the first that the program has.
MEANT = {
    "a": ("--model",),
    "arch": ("--model",),
    "b": ("--train-batch-size", "--batch-size"),
    "batch_size": ("--train-batch-size", "--test-batch-size"),
    "batchsize": ("--train-batch-size", "--test-batch-size"),
    "bs": ("--train-batch-size", "--test-batch-size"),
    "criterion": ("--loss", "--distill"),
    "cutmix": ("--mix",),
    "data": ("--data_dir",),
    "data_path": ("--data_dir",),
    "data_root": ("--data_dir",),
    "early_stopping": ("--patience",),
    "ema_decay": ("--ema",),
    "experiment": ("--exp_name",),
    "force": ("--overwrite",),
    "hint_layer": ("--feature_layer",),
    "img_size": ("--image_size",),
    "input_size": ("--image_size",),
    "kd_alpha": ("--Lambda",),
    "kd_weight": ("--Lambda",),
    "lam": ("--Lambda",),
    "learning_rate": ("--lr",),
    "lr_decay_epochs": ("--schedule-steps",),
    "lr_decay_rate": ("--lr-decay-factor",),
    "lr_scheduler": ("--scheduler",),
    "lr_steps": ("--schedule-steps",),
    "method": ("--distill", "--loss"),
    "milestones": ("--schedule-steps",),
    "mixup": ("--mix",),
    "model_ema": ("--ema",),
    "model_ema_decay": ("--ema",),
    "model_s": ("--model",),
    "model_t": ("--teacher",),
    "name": ("--exp_name",),
    "net": ("--model",),
    "num_epochs": ("--epochs",),
    "out": ("--checkpoint",),
    "out_dir": ("--checkpoint", "--out"),
    "output": ("--checkpoint", "--out"),
    "output_dir": ("--checkpoint", "--out"),
    "path_t": ("--teacher_path",),
    "report_to": ("--log_with",),
    "save": ("--checkpoint", "--out"),
    "save_dir": ("--checkpoint", "--out"),
    "schedule": ("--schedule-steps",),
    "student": ("--model",),
    "tau": ("--T",),
    "teacher_checkpoint": ("--teacher_path",),
    "teacher_model": ("--teacher",),
    "temp": ("--T",),
    "temperature": ("--T",),
    "tensorboard": ("--log_with",),
    "tracker": ("--log_with",),
    "wandb": ("--log_with",),
    "warmup_epochs": ("--warmup",),
}
# The flags that only one of the entry scripts has, but for those of losses, which are registered.
STUDENT = (
    "teacher_path",
    "teacher_logits",
    "teacher",
    "teacher_loss",
    "teacher_select",
    "teacher_norm",
    "teacher_key",
    "teacher_size",
    "teacher_temperature",
    "teacher_accuracy",
    "teacher_cache",
    "distill",
    "feature_layer",
)
TEACHER = ("loss",)

SEEDS = (
    'a run has one seed; SEEDS="1 2 3" bash scripts/cifar10.sh runs several, and so does '
    "bash scripts/hypersearch.sh NLL --seeds 3"
)
GPU = "say CUDA_VISIBLE_DEVICES=0 in front of the command; without a GPU the CPU is used"
PRECISION = "start it with accelerate launch --mixed_precision fp16 (or bf16) instead of python"
PROCESSES = "start it with accelerate launch --num_processes 4 instead of python"
OPTIMISER = "--optimizer sgd or --optimizer adamw chooses it; see --lr, --momentum and --wd"
LOADERS = "all images lie on the device, so there are no loader processes; leave it out"
SETTINGS = "there are no files of settings; a run's config.json has the command that repeats it"
RESUME = "type the same command again: it goes on after the last epoch"
# What train_teacher.py and train_student.py have no flag for, and what to do instead.
ADVICE = {
    "adam": OPTIMISER,
    "amp": PRECISION,
    "bf16": PRECISION,
    "cfg": SETTINGS,
    "config": SETTINGS,
    "cuda": GPU,
    "device": GPU,
    "distributed": PROCESSES,
    "eval": "a run measures the test split at its end; scripts.evaluate and scripts.report do more",
    "evaluate": "a run measures the test split at its end; python -m scripts.evaluate does more",
    "fp16": PRECISION,
    "gpu": GPU,
    "gpu_id": GPU,
    "gpu_ids": GPU,
    "gpus": GPU,
    "half": PRECISION,
    "j": LOADERS,
    "label_smoothing": "it is a loss of train_teacher.py: --loss LS --alpha 0.1",
    "mixed_precision": PRECISION,
    "nesterov": OPTIMISER,
    "num_classes": "it follows from --dataset; leave it out",
    "num_processes": PROCESSES,
    "num_workers": LOADERS,
    "opt": OPTIMISER,
    "optim": OPTIMISER,
    "pretrained": "only a teacher can be pretrained: --teacher_path FILE, or --teacher timm/NAME "
    "--teacher_path pretrained, of train_student.py",
    "resume": RESUME,
    "seeds": SEEDS,
    "val_split": "a tenth of the training images validates; --split-seed says which",
    "workers": LOADERS,
    "world_size": PROCESSES,
}


def simple(flag: str) -> str:
    """`--Batch-Size` -> `batch_size`."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_").lower()


def flags_of_one_script() -> dict[str, str]:
    """Each flag that only one of the entry scripts has, with that script."""
    from losses import BASES, DISTILLATIONS, FEATURES, TERMS  # not for programs without torch

    losses = (BASES | TERMS).values()
    of_losses = {flag.name for entry in losses for flag in entry.flags}
    distillations = (DISTILLATIONS | FEATURES).values()
    of_students = {flag.name for entry in distillations for flag in entry.flags}
    return {
        **dict.fromkeys((*TEACHER, *sorted(of_losses - of_students)), "train_teacher.py"),
        **dict.fromkeys((*STUDENT, *sorted(of_students - of_losses)), "train_student.py"),
    }


def flag_hint(word: str, flags: Collection[str]) -> str:
    """What to do instead of a flag that the program, which has these `flags`, does not have."""
    typed = simple(word)
    own = {simple(flag): flag for flag in flags}

    # What it is called here. Also `--t` for --T.
    targets = (own[typed],) if typed in own else MEANT.get(typed, ())
    for target in targets:
        if target in flags:
            return f"did you mean {target}?"

    # What the entry scripts have no flag for, and what the other one of them has.
    trains = "--epochs" in flags
    if trains and typed in ADVICE:
        return ADVICE[typed]
    elsewhere = flags_of_one_script() if trains else {}
    others = {flag.lower(): flag for flag in elsewhere}
    for name in (typed, *map(simple, targets)):
        if name in others:
            other = others[name]
            return f"--{other} is a flag of {elsewhere[other]}; --help lists those of this program"

    # What is spelt nearly so. A beginning that many flags share says nothing.
    nearest = [name for name in own if name.startswith(typed) and len(typed) >= SHORTEST]
    if not 1 <= len(nearest) <= 2:
        nearest = get_close_matches(typed, own, n=1, cutoff=ALIKE)
    if not nearest:
        return "--help lists the flags"
    return f"did you mean {' or '.join(own[name] for name in nearest)}?"


def stray_hint(word: str, words: Sequence[str], takes_value: Mapping[str, bool]) -> str:
    """What to do about a word that is neither a flag nor the value of one.

    `words` are those of the whole command line; `takes_value` says it of every flag.
    """
    # The flag in front of the stray word, with the values between them.
    flag = ""
    for before, this in pairwise(["", *words]):
        if before.startswith("-"):
            flag = before.partition("=")[0]
        is_value = before == flag and takes_value.get(flag, False)
        if this == word and not is_value:
            break
    if flag not in takes_value:
        return "--help lists the flags"
    if not takes_value[flag]:
        return f"{flag} takes no value; --help lists the flags"
    if flag == "--seed" and "--epochs" in takes_value:
        return SEEDS
    again = "; start the command once for each" if "--epochs" in takes_value else ""
    return f"{flag} takes one value{again}; --help lists the flags"
