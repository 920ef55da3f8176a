"""Nothing in a step waits for the device, and the benchmark measures what it says."""

import copy
import re
import sys
from contextlib import contextmanager

import cuda_graphs
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, run_script

import losses.distillation
from losses import DISTILLATIONS, FEATURES, build_distillation, build_loss
from models import build_model
from scripts import benchmark, profile_step
from scripts.benchmarking import contenders, floor, runs_at_once
from utils import steps, training
from utils.data import load_dataset
from utils.data.shared import train_loader
from utils.evaluation import predict
from utils.features import feature_term
from utils.program import RunFailed
from utils.settings import LossChoice, Recipe
from utils.tasks import ClassificationTask, DistillationTask
from utils.teachers.answers import answers_of
from utils.teachers.nets import NetTeacher

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")


@contextmanager
def no_waiting():
    """Refuse what would make the host wait: on a GPU torch finds it, on the CPU its callers do."""

    def refuse(*arguments):
        raise AssertionError("the host waits for a tensor")

    on_gpu = torch.cuda.is_available()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in WAITS:
                patch.setattr(torch.Tensor, name, refuse)
            if on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            yield
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")


def test_torch_refuses_to_wait_only_there(monkeypatch):
    """Also where a step has failed: the tests that follow run in the same process."""
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ZeroDivisionError), no_waiting():
        raise ZeroDivisionError
    assert modes == ["error", "default"]


def after_the_first(batches):
    """The first step brings the epoch's plan to the device; no other may wait."""
    yield next(batches)
    with no_waiting():
        yield from batches


class WatchedLoader:
    """A loader whose draws go through `watch`."""

    def __init__(self, loader, watch):
        self.loader = loader
        self.watch = watch

    def __len__(self):
        return len(self.loader)

    def epoch(self, epoch):
        return self.watch(self.loader.epoch(epoch))


def some_epochs(task, data, monkeypatch, watch=after_the_first, **settings) -> None:
    """`settings`: of the recipe."""
    recipe = Recipe(model="resnet8", epochs=2, train_batch_size=32, **settings)
    accelerator = Accelerator()
    monkeypatch.setattr(training, "REPORT_SECONDS", float("inf"))
    loader = train_loader(data, recipe, accelerator)
    trainer = training.Trainer(task, recipe, accelerator, len(loader))
    step = training.eager_step(trainer, loader)
    step = training.launched(step, trainer, loader, mode="auto", compiled=False)
    for epoch in (1, 1, 2):
        training.train_epoch(trainer, step, WatchedLoader(loader, watch), epoch)


def teaching_task(data, loss, kind=ClassificationTask):
    return kind(build_model("resnet8", data.num_classes), build_loss(loss), data)


@pytest.fixture
def data(tiny_npz):
    return load_dataset(str(tiny_npz), "data")


def test_an_average_of_the_weights_waits_for_nothing(data, monkeypatch):
    some_epochs(teaching_task(data, "NLL"), data, monkeypatch, ema=0.9)


def test_waiting_is_noticed(data, monkeypatch):
    class Waits(ClassificationTask):
        def forward(self, batch):
            output = super().forward(batch)
            return output._replace(loss=output.loss * (1 if output.loss > 0 else 2))

    with pytest.raises((AssertionError, RuntimeError), match="wait|synchroniz"):
        some_epochs(teaching_task(data, "NLL", Waits), data, monkeypatch)


# Every base and every term.
LOSSES = ["NLL", "LS+MDCA", "FL+MMCE", "FLSD+DCA", "DFL+MbLS", "AdaFocal", "Brier+CPC"]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_of_a_teacher_waits(data, monkeypatch, loss):
    some_epochs(teaching_task(data, loss), data, monkeypatch, scheduler="warmupcosine")


@pytest.mark.parametrize(
    "settings", [{"mix": "mixup"}, {"mix": "cutmix"}, {"optimizer": "adamw", "lr": 0.001}]
)
def test_no_step_of_another_recipe_waits(data, monkeypatch, settings):
    some_epochs(teaching_task(data, "NLL"), data, monkeypatch, **settings)


@pytest.mark.parametrize(
    "distill, cached", [("KD", True), *((name, False) for name in DISTILLATIONS)]
)
def test_no_step_of_a_student_waits(data, monkeypatch, tmp_path, distill, cached):
    # It looks at values on the CPU alone, where nothing waits.
    monkeypatch.setattr(losses.distillation, "refuse_minus_infinity", lambda *_: None)
    accelerator = Accelerator()
    teacher = contenders.random_teacher("resnet8", data, accelerator)

    def learning_task():
        answers = answers_of(teacher, data, accelerator, 42, str(tmp_path) if cached else None)
        net = build_model("resnet8", data.num_classes)
        return DistillationTask(net, build_distillation(distill), teacher, answers, data)

    if cached:
        some_epochs(learning_task(), data, monkeypatch, watch=iter)  # to write an epoch waits
        task = learning_task()
        monkeypatch.setattr(NetTeacher, "logits", None)
    else:
        task = learning_task()
    some_epochs(task, data, monkeypatch)


@pytest.mark.parametrize("term", FEATURES)
def test_no_step_of_a_student_of_features_waits(data, monkeypatch, term):
    accelerator = Accelerator()
    teacher = contenders.random_teacher("resnet8", data, accelerator)
    teacher.members[0].net = build_model("resnet8", data.num_classes).eval()  # not folded
    teacher.to(accelerator.device, fold=False)
    net = build_model("resnet8", data.num_classes)
    name = f"KD+{term}"
    features = feature_term(LossChoice(name), net, teacher, data, accelerator)
    answers = answers_of(teacher, data, accelerator, 42)
    task = DistillationTask(net, build_distillation(name), teacher, answers, data, features)
    some_epochs(task, data, monkeypatch)


@pytest.mark.parametrize("given, most", [(None, {"cpu": 128, "cuda": 300}), (200, 200), (7, 7)])
def test_evaluation_takes_what_suits_the_device_or_what_it_is_told(given, most):
    class Net(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return images.mean((2, 3))

    sizes, accelerator, data = [], Accelerator(), contenders.random_data(300)
    predict(Net(), data.train, data.mean, data.std, accelerator, given)
    assert sum(sizes) == 300
    assert max(sizes) == (most if given else most[accelerator.device.type])


@pytest.mark.parametrize("module", ["train_teacher", "train_student", "scripts.benchmark"])
def test_threads_spin_only_shortly(module, monkeypatch):
    """What libgomp says it has read, when the module has loaded it."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    line = ["python", "-c", f"import {module}"]
    said = run_script(*line, cwd=ROOT, OMP_DISPLAY_ENV="verbose").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch has other threads than libgomp's")
    assert "GOMP_SPINCOUNT = '3000'" in said


def test_a_run_at_once_that_fails_is_no_rate(tmp_path):
    with pytest.raises(RunFailed, match="a run has ended with an error"):
        runs_at_once.histories([sys.executable, "-c", "raise SystemExit(2)"], tmp_path, 2)


def test_runs_at_once_last_long_enough_to_overlap():
    records = [{"seconds": seconds} for seconds in (9.0, 0.25, 0.2)]
    assert runs_at_once.epochs_of(records, 30) == 150  # the first epoch is no measure
    assert runs_at_once.epochs_of([{"seconds": 60.0}] * 3, 30) == 6
    # Alone at its start and its end, a run is faster.
    runs = [[{"images_per_second": rate} for rate in (900, 100, 110, 900)]] * 2
    assert runs_at_once.total_rate(runs) == 210


@pytest.mark.parametrize("cached", [False, True])
def test_a_bare_step_trains_and_is_captured_like_ours(monkeypatch, tmp_path, cached):
    """With graphs there are two of them, of which one is launched kernel by kernel."""
    monkeypatch.setattr(steps, "SURVIVES_A_FAILED_CAPTURE", True)
    if torch.cuda.is_available():
        pytest.skip("the stand-in for graphs counts their replays")
    monkeypatch.setattr(steps, "can_capture", lambda accelerator: True)
    graphs = cuda_graphs.emulate(monkeypatch)
    data, accelerator = contenders.random_data(5 * 8), Accelerator()
    args = benchmark.options(["--batch-size", "8", "--workers", "0"])
    row = benchmark.Row("resnet8", "resnet8", cached=True) if cached else benchmark.Row("resnet8")
    tasks, build_task = [], contenders.build_task

    def noting(*given):
        tasks.append(build_task(*given))
        return tasks[-1]

    monkeypatch.setattr(contenders, "build_task", noting)
    passes = benchmark.contenders_of(accelerator, data, row, args, str(tmp_path))
    assert list(passes) == ["conventional", "ours", "bare step", "bare step, eager"]
    passes["ours"](5)
    if cached:
        monkeypatch.setattr(NetTeacher, "logits", None)
        passes["ours"](5)
    graphs.clear()
    passes["bare step"](5)
    assert [graph.replays for graph in graphs] == [2]

    before = copy.deepcopy(tasks[-1].net.state_dict())
    passes["bare step, eager"](1)
    assert len(graphs) == 1
    after = tasks[-1].net.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_the_cost_of_a_net():
    """ResNet-20 is known for its 40.8 million multiply-adds; a teacher adds its forward pass."""
    operations, numbers = floor.forward_cost("resnet20")
    assert operations == pytest.approx(2 * 40.8e6, rel=0.01)
    assert floor.training_cost("resnet20") == (3 * operations, 3 * numbers)
    assert floor.training_cost("resnet20", "resnet20") == (4 * operations, 4 * numbers)


def test_the_floor_is_the_slower_of_products_and_memory():
    device = floor.DeviceRates(products=1000, copies=200)
    assert floor.floor_rate(device, floor.Cost(operations=100, numbers=1), "no") == 10
    assert floor.floor_rate(device, floor.Cost(operations=1, numbers=10), "no") == 5
    assert floor.floor_rate(device, floor.Cost(operations=1, numbers=10), "bf16") == 10


def test_a_profile_of_kernels():
    """Two streams that overlap, a gap and a conversion, in two steps of 50 microseconds."""
    span = profile_step.Span
    spans = [span("nchwToNhwcKernel", 60, 70), span("gemm", 0, 40), span("relu", 20, 50)]
    spans.append(span("gemm", 90, 100))
    assert profile_step.busy_time(spans) == 70
    text = profile_step.report(spans, steps=2)
    assert "2.0 kernels a step, 0.050 ms a step, of which 30.0 % are gaps" in text
    assert "0.5 conversions of layout a step, 10.0 % of the time" in text
    assert re.search(r"\ngemm +1\.0 +25\.0 +50\.0 %\n", text)


def test_a_profile_of_a_run(capsys):
    profile_step.main(["--batch-size", "4"])
    assert re.search(r"\n(aten::)?conv", capsys.readouterr().out) or torch.cuda.is_available()


def test_the_day_of_a_gpu_deletes_only_runs_of_its_own(tmp_path):
    """In a folder where `runs` and `cache` are the user's; its programs do nothing."""
    former = tmp_path / "made-by-gpu.sh/runs/no_NLL/result.json"
    theirs = [tmp_path / "runs/teachers/result.json", tmp_path / "cache/logits.npz"]
    for file in (former, *theirs):
        file.parent.mkdir(parents=True)
        file.touch()
    start = ("bash", ROOT / "scripts/gpu.sh", "--dry", ".")
    run_script(*start, cwd=tmp_path, PYTHON="true", KD_PARTS="7 8")  # it goes on
    assert former.exists()
    run_script(*start, cwd=tmp_path, PYTHON="true")
    assert all(file.exists() for file in theirs) and not former.exists()


def test_the_day_of_a_gpu_writes_over_no_page_of_another_hand(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("mine")
    command = ["bash", ROOT / "scripts/gpu.sh", "--dry", tmp_path]
    done = run_script(*command, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "performance.md: another hand has written it" in done.stderr
    assert page.read_text() == "mine" and list(tmp_path.iterdir()) == [page]


@pytest.mark.long
def test_the_day_of_a_gpu_rehearsed(tmp_path):
    """Every part of gpu.sh, made small, on the CPU; the benchmark trains as `fit` does."""
    assert contenders.train_epoch is training.train_epoch
    command = ["bash", ROOT / "scripts/gpu.sh", "--dry", "out"]
    done = run_script(*command, cwd=tmp_path, PYTHON=sys.executable)
    page = (tmp_path / "out/performance.md").read_text()
    assert "| resnet56 -> resnet8, cached |" in page
    assert re.search(r"\| runs at once .*\n.*\n\| 1 \| [1-9]", page)
    assert "torch" in page and re.search("4 epochs of resnet8 .* its epochs: [0-9]+ s", page)
    assert "kernels a step" in page and "failed" not in done.stdout
    # A CPU at batches of 4 is slower than a GPU is to be.
    assert "slower than its target: resnet20, images/s" in done.stdout
