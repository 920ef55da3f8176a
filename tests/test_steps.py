"""Steps that are captured as CUDA graphs, or compiled, train as those launched one by one do.

Without a GPU the graphs are those of cuda_graphs.py.
"""

import random
import re
import sys
from types import SimpleNamespace

import cuda_graphs
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import assert_same_run, command, fails, folder_of, run_script, weights
from torch._dynamo.exc import BackendCompilerFailed
from torch.optim.optimizer import register_optimizer_step_pre_hook

import losses.distillation
import train_student
import train_teacher
from losses import FEATURES, ClassificationLoss
from losses.classification import nll
from models import build_model
from models.blocks import Chain, Pool
from utils import preflight, steps, training
from utils.data.mixing import MIXES
from utils.program import RunFailed, environment
from utils.program.processes import start
from utils.runs import Run
from utils.teachers.nets import NetTeacher

# 135 images: four steps of 32 and one of 7. Learning rates are powers of 2, which float32 holds. At
# 2^-7, what cuDNN's algorithms differ by (1e-6 a convolution) does not grow from step to step.
RATE = "0.0078125"
FLAGS = ["--train-batch-size", "32", "--lr", RATE, "--lr-decay-factor", "0.5", "--epochs", "4"]
LOSSES = ["NLL", "LS+MDCA", "FL+MMCE", "FLSD+DCA", "DFL+MbLS", "AdaFocal", "Brier+CPC"]  # all
HAS_GPU = torch.cuda.is_available()
needs_compiler = pytest.mark.skipif(
    environment.compiler_fault() is not None and not HAS_GPU, reason="no compiler here"
)


@pytest.fixture(scope="module", autouse=True)
def same_kernels():
    """Whatever is compared here runs by the same algorithms, in float32 throughout."""

    def fixed(original):
        def start_fixed(*given):
            accelerator = original(*given)
            cudnn = torch.backends.cudnn
            cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, True, False
            torch.set_float32_matmul_precision("highest")
            return accelerator

        return start_fixed

    cudnn = torch.backends.cudnn
    with pytest.MonkeyPatch.context() as patch:
        # Set to what they are, so that they are put back.
        for name in ("benchmark", "deterministic", "allow_tf32"):
            patch.setattr(cudnn, name, getattr(cudnn, name))
        for script in (train_teacher, train_student):
            patch.setattr(script, "start", fixed(script.start))
        yield


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that runs capture from now on, with a count of their replays."""
    monkeypatch.setattr(steps, "SURVIVES_A_FAILED_CAPTURE", True)
    if not HAS_GPU:
        monkeypatch.setattr(steps, "can_capture", lambda accelerator: True)
        return cuda_graphs.emulate(monkeypatch)
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", counted(torch.cuda.CUDAGraph, made))
    return made


def counted(graph: type, made: list) -> type:
    """Such graphs, which note themselves in `made` and count their replays."""

    class Counted(graph):
        def __init__(self):
            super().__init__()  # pybind11 refuses a subclass that leaves it out
            self.replays = 0
            made.append(self)

        def replay(self):
            self.replays += 1
            super().replay()

    return Counted


def test_a_class_of_torchs_is_counted():
    """CUDAGraph cannot be made without a GPU: another class that pybind11 has bound stands in."""
    made = []
    graph = counted(torch._C.BenchmarkConfig, made)()
    assert made == [graph] and graph.replays == 0


def assert_agree(one, other, bits=not HAS_GPU) -> None:
    """Bit for bit where the same kernels run; a graph or a compiler may choose others."""
    if bits:
        return assert_same_run(one, other)
    first, second = weights(one), weights(other)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=5e-2, atol=5e-3)


def teacher_run(data, root, *flags):
    train_teacher.main(command(data, root, *FLAGS, *flags))
    return folder_of(root)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_npz):
    return teacher_run(tiny_npz, tmp_path_factory.mktemp("teacher"), "--step", "eager")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_teacher_is_an_eager_one(tiny_npz, tmp_path, graphs, loss):
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--loss", loss, "--step", "eager")
    assert not graphs
    captured = teacher_run(tiny_npz, tmp_path / "graph", "--loss", loss)
    # The first three whole steps of the run are eager, and so is the last step of each epoch.
    assert [graph.replays for graph in graphs] == [4 * 4 - 3]
    assert_agree(eager, captured)
    assert "steps: one CUDA graph" in (captured / "train_log.txt").read_text()
    assert "steps: kernel by kernel" in (eager / "train_log.txt").read_text()


def test_a_rate_that_changes_in_every_step(tiny_npz, tmp_path, graphs):
    flags = f"--train-batch-size 8 --lr {RATE} --scheduler warmupcosine --warmup 7 --step"
    for mode in ("eager", "auto"):
        train_teacher.main(command(tiny_npz, tmp_path / mode, *flags.split(), mode))
    assert [graph.replays for graph in graphs] == [3 * 16 - 3]
    assert_agree(*(folder_of(tmp_path / mode) for mode in ("eager", "auto")))


@pytest.mark.parametrize("mix", MIXES)
def test_a_captured_mix_draws_anew_in_every_step(tiny_npz, tmp_path, graphs, mix):
    """What a step draws, a share or a box, reaches the graph as the images do."""
    flags = ("--mix", mix, "--loss", "FL+MbLS")
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--step", "eager", *flags)
    captured = teacher_run(tiny_npz, tmp_path / "graph", *flags)
    assert [graph.replays for graph in graphs] == [13]
    assert_agree(eager, captured)


def test_a_captured_adamw_is_an_eager_one(tiny_npz, tmp_path, graphs):
    """It is told of the capture only in the captured step: elsewhere it would warn."""
    flags = ("--optimizer", "adamw", "--lr", "0.0009765625")
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--step", "eager", *flags)
    told = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: told.append(optimizer.param_groups[0]["capturable"])
    )
    try:
        captured = teacher_run(tiny_npz, tmp_path / "graph", *flags)
    finally:
        hook.remove()
    assert [graph.replays for graph in graphs] == [13]
    assert told.count(True) == 1
    assert_agree(eager, captured)


def student_run(data, root, teacher, *flags):
    train_student.main(command(data, root, *FLAGS, "--teacher_path", str(teacher), *flags))
    return folder_of(root)


def test_a_captured_student_and_its_cache(tiny_npz, tmp_path, graphs, teacher, monkeypatch):
    eager = student_run(tiny_npz, tmp_path / "eager", teacher, "--step", "eager")
    assert_agree(eager, student_run(tiny_npz, tmp_path / "graph", teacher))
    cache = ("--teacher_cache", str(tmp_path / "cache"))
    assert_agree(eager, student_run(tiny_npz, tmp_path / "filling", teacher, *cache))
    logits = NetTeacher.logits

    def only_evaluated(self, images):
        assert torch.is_inference_mode_enabled(), "the teacher runs in training"
        return logits(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(NetTeacher, "logits", only_evaluated)
        assert_agree(eager, student_run(tiny_npz, tmp_path / "reading", teacher, *cache))
    # The first epoch is kept before the training, and read in it; the others are filled.
    assert [graph.replays for graph in graphs] == [13, 4 - 3, 12 - 3, 13]
    for epoch in (2, 3):  # epochs of both kinds have a graph each
        next((tmp_path / "cache").rglob(f"seed=42_epoch={epoch}_*.bin")).unlink()
    assert_agree(eager, student_run(tiny_npz, tmp_path / "both", teacher, *cache))
    assert [graph.replays for graph in graphs[4:]] == [8 - 3, 8 - 3]
    if not HAS_GPU:  # both work in the same memory
        assert graphs[4].pool is graphs[5].pool is not None


def test_a_captured_student_of_stored_logits(tiny_npz, tmp_path, graphs):
    """Each epoch has other logits, at the same place."""
    logits = np.random.default_rng(0).normal(size=(3, 135, 4))
    np.save(tmp_path / "logits.npy", logits)
    runs = []
    for step in ("eager", "auto"):
        flags = ["--teacher_logits", str(tmp_path / "logits.npy"), "--step", step]
        train_student.main(command(tiny_npz, tmp_path / step, *FLAGS, *flags))
        runs.append(folder_of(tmp_path / step))
    assert_agree(*runs)
    assert [graph.replays for graph in graphs] == [13]


@pytest.mark.parametrize("distill", ["DKD", "LSKD", "DIST", *(f"KD+{term}" for term in FEATURES)])
def test_a_captured_student_of_each_distillation(
    tiny_npz, tmp_path, graphs, teacher, distill, monkeypatch
):
    """DKD's weight rises from epoch to epoch, which a captured step has to follow."""
    # It looks at values on the CPU alone, where no real step is captured.
    monkeypatch.setattr(losses.distillation, "refuse_minus_infinity", lambda *_: None)
    flags = ("--distill", distill)
    eager = student_run(tiny_npz, tmp_path / "eager", teacher, "--step", "eager", *flags)
    assert_agree(eager, student_run(tiny_npz, tmp_path / "graph", teacher, *flags))
    assert [graph.replays for graph in graphs] == [13]


def stopped_teacher_run(data, root, epochs, *flags):
    """A run that is killed when so many of its epochs are saved."""
    save = Run.save

    def save_and_stop(self, checkpoint, improved):
        save(self, checkpoint, improved)
        if len(checkpoint["history"]) == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save_and_stop)
        teacher_run(data, root, *flags)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_captures_anew(tiny_npz, tmp_path, graphs, teacher, stop):
    stopped_teacher_run(tiny_npz, tmp_path, stop)
    assert_agree(teacher, teacher_run(tiny_npz, tmp_path))
    # The next epoch trained while the one was written in which the run was stopped.
    assert [graph.replays for graph in graphs] == [4 * (stop + 1) - 3, 4 * (4 - stop) - 3]


def test_a_captured_step_counts_what_the_scaler_skips(tiny_npz, tmp_path, graphs, monkeypatch):
    """The loss turns bad once the steps are captured: Python sees none of that."""
    bad = torch.zeros(())
    original, train_epoch = train_teacher.start, training.train_epoch

    def start_scaled(*given):
        accelerator = original(*given)
        bad.data = bad.data.to(accelerator.device)
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
        return accelerator

    def loss(logits, labels):
        # The root's slope at 0 is infinite; times the 0 within, the gradient is NaN.
        return nll(logits, labels) + (1 - bad + 0 * logits.sum()).sqrt()

    def break_and_train(trainer, step, loader, epoch):
        bad.fill_(epoch > 2)
        return train_epoch(trainer, step, loader, epoch)

    monkeypatch.setattr(train_teacher, "start", start_scaled)
    monkeypatch.setattr(train_teacher, "build_loss", lambda name: ClassificationLoss(loss))
    monkeypatch.setattr(training, "train_epoch", break_and_train)
    with pytest.raises(RunFailed, match=r"100 steps in a row.*epoch 22, step 5"):
        teacher_run(tiny_npz, tmp_path, "--epochs", "40")
    assert graphs[0].replays > 50


def test_what_cannot_be_captured(tiny_npz, tmp_path, graphs, teacher, capsys, monkeypatch):
    """A loss that looks at its own value: auto goes on without graphs, graph says how to go on."""

    def loss(*given):
        return nll(*given) * (1 if nll(*given).item() > 0 else -1)

    monkeypatch.setattr(train_teacher, "build_loss", lambda name: ClassificationLoss(loss))
    assert_agree(teacher, teacher_run(tiny_npz, tmp_path / "auto"))
    out = capsys.readouterr().out
    assert out.count("cannot be captured as a CUDA graph") == 1 and "kernel by kernel" in out
    # The cause, and not that the capture could not be ended properly.
    assert "stream is capturing" in out and "previous error" not in out
    assert [graph.replays for graph in graphs] == [0]
    monkeypatch.setattr(preflight, "can_capture", lambda accelerator: True)
    with pytest.raises(RunFailed, match="cannot be captured.*--step eager"):
        teacher_run(tiny_npz, tmp_path / "graph", "--step", "graph")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_a_net_that_draws_on_the_host_is_not_captured(
    tiny_npz, tmp_path, graphs, capsys, monkeypatch, draw
):
    """As for stochastic depth: a graph would repeat the draw of its capture for ever."""

    def loss(*given):
        return nll(*given) * (1 if draw() < 2 else 0)

    monkeypatch.setattr(train_teacher, "build_loss", lambda name: ClassificationLoss(loss))
    teacher_run(tiny_npz, tmp_path)
    out = capsys.readouterr().out
    assert out.count("cannot be captured") == 1 and "draws random numbers on the host" in out
    assert [graph.replays for graph in graphs] == [0]


def test_where_a_failed_capture_is_not_undone_only_graph_captures(
    tiny_npz, tmp_path, graphs, monkeypatch
):
    monkeypatch.setattr(steps, "SURVIVES_A_FAILED_CAPTURE", False)
    monkeypatch.setattr(preflight, "can_capture", lambda accelerator: True)
    auto = teacher_run(tiny_npz, tmp_path / "auto")
    assert not graphs and "steps: kernel by kernel" in (auto / "train_log.txt").read_text()
    teacher_run(tiny_npz, tmp_path / "graph", "--step", "graph")
    assert [graph.replays for graph in graphs] == [13]


def test_deterministic_steps_are_not_captured(monkeypatch):
    """Their scatter copies from the host. The memory that torch would fill is never read."""
    one_gpu = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    assert steps.can_capture(one_gpu)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        start(deterministic=True)
        assert not steps.can_capture(one_gpu)
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(HAS_GPU, reason="with a GPU it is right")
def test_graph_needs_a_gpu(tiny_npz, tmp_path, capsys):
    line = command(tiny_npz, tmp_path, "--step", "graph")
    assert "--step graph: needs one GPU" in fails(capsys, tmp_path, train_teacher.main, line)


@needs_compiler
def test_a_compiled_run_trains_alike(tiny_npz, tmp_path, teacher):
    compiled = teacher_run(tiny_npz, tmp_path, "--step", "compile")
    assert_agree(teacher, compiled, bits=False)
    assert re.search("steps: .*compiled", (compiled / "train_log.txt").read_text())


@needs_compiler
def test_a_compiled_run_of_a_mix_trains_alike(tiny_npz, tmp_path):
    flags = ("--epochs", "2", "--mix", "mixup")
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--step", "eager", *flags)
    compiled = teacher_run(tiny_npz, tmp_path / "compiled", "--step", "compile", *flags)
    assert_agree(eager, compiled, bits=False)


@pytest.fixture
def on_amx(monkeypatch, tmp_path_factory):
    """Runs from now on are in bf16, on a CPU that says it has AMX."""
    info = tmp_path_factory.mktemp("proc") / "cpuinfo"
    info.write_text("flags : avx512_bf16 amx_bf16 amx_tile\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def compilations(monkeypatch):
    """What torch is asked to compile from now on, and does not."""
    asked = []

    def note(function, **options):
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", note)
    for module in (steps, preflight):
        monkeypatch.setattr(module, "compiler_fault", lambda: None)
    return asked


VIEWS = 4 * 135  # of the runs here


def test_a_short_run_on_amx_is_not_compiled(tiny_npz, tmp_path, on_amx, compilations, capsys):
    folder = teacher_run(tiny_npz, tmp_path)
    log = (folder / "train_log.txt").read_text()
    assert "mixed precision: bf16" in log and "steps: kernel by kernel," in log
    assert not compilations and "compiled" not in log + capsys.readouterr().out


def test_a_long_run_on_amx_is_compiled(tiny_npz, tmp_path, on_amx, compilations, monkeypatch):
    monkeypatch.setattr(steps, "COMPILED_VIEWS", VIEWS + 1)
    teacher_run(tiny_npz, tmp_path / "shorter")
    assert not compilations
    monkeypatch.setattr(steps, "COMPILED_VIEWS", VIEWS)
    teacher_run(tiny_npz, tmp_path / "as_long")
    assert len(compilations) == 1
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--step", "eager")
    assert len(compilations) == 1 and "compiled" not in (eager / "train_log.txt").read_text()


def small_net(name, num_classes):
    """One of ours by its class, which takes less time to compile."""
    parts = {
        "conv": torch.nn.Conv2d(3, 8, 3),
        "bn": torch.nn.BatchNorm2d(8),
        "relu": torch.nn.ReLU(),
        "pool": Pool(),
        "fc": torch.nn.Linear(8, num_classes),
    }
    return Chain(parts, stages=())


@needs_compiler
def test_a_run_that_is_compiled_unasked_resumes(tiny_npz, tmp_path, on_amx, monkeypatch, capsys):
    monkeypatch.setattr(steps, "COMPILED_VIEWS", VIEWS)
    monkeypatch.setattr(train_teacher, "build_model", small_net)
    whole = teacher_run(tiny_npz, tmp_path / "whole")
    said = "steps are compiled, which pays in bf16 on AMX"
    log = (whole / "train_log.txt").read_text()
    assert said in log and "kernel by kernel, compiled" in log and said in capsys.readouterr().out
    stopped_teacher_run(tiny_npz, tmp_path / "resumed", 2)
    torch._dynamo.reset()  # it is compiled anew
    assert_same_run(whole, teacher_run(tiny_npz, tmp_path / "resumed"))


@pytest.mark.parametrize("lacks", ["compiler", "headers"])
def test_without_a_compiler_auto_stays_eager(
    tiny_npz, tmp_path, on_amx, monkeypatch, capsys, lacks
):
    monkeypatch.setattr(steps, "COMPILED_VIEWS", VIEWS)
    if lacks == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler -O3")
        fault = "there is no C++ compiler 'no-such-compiler -O3'"
    else:
        monkeypatch.setenv("CXX", sys.executable)  # something that there is
        monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
        fault = f"Python's headers are not in {tmp_path}"
    line = command(tiny_npz, tmp_path, "--step", "compile")
    assert f"--step compile: {fault}" in fails(capsys, tmp_path, train_teacher.main, line)
    folder = teacher_run(tiny_npz, tmp_path)
    log = (folder / "train_log.txt").read_text()
    assert f"steps are not compiled, which pays in bf16 on AMX: {fault}" in log
    assert "steps: kernel by kernel," in log and fault in capsys.readouterr().out


def test_a_compiler_that_fails(tiny_npz, tmp_path, on_amx, compilations, monkeypatch, capsys):
    """auto goes on without, with the weights of an eager run; compile says how to go on."""

    def failing(function, **options):
        def compiled(*given, **options):
            raise BackendCompilerFailed(failing, OSError("no space left\nfor a kernel"), None)

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(steps, "COMPILED_VIEWS", VIEWS)
    eager = teacher_run(tiny_npz, tmp_path / "eager", "--step", "eager")
    assert_same_run(eager, teacher_run(tiny_npz, tmp_path / "auto"))
    fault = "the net cannot be compiled: OSError: no space left"
    assert capsys.readouterr().out.count(f"{fault}; steps are launched kernel by kernel") == 1
    with pytest.raises(RunFailed, match=f"{fault}; give --step eager"):
        teacher_run(tiny_npz, tmp_path / "compile", "--step", "compile")


@pytest.mark.parametrize(
    "what, value",
    [
        ("device", torch.device("cuda")),
        ("num_processes", 2),
        ("mixed_precision", "no"),
        ("flags", "avx2 avx512_bf16"),
        ("net", torch.nn.Sequential()),
        ("mode", "eager"),
        ("mode", "graph"),
        ("nothing", None),
    ],
)
def test_where_auto_does_not_compile(monkeypatch, tmp_path, compilations, what, value):
    """Each of these is reason enough; without any it does."""
    facts = {
        "device": torch.device("cpu"),
        "num_processes": 1,
        "mixed_precision": "bf16",
        "flags": "amx_bf16",
        "net": build_model("resnet8", 10),
        "mode": "auto",
    } | {what: value}
    info = tmp_path / "cpuinfo"
    info.write_text(f"flags : {facts['flags']}\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    accelerator = SimpleNamespace(**facts)
    compiling = steps.choose_compiling(facts["mode"], accelerator, facts["net"], 10**6)
    assert compiling.chosen is (what == "nothing") and bool(compiling.note) is compiling.chosen


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_deterministic_run_repeats_itself(tiny_npz, tmp_path, precision):
    runs = []
    for name in ("one", "other"):
        # A loss that gathers: its gradient scatters.
        line = command(tiny_npz, tmp_path / name, *FLAGS, "--loss", "FL", "--deterministic")
        run_script("train_teacher.py", *line, cwd=tmp_path, ACCELERATE_MIXED_PRECISION=precision)
        runs.append(folder_of(tmp_path / name))
    assert f"mixed precision: {precision}" in (runs[0] / "train_log.txt").read_text()
    assert_same_run(*runs)


def test_batches_are_counted_after_the_epoch(tiny_npz, tmp_path, monkeypatch):
    """No step launches a count, and the weights hold the counts that torch itself would have."""
    counted = []
    forward = torch.nn.BatchNorm2d.forward

    def noting(self, maps):
        counted.append(self.training and self.num_batches_tracked is not None)
        return forward(self, maps)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", noting)
    monkeypatch.setattr(train_teacher, "check_net", lambda *_: None)  # a forward of its own
    folder = teacher_run(tiny_npz, tmp_path, "--step", "eager")
    assert counted and not any(counted)
    state = weights(folder)
    counts = {state[name].item() for name in state if name.endswith("num_batches_tracked")}
    assert counts == {4 * 5}


def test_counts_come_back_when_an_epoch_fails():
    images = torch.rand(2, 3, 4, 4)
    ours = Chain({"bn": torch.nn.BatchNorm2d(3)}, stages=())
    with pytest.raises(KeyError), steps.uncounted(ours, steps=7):
        ours(images)
        raise KeyError
    assert ours.bn.num_batches_tracked == 0
    with steps.uncounted(ours, steps=7):
        ours(images)
    assert ours.bn.num_batches_tracked == 7
    # One that is not ours counts as ever.
    theirs = torch.nn.BatchNorm2d(3, momentum=None)
    with steps.uncounted(theirs, steps=7):
        theirs(theirs(images))
    assert theirs.num_batches_tracked == 2
