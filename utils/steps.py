"""How a step is launched: operation by operation, compiled, or replayed as one CUDA graph.

The nets here are small: a step of a ResNet-8 is some 170 operations, each of which may take a GPU
less time than Python needs to launch it. A graph launches all of them at once. What a step does
stands in utils/training.py.
"""

import random
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from models.blocks import Chain
from utils.data.views import Draw, TrainLoader
from utils.program import RunFailed
from utils.program.environment import compiler_fault, has_amx
from utils.sums import Sums

MODES = ("auto", "eager", "graph", "compile")
EAGER_STEPS = 3  # before a capture: cuDNN chooses its algorithms in them
# Releases before 2.14 leave the allocator in the state of a capture when one fails, and torch then
# asserts when memory runs out. There only --step graph captures.
SURVIVES_A_FAILED_CAPTURE = torch.__version__ >= (2, 14)
# --step auto compiles runs of at least so many training views. To compile takes 20 to 40 s of one
# thread. A compiled step takes about four fifths of the time: a view saves a fifth of its own.
# At 700 to 1,500 images/s the cost is earned back after 70,000 to 300,000 views. A million leaves a
# margin of three, for machines that are up to three times as fast.
COMPILED_VIEWS = 1_000_000

Step = Callable[[Draw], Sums]


def can_capture(accelerator: Accelerator) -> bool:
    """Whether a step can become a graph.

    Several processes exchange gradients and statistics in a step, which stays uncaptured.
    torch's deterministic ways to gather and scatter copy from the host, which no capture allows.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1


def is_captured(mode: str, accelerator: Accelerator) -> bool:
    """Whether steps are captured with this --step, one of MODES."""
    if mode == "eager" or not can_capture(accelerator):
        return False
    return SURVIVES_A_FAILED_CAPTURE or mode == "graph"


def first_fault(error: BaseException) -> BaseException:
    """What an error came from: to end a failed capture fails as well, and that is raised."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class Compiling(NamedTuple):
    """Whether a net is compiled, and a line that says why where --step auto would have it so."""

    chosen: bool
    note: str = ""


def choose_compiling(mode: str, accelerator: Accelerator, net: nn.Module, views: int) -> Compiling:
    """What --step `mode` means for a run of so many training views (epochs times images).

    Machine and command alone decide, and no clock: a run that is resumed is launched as before.
    """
    if mode != "auto":
        return Compiling(mode == "compile")
    if views < COMPILED_VIEWS or not gains_by_compiling(accelerator, net):
        return Compiling(False)

    fault = compiler_fault()
    if fault is not None:
        return Compiling(False, f"steps are not compiled, which pays in bf16 on AMX: {fault}")
    return Compiling(
        True,
        f"steps are compiled, which pays in bf16 on AMX in a run of {views:,} training views; "
        "--step eager launches them kernel by kernel",
    )


def gains_by_compiling(accelerator: Accelerator, net: nn.Module) -> bool:
    """Whether a compiled step is known to be faster: docs/performance.md has the figures.

    Of nets only our own: third parties' may not compile.
    """
    return (
        accelerator.device.type == "cpu"
        and accelerator.num_processes == 1
        and accelerator.mixed_precision == "bf16"
        and has_amx()
        and isinstance(net, Chain)
    )


def compile_net(net: nn.Module, batch_size: int, required: bool) -> None:
    """Let a net be compiled for training steps of that many images, in place.

    The last step of an epoch is smaller, and not worth being compiled; nor is evaluation. Where the
    compiler fails, the step raises RunFailed if that is `required`, and else goes on without.
    """
    from torch._dynamo.exc import TorchDynamoException  # slow to import; torch.compile needs it

    eager = net.forward
    compiled = torch.compile(eager, dynamic=False)
    usable = True

    def forward(images: Tensor, **options):
        nonlocal usable
        whole_step = net.training and len(images) == batch_size
        if not usable or not whole_step:
            return eager(images, **options)
        try:
            return compiled(images, **options)
        except TorchDynamoException as error:  # of the compiler, or that Triton is missing
            give_up_compiling(error, required)
            usable = False
            return eager(images, **options)

    net.forward = forward


def give_up_compiling(error: RuntimeError, required: bool) -> None:
    fault = getattr(error, "inner_exception", error)  # what failed within the compiler
    reason = f"{type(fault).__name__}: {fault}".partition("\n")[0]
    if required:
        raise RunFailed(f"the net cannot be compiled: {reason}; give --step eager") from error
    tqdm.write(f"the net cannot be compiled: {reason}; steps are launched kernel by kernel")


@contextmanager
def uncounted(net: nn.Module, steps: int):
    """Within it no batch norm counts its batches; after so many training steps it has counted them.

    Nothing in our nets reads the count, and on a GPU it costs a launch of a kernel for each batch
    norm in every step. In third parties' nets it goes on: they may call a batch norm twice.
    """
    counts = {}
    if isinstance(net, Chain):
        norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
        counts = {module: module.num_batches_tracked for module in norms}
    for module in counts:
        module.num_batches_tracked = None
    try:
        yield
    finally:
        for module, count in counts.items():
            module.num_batches_tracked = count
    for count in counts.values():
        count.add_(steps)


class GraphedStep:
    """A step that is captured as a CUDA graph once and then replayed.

    `step` trains on a draw and returns sums; all that changes from call to call lies in tensors.
    `variant` tells which operations the next step launches; each variant has a graph of its own.
    The sums that it returns lie where the next call overwrites them. Raises RunFailed where a
    capture fails and is `required`; otherwise steps then go on operation by operation.
    """

    def __init__(
        self,
        step: Step,
        variant: Callable[[], Hashable],
        loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        required: bool,
    ):
        self.step = step
        self.variant = variant
        self.optimizer = optimizer
        self.required = required
        self.usable = True
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Sums]] = {}
        self.eager_steps = Counter()
        self.stream = torch.cuda.Stream()
        # No two replays overlap, and what one leaves is read before the next: so all graphs may
        # work in the same memory.
        self.pool = torch.cuda.graph_pool_handle()

        # A graph finds its inputs at fixed addresses.
        self.draw = loader.empty_draw()
        self.rate = torch.zeros((), device=loader.labels.device)

    def __call__(self, draw: Draw) -> Sums:
        is_whole = draw.plan.shape == self.draw.plan.shape
        if not self.usable or not is_whole:
            return self.step(draw)

        variant = self.variant()
        if variant not in self.graphs:
            self.eager_steps[variant] += 1
            if self.eager_steps[variant] <= EAGER_STEPS:
                with self.on_side_stream():
                    return self.step(draw)
            self.capture(variant)
            if not self.usable:
                return self.step(draw)

        graph, sums = self.graphs[variant]
        for place, value in zip(self.draw, draw, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        self.rate.fill_(self.optimizer.param_groups[0]["lr"])
        graph.replay()
        return sums

    @contextmanager
    def on_side_stream(self):
        """Work on another stream than the default one, as a capture demands."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    @contextmanager
    def capturable_optimizer(self):
        """In a graph the learning rate is a tensor, which each replay finds filled anew.

        AdamW refuses a capture unless it is told of it, and warns where it is told for nothing.
        """
        group = self.optimizer.param_groups[0]
        rate = group["lr"]
        group["lr"] = self.rate
        is_told = "capturable" in group
        if is_told:
            group["capturable"] = True
        try:
            yield
        finally:
            group["lr"] = rate
            if is_told:
                group["capturable"] = False

    def capture(self, variant: Hashable) -> None:
        """Note the operations of a step, without doing them, as the graph of this variant."""
        graph = torch.cuda.CUDAGraph()
        state_before = self.host_random_state()
        try:
            with (
                self.capturable_optimizer(),
                self.on_side_stream(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
            ):
                sums = self.step(self.draw)
            # Such a draw was made once, for the capture, and lies in the graph as a constant.
            if self.host_random_state() != state_before:
                raise RuntimeError(
                    "the net draws random numbers on the host, and a graph would repeat them"
                )
        except RuntimeError as error:
            self.give_up(error)
        else:
            self.graphs[variant] = graph, sums

    def host_random_state(self) -> tuple:
        """What a draw by `random`, by NumPy or, beside a GPU, by torch on the CPU would change."""
        name, keys, *place = np.random.get_state()
        state = (random.getstate(), name, keys.tobytes(), *place)
        if self.rate.device.type == "cuda":
            state += (torch.get_rng_state().numpy().tobytes(),)
        return state

    def give_up(self, error: RuntimeError) -> None:
        fault = first_fault(error)
        reason = str(fault).partition("\n")[0] or type(fault).__name__
        if self.required:
            raise RunFailed(
                f"a step cannot be captured as a CUDA graph: {reason}; give --step eager"
            ) from error
        tqdm.write(
            f"a step cannot be captured as a CUDA graph: {reason}; "
            "steps are launched kernel by kernel"
        )
        self.usable = False
        self.optimizer.zero_grad()
