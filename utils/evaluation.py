"""Logits of a whole split: the nets are run here, and measured in utils/split_metrics.py."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from utils.data import Dataset, Split, Statistics
from utils.data.views import normalise
from utils.program.bars import progress_bar

CPU_BATCH = 128  # images at once; more overflow its caches, at half the rate
GPU_BATCH = 1000
# What nets are run in, by --mixed_precision of the launcher.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def predict(
    net: nn.Module,
    split: Split,
    mean: Statistics,
    std: Statistics,
    accelerator: Accelerator,
    batch_size: int | None = None,
) -> Tensor:
    """Logits of a split, as `logits_of` gives them, of a net in eval mode.

    Its inputs are pixels / 255, normalised with `mean` and `std`.
    """
    net.eval()

    def forward(images: Tensor) -> Tensor:
        return net(normalise(images, mean, std))

    return logits_of(forward, split, accelerator, batch_size)


@torch.inference_mode()
def logits_of(
    forward: Callable[[Tensor], Tensor],
    split: Split,
    accelerator: Accelerator,
    batch_size: int | None = None,
    title: str | None = None,
) -> Tensor:
    """Logits (N, K) of a split, float32 on the CPU, in its order, the same on every process.

    `forward` takes images uint8 (B, 3, H, W) on the accelerator's device. A progress bar is shown
    where there is a `title` for it.
    """
    if batch_size is None:
        batch_size = CPU_BATCH if accelerator.device.type == "cpu" else GPU_BATCH

    # Equal shares can be gathered; the last image stands in where there are not enough.
    total = len(split.labels)
    share = math.ceil(total / accelerator.num_processes)
    places = accelerator.process_index * share + torch.arange(share)
    images = split.images[places.clamp(max=total - 1).to(split.images.device)]

    is_shown = title is not None and accelerator.is_main_process
    batches = progress_bar(images.split(batch_size), title, shown=is_shown)
    logits = []
    for batch in batches:
        with accelerator.autocast():
            logits.append(forward(batch.to(accelerator.device)).float())
    return accelerator.gather(torch.cat(logits))[:total].cpu()


def logits_of_splits(
    forward: Callable[[Tensor], Tensor],
    data: Dataset,
    accelerator: Accelerator,
    batch_size: int | None = None,
    name: str = "net",
) -> dict[str, Tensor]:
    """By split, val and test, the logits that `logits_of` gives; progress bars bear the name."""
    titles = {"val": "validation split", "test": "test split"}
    return {
        split: logits_of(
            forward, getattr(data, split), accelerator, batch_size, title=f"{name}: {title}"
        )
        for split, title in titles.items()
    }
