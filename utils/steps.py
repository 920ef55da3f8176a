"""One step of training, launched kernel by kernel or replayed as one CUDA graph.

The nets here are small: a step of a ResNet-8 is some 170 operations, each of which may take a GPU
less time than Python needs to launch it. A graph launches all of them at once.
"""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.data import Dataset
from utils.data.mixing import mixed_loss
from utils.data.views import Draw, normalise
from utils.program import RunFailed

MODES = ("auto", "eager", "graph", "compile")
EAGER_STEPS = 3  # before a capture
# Releases before 2.14 leave the allocator in the state of a capture when one fails, and torch then
# asserts when memory runs out. There only --step graph captures.
SURVIVES_A_FAILED_CAPTURE = torch.__version__ >= (2, 14)


def can_capture(accelerator: Accelerator) -> bool:
    """Whether a step can become a graph.

    Several processes exchange gradients and statistics in a step, which stays uncaptured.
    torch's deterministic ways to gather and scatter copy from the host, which no capture allows.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1


def first_fault(error: BaseException) -> BaseException:
    """What an error came from: to end a failed capture fails as well, and that is raised."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def agreement(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The fraction of predictions (B,) that are the labels (B,), as float64."""
    return (predicted == labels).double().mean()


class Step:
    """Called with a draw, it trains the net on that. Nothing in it waits for the device.

    All that changes from step to step lies in tensors, so that a step can be captured. `mode` is
    one of MODES, where auto is a graph if one can be captured; `objective` gives a scalar of logits
    and a Batch; `loader` is the TrainLoader that the draws come from.
    """

    def __init__(self, mode: str, accelerator, net, optimizer, objective, loader, data: Dataset):
        self.mode, self.accelerator, self.optimizer = mode, accelerator, optimizer
        self.net, self.objective, self.loader, self.data = net, objective, loader, data
        self.compiled = torch.compile(net, dynamic=False) if mode == "compile" else net
        safe = SURVIVES_A_FAILED_CAPTURE or mode == "graph"
        self.captured = mode != "eager" and safe and can_capture(accelerator)
        self.size = loader.step // loader.world
        device = accelerator.device
        self.skipped = torch.zeros((), dtype=torch.float64, device=device)
        if self.captured:
            # What a graph reads: it finds its inputs at fixed addresses.
            self.plan = torch.zeros(loader.rows, self.size, dtype=torch.int64, device=device)
            self.rate = torch.zeros((), device=device)
            self.stream = torch.cuda.Stream()
            self.graphs, self.calls = {}, Counter()

    @property
    def launch(self) -> str:
        """How steps are launched, for the log."""
        how = "one CUDA graph" if self.captured else "kernel by kernel"
        return f"{how}, compiled" if self.compiled is not self.net else how

    def __call__(self, draw: Draw, kind=None) -> torch.Tensor:
        """The step's sums, float64 (4,) on the device, which the next call may overwrite.

        They are the mean loss times images, right predictions, images, and how many steps in a
        row fp16's scaler has skipped. Of a mixture a prediction is right by the share of the label
        that it names. Steps of one `kind` launch the same kernels.
        """
        if not self.captured or draw.plan.shape[1] != self.size:
            return self.run(draw)
        if kind not in self.graphs:
            self.calls[kind] += 1
            if self.calls[kind] <= EAGER_STEPS:  # cuDNN chooses its algorithms
                with self.on_side_stream():
                    return self.run(draw)
            self.graphs[kind] = self.capture()
            if not self.captured:
                return self.run(draw)
        graph, sums = self.graphs[kind]
        self.plan.copy_(draw.plan)
        self.rate.fill_(self.optimizer.param_groups[0]["lr"])
        graph.replay()
        return sums

    def run(self, draw: Draw) -> torch.Tensor:
        batch = self.loader.batch(draw)
        # The last step of an epoch is smaller, and not worth being compiled.
        net = self.compiled if len(batch.labels) == self.size else self.net
        logits = net(normalise(batch.images, self.data.mean, self.data.std))
        loss = self.objective(logits, batch)
        self.accelerator.backward(loss * batch.weight)
        self.update()
        right = mixed_loss(partial(agreement, logits.detach().argmax(1)), batch)
        images = torch.full_like(right, len(batch.labels) if batch.weight > 0 else 0)
        return torch.stack([images * loss.detach().double(), images * right, images, self.skipped])

    def update(self) -> None:
        scaler = self.accelerator.scaler
        # The fused optimiser skips on the device what has overflowed, and says nothing of it to the
        # host; but the scale falls. Its public getter would wait for the device.
        before = None if scaler is None else scaler._scale.clone()
        self.optimizer.step()
        if scaler is not None:
            self.skipped.add_(1).mul_(scaler._scale < before)
        self.optimizer.zero_grad()

    @contextmanager
    def on_side_stream(self):
        """Work on another stream than the default one, as a capture demands."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self):
        """(graph, the sums it writes); where it fails, None and no further attempt."""
        graph, group = torch.cuda.CUDAGraph(), self.optimizer.param_groups[0]
        rate, group["lr"] = group["lr"], self.rate
        try:
            with self.on_side_stream(), torch.cuda.graph(graph, stream=self.stream):
                sums = self.run(Draw(self.plan, 1.0))
        except RuntimeError as error:
            cause = str(first_fault(error)).splitlines()[0]
            reason = f"a step cannot be captured as a CUDA graph: {cause}"
            if self.mode == "graph":
                raise RunFailed(f"{reason}; give --step eager") from error
            tqdm.write(f"{reason}; steps are launched kernel by kernel")
            self.captured = False
            self.optimizer.zero_grad()
            return None
        finally:
            group["lr"] = rate
        return graph, sums
