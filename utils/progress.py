"""What a run shows while it goes on: its size, a bar for each epoch, and a line at its end."""

from torch import nn
from tqdm import tqdm

from utils.data import Dataset
from utils.program.bars import progress_bar
from utils.sums import EpochSums


def epoch_bar(epoch: int, epochs: int, steps: int, shown: bool) -> tqdm:
    """Its numbers are those of `show_progress`, which come less often than the steps."""
    return progress_bar(
        title=f"epoch {epoch}/{epochs}",
        shown=shown,
        total=steps,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
    )


def show_progress(bar: tqdm, sums: EpochSums, steps_after: int) -> None:
    """Loss, top-1 and rate of this process so far, and the time left of the whole run."""
    if bar.disable:
        return
    means = sums.means()
    elapsed = bar.format_dict["elapsed"]
    seconds_per_step = elapsed / bar.n
    seconds_left = seconds_per_step * (bar.total - bar.n + steps_after)
    bar.set_postfix_str(
        f"loss {means['train_loss']:.3f}, top-1 {100 * means['train_top1']:.1f} %, "
        f"{sums.totals()['images'] / elapsed:.0f} images/s, "
        f"{tqdm.format_interval(seconds_left)} left of the run"
    )


def size_line(model: str, net: nn.Module, data: Dataset) -> str:
    """How large the net is, and of how many images each split is."""
    parameters = sum(weight.numel() for weight in net.parameters())
    return (
        f"{model}: {parameters:,} parameters; {data.num_classes} classes; "
        f"{len(data.train.labels):,} images train it, {len(data.val.labels):,} validate, "
        f"{len(data.test.labels):,} test"
    )


def epoch_line(record: dict, epochs: int, improved: bool) -> str:
    """An epoch in a line; * marks the best so far."""
    return (
        f"epoch {record['epoch']:3d}/{epochs}  lr {record['lr']:.4g}  "
        f"train loss {record['train_loss']:.4f} top-1 {100 * record['train_top1']:.2f} %  "
        f"val NLL {record['val_nll']:.4f} top-1 {100 * record['val_top1']:.2f} % "
        f"ECE {100 * record['val_ece']:.2f} %  "
        f"{record['images_per_second']:.0f} images/s{'  *' if improved else ''}"
    )
