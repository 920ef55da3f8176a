"""fit(): the one training loop, for teachers and students alike."""

import ctypes
import os
import sys
import time
from argparse import Namespace
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR
from tqdm import tqdm

from utils.data import Dataset, load_dataset
from utils.data.views import TrainLoader
from utils.environment import check_launch
from utils.evaluation import evaluate, predict
from utils.files import refused
from utils.objectives import Objective
from utils.program import RunFailed
from utils.runs import Run, on_main
from utils.steps import Step

# How the best epoch is told, by --select: a value of its record, and 1 where more is better.
SELECTIONS = {"top1": ("val_top1", 1), "nll": ("val_nll", -1), "refinement": ("val_refinement", -1)}
EPOCH_METRICS = ("nll", "top1", "ece", "sce", "adaece", "refinement")
REPORT_SECONDS = 0.5
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
MOST_SKIPPED = 100  # steps in a row
TOO_FAST = (
    "most likely the learning rate is too high: give a smaller --lr, --scheduler warmupcosine "
    "or a smaller --beta, with --exp_name or --overwrite. The epochs before are kept"
)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of giving it back.

    To fetch the pages of its tensors anew costs a small net a sixth of its time on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        for setting, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(setting, value)


def start(deterministic: bool = False, log_with: str | None = None) -> Accelerator:
    """The accelerator of this process: device, precision and processes as the launcher set them."""
    if not torch.cuda.is_available() and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        print("fp16 needs a GPU and there is none: this run computes in float32", file=sys.stderr)
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    keep_freed_memory()
    # TF32 keeps float32's range and is several times faster; CUDA convolutions use it already.
    torch.set_float32_matmul_precision("high")
    # Metal has no float64, in which losses are summed and metrics computed.
    cpu, way_out = torch.backends.mps.is_available(), "mend the launch or `accelerate config`"
    with refused("accelerate cannot start", way_out, (ValueError, ImportError, RuntimeError)):
        # The run folder, which is known later, replaces this project_dir (see fit).
        accelerator = Accelerator(cpu=cpu, log_with=log_with, project_dir=".")
    check_launch(accelerator)
    return accelerator


def load_data(args: Namespace, accelerator: Accelerator) -> Dataset:
    """What the flags of `add_data` name, on every process; the main one downloads, others wait."""
    loaded = []

    def load(download: bool) -> None:
        how = (args.split_seed, download, args.flip, args.image_size, args.skip_unreadable)
        loaded.append(load_dataset(args.dataset, args.data_dir, *how))

    on_main(accelerator, lambda: load(download=True))
    if not accelerator.is_main_process:
        load(download=False)
    return loaded[0]


def build_schedule(optimizer, args: Namespace, steps_per_epoch: int):
    """The learning rate as a function of the step (not of the epoch)."""
    total = args.epochs * steps_per_epoch
    if args.scheduler == "multistep":
        milestones = [epoch * steps_per_epoch for epoch in args.schedule_steps]
        return MultiStepLR(optimizer, milestones, args.lr_decay_factor)
    warmup = args.warmup if args.scheduler == "warmupcosine" else 0
    if warmup == 0:
        return CosineAnnealingLR(optimizer, total)
    rise = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, max(1, total - warmup))
    return SequentialLR(optimizer, [rise, fall], [warmup])


def prepare(accelerator: Accelerator, net: nn.Module, args: Namespace, steps_per_epoch: int):
    """(net, the net as the steps call it, optimizer, schedule), on the accelerator's device."""
    net.to(accelerator.device, memory_format=torch.channels_last)
    if args.sync_bn and accelerator.num_processes > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    options = {"weight_decay": args.weight_decay, "nesterov": args.momentum > 0, "fused": True}
    optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum, **options)
    if args.momentum > 0:
        # The fused optimiser would leave its buffers as it found the memory, were its first step
        # one that fp16's scaler skips. From 0 on, the first step is the same.
        for weight in net.parameters():
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    schedule = build_schedule(optimizer, args, steps_per_epoch)
    return net, *accelerator.prepare(net, optimizer), schedule


def fit(run: Run, accelerator: Accelerator, net, objective: Objective, data, args) -> list[dict]:
    """Train `net` in place from where the run stands to its last epoch; validate and save each.

    The `objective` is all that differs between a teacher and a student. Returns the epochs'
    records, as in metrics.jsonl. Raises RunFailed when the loss is no longer finite.
    """
    device, mix = accelerator.device, (args.mix, args.mix_alpha) if args.mix else None
    where = device, accelerator.process_index, accelerator.num_processes
    loader = TrainLoader(data.train, args.train_batch_size, args.seed, *where, data.flip, mix)
    val = replace(data.val, images=data.val.images.to(device))
    net, prepared, optimizer, schedule = prepare(accelerator, net, args, len(loader))
    parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
    parts["objective"] = objective.to(device)
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    history, best = resume(run, parts)
    step = Step(args.step, accelerator, prepared, optimizer, objective, loader, data)
    run.say(sizes(args.model, net, data))
    run.log(
        f"{device}, steps: {step.launch}, mixed precision: {accelerator.mixed_precision}, "
        f"float32 products: {torch.get_float32_matmul_precision()}, "
        f"threads: {torch.get_num_threads()}"
    )
    accelerator.project_configuration.logging_dir = str(run.folder)
    accelerator.init_trackers("tensorboard")

    for epoch in range(len(history) + 1, args.epochs + 1):
        started = time.perf_counter()
        record = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        shown = {"leave": False, "disable": None if accelerator.is_main_process else True}
        shown["bar_format"] = "{desc} {percentage:3.0f}%|{bar}| {postfix}"
        bar = tqdm(loader.epoch(epoch), f"epoch {epoch}/{args.epochs}", len(loader), **shown)
        steps_after = (args.epochs - epoch) * len(loader)
        with objective.epoch(epoch) as kind:
            record |= train_epoch(step, kind, schedule, epoch, bar, steps_after)
        record["images_per_second"] = len(data.train.labels) / (time.perf_counter() - started)
        share_buffers(accelerator, net)
        logits = predict(net, val, data.mean, data.std, args.test_batch_size, accelerator)
        on_main(accelerator, partial(check_logits, logits, epoch, record["lr"]))
        metrics = evaluate(logits, data.val)
        record |= {f"val_{name}": metrics[name] for name in EPOCH_METRICS}
        objective.after_validation(logits, val.labels)
        record["seconds"] = time.perf_counter() - started

        history.append(record)
        name, sign = SELECTIONS[args.select]
        improved = best is None or sign * record[name] > sign * best["metrics"][name]
        if improved:
            best = snapshot(run, record, net)
        states = {name: part.state_dict() for name, part in parts.items()}
        states |= {"random": random_states(), "history": history, "best": best}
        run.save(states, improved)
        run.say(summary(record, args.epochs, improved))
        accelerator.log(record, step=epoch)
    run.save_last(snapshot(run, history[-1], net))
    return history


def train_epoch(
    step: Step, kind, schedule, epoch: int, bar: tqdm, steps_after: int
) -> dict[str, float]:
    """One pass over the draws in `bar`; mean loss and top-1 (a fraction) on the training views.

    Each step's sums stay on the device; to read them, which waits for it, is for now and then.
    """
    accelerator, rate = step.accelerator, step.optimizer.param_groups[0]
    step.net.train()
    sums = torch.zeros(bar.total, 4, dtype=torch.float64, device=accelerator.device)
    rates, shown = [], time.perf_counter()
    for number, draw in enumerate(bar):
        rates.append(rate["lr"])
        sums[number] = step(draw, kind)
        schedule.step()
        # Of several processes only one looks: what the others do must not hang on the clock.
        if accelerator.is_main_process and time.perf_counter() - shown > REPORT_SECONDS:
            shown = time.perf_counter()
            check_sums(sums[: number + 1], rates, epoch)
            if not bar.disable:
                show_progress(bar, sums.sum(0), steps_after, accelerator.num_processes)
    skipped = sums[:, 3]  # equal on all processes
    sums = torch.column_stack([accelerator.reduce(sums[:, :3].contiguous(), "sum"), skipped])
    on_main(accelerator, lambda: check_sums(sums, rates, epoch))
    loss, right, images, _ = sums.sum(0).tolist()
    return {"train_loss": loss / images, "train_top1": right / images}


def check_sums(sums: torch.Tensor, rates: list[float], epoch: int) -> None:
    """End a run that cannot succeed any more: raises RunFailed; the last checkpoint is kept.

    `sums`: those of each step so far, as `Step` returns them; `rates`: their learning rates. By
    skipping steps fp16's scaler finds its scale; many in a row are an error.
    """
    losses, _, images, skipped = sums.T
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step, means = int(bad[0]), (losses / images).tolist()
        before = f"{means[step - 1]:.3g} a step before, " if step else ""
        fault = f"the loss is {means[step]} in epoch {epoch}, step {step + 1}, {before}at a"
        raise RunFailed(f"{fault} learning rate of {rates[step]:.3g}; {TOO_FAST}")
    stuck = (skipped >= MOST_SKIPPED).nonzero()
    if len(stuck):
        fault = f"the gradients of {MOST_SKIPPED} steps in a row were not finite, up to"
        place = f"epoch {epoch}, step {int(stuck[0]) + 1}"
        raise RunFailed(f"fp16: {fault} {place}; try bf16, or {TOO_FAST}")


def check_logits(logits: torch.Tensor, epoch: int, rate: float) -> None:
    """The same for a net that the last step of an epoch broke."""
    if not logits.isfinite().all():
        fault = f"the net's outputs are not finite after epoch {epoch}"
        raise RunFailed(f"{fault}, at a learning rate of {rate:.3g}; {TOO_FAST}")


def show_progress(bar: tqdm, totals: torch.Tensor, steps_after: int, processes: int) -> None:
    loss, right, images, _ = totals.tolist()
    elapsed = bar.format_dict["elapsed"]
    left = elapsed / bar.n * (bar.total - bar.n + steps_after) if bar.n else 0
    rates = f"top-1 {100 * right / images:.1f} %, {processes * images / elapsed:.0f} images/s"
    left = f"{tqdm.format_interval(left)} left of the run"
    bar.set_postfix_str(f"loss {loss / images:.3f}, {rates}, {left}")


def random_states() -> list[torch.Tensor]:
    """What a net with dropout draws next, on the CPU and on this process's GPU."""
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def resume(run: Run, parts: dict) -> tuple[list[dict], dict | None]:
    """Put every part back to the end of the last saved epoch; its history and best snapshot."""
    saved = run.load("checkpoint.pth")
    if saved is None:
        return [], None
    fault = f"{run.folder / 'checkpoint.pth'} does not fit its run"
    with refused(fault, "--overwrite starts the run anew"):
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        cpu, *gpu = saved["random"]
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state(*gpu)
        history, best = saved["history"], saved["best"]
        if [record["epoch"] for record in history] != list(range(1, len(history) + 1)):
            raise ValueError("epochs are missing")
    run.save(saved, improved=True)
    run.say(f"going on after epoch {len(history)}")
    return history, best


def snapshot(run: Run, record: dict, net: nn.Module) -> dict:
    """What model_best.pth and model_last.pth hold: the weights and what is needed to use them."""
    return run.identity | {
        "epoch": record["epoch"],
        "metrics": {name: value for name, value in record.items() if name.startswith("val_")},
        "state_dict": {name: value.detach().clone() for name, value in net.state_dict().items()},
    }


def sizes(model: str, net: nn.Module, data: Dataset) -> str:
    """A line on how large the net is and of how many images each split is."""
    parameters = sum(weight.numel() for weight in net.parameters())
    train, val, test = (len(split.labels) for split in (data.train, data.val, data.test))
    images = f"{train:,} images train it, {val:,} validate, {test:,} test"
    return f"{model}: {parameters:,} parameters; {data.num_classes} classes; {images}"


def share_buffers(accelerator: Accelerator, net: nn.Module) -> None:
    """Give every process the main one's batch-norm statistics, so that all evaluate one net."""
    if accelerator.num_processes > 1:
        for buffer in net.buffers():
            broadcast(buffer)


def summary(record: dict, epochs: int, improved: bool) -> str:
    train, val, ece = (100 * record[name] for name in ("train_top1", "val_top1", "val_ece"))
    text = f"epoch {record['epoch']:3d}/{epochs}  lr {record['lr']:.4g}  "
    text += f"train loss {record['train_loss']:.4f} top-1 {train:.2f} %  "
    text += f"val NLL {record['val_nll']:.4f} top-1 {val:.2f} % ECE {ece:.2f} %  "
    return text + f"{record['images_per_second']:.0f} images/s{'  *' if improved else ''}"
