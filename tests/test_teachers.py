"""Teachers from run folders and from third parties' files, and everything that is refused."""

import hashlib
import json
import os
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from models import build_model
from utils.calibration.metrics import classification_metrics
from utils.data import NORMALISATION, Dataset, Split, load_dataset
from utils.program import UserError
from utils.teachers import load_teacher

MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
LABEL = "FL+MDCA_gamma=3_beta=1"


def make_dataset(**changes) -> Dataset:
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4), None)
    facts = {
        "name": "cifar10",
        "num_classes": 10,
        "train": split,
        "val": split,
        "test": split,
        "mean": MEAN,
        "std": STD,
        "fingerprint": "f" * 64,
    }
    return Dataset(**(facts | changes))


def checkpoint(model="resnet8", classes=10, **changes) -> dict:
    torch.manual_seed(5)
    facts = {
        "state_dict": build_model(model, classes).state_dict(),
        "model": model,
        "dataset": "cifar10",
        "num_classes": classes,
        "mean": list(MEAN),
        "std": list(STD),
        "loss": "FL+MDCA",
        "loss_parameters": {"gamma": 3.0, "beta": 1.0},
        "label": LABEL,
        "seed": 42,
        "split_seed": 3,
        "epoch": 12,
        "metrics": {"top1": 0.9},
        "fingerprint": "f" * 64,
    }
    return facts | changes


def make_run(folder: Path, finished=True, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    torch.save(checkpoint(**changes), folder / "model_best.pth")
    torch.save(checkpoint(**changes) | {"epoch": 20}, folder / "model_last.pth")
    torch.save({"best": checkpoint(**changes), "optimizer": {}}, folder / "checkpoint.pth")
    if finished:
        (folder / "result.json").write_text("{}")
    return folder


def third_party(tmp_path, model="resnet8", classes=10, change=lambda state: state, **options):
    """A file as another code base saves it; the net whose weights it holds."""
    torch.manual_seed(6)
    net = build_model(model, classes, **options).eval()
    file = tmp_path / "their net,v1.pth"
    torch.save(change(net.state_dict()), file)
    return file, net


def renamed(*changes):
    def change(state):
        for pattern, replacement in changes:
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        return state

    return change


def load(path, dataset=None, split_seed=3, **options):
    return load_teacher(path, dataset or make_dataset(), split_seed, **options)


def refused(path, *words, **options) -> str:
    """The one line that refuses `path`; it has all the words."""
    with pytest.raises(UserError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    for word in ("--teacher", *words):
        assert word in message, message
    return message


def same_net(net, other):
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


# --- our own runs ---------------------------------------------------------------------------------


def test_a_run_folder_says_everything(tmp_path):
    run = make_run(tmp_path / "run")
    teacher = load(run)
    file = run / "model_best.pth"
    assert teacher.path == file
    assert teacher.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (teacher.model, teacher.num_classes, teacher.label) == ("resnet8", 10, LABEL)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    assert (teacher.seed, teacher.split_seed) == (42, 3)
    for key, value in checkpoint()["state_dict"].items():
        assert torch.equal(teacher.net.state_dict()[key], value)


def test_the_teacher_is_ready_to_teach(tmp_path):
    teacher = load(make_run(tmp_path / "run"))
    assert not any(module.training for module in teacher.net.modules())
    assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
    assert teacher.net.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_identity_is_the_same_wherever_the_file_lies(tmp_path):
    first, second = make_run(tmp_path / "a"), tmp_path / "b"
    first_identity = load(first).identity
    first.rename(second)
    moved = first_identity | {"path": str(second / "model_best.pth")}
    assert load(second).identity == moved == json.loads(json.dumps(moved))
    assert first_identity["mean"] == list(MEAN)


def test_best_or_last(tmp_path):
    run = make_run(tmp_path / "run")
    assert load(run, select="best").path.name == "model_best.pth"
    assert load(run, select="last").path.name == "model_last.pth"
    assert load(str(run / "model_last.pth")).path.name == "model_last.pth"
    refused(run / "model_last.pth", "--teacher_select", select="last")
    (run / "model_last.pth").unlink()
    refused(run, str(run), "model_last.pth", "--teacher_select", select="last")


def test_the_only_finished_run_below_a_folder(tmp_path):
    run = make_run(tmp_path / "cifar10" / "resnet8" / "a")
    make_run(tmp_path / "cifar10" / "resnet8" / "b", finished=False)
    assert load(tmp_path).path == run / "model_best.pth"


def test_several_runs_are_listed(tmp_path):
    for index in range(12):
        make_run(tmp_path / "resnet8" / f"run{index:02}")
    message = refused(tmp_path, str(tmp_path), "12 finished runs", "resnet8/run00", "and 2 more")
    assert "run10" not in message


def test_an_unfinished_run_is_no_teacher(tmp_path):
    run = make_run(tmp_path / "run", finished=False)
    for path in (run, tmp_path):
        refused(path, "--teacher_path", str(path), "no finished run", "model_best.pth")
    assert load(run / "model_best.pth").model == "resnet8"


def test_a_folder_without_a_run(tmp_path):
    refused(tmp_path, "--teacher_path", str(tmp_path), "no weights file")


@pytest.mark.parametrize("path", ["nowhere", "x" * 5000, "~nobody/teacher", "a\0b"])
def test_a_missing_path(path):
    refused(path, "--teacher_path", "no such file or folder", "run folder")


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path(path):
    refused(path, "--teacher_path is empty")


def test_the_resume_file_is_no_teacher(tmp_path):
    run = make_run(tmp_path / "run")
    refused(run / "checkpoint.pth", "resumes", "model_best.pth")


def test_another_architecture(tmp_path):
    run = make_run(tmp_path / "run")
    assert load(run, model="resnet8").model == "resnet8"
    refused(run, "--teacher_path", "resnet8", "--teacher resnet20", model="resnet20")


def test_weights_that_belie_their_own_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", state_dict=build_model("resnet14").state_dict())
    refused(run, "resnet8", "looks like resnet14")


def test_an_architecture_that_the_zoo_lost(tmp_path):
    content = checkpoint() | {"model": "resnet9"}
    torch.save(content, tmp_path / "file.pth")
    refused(tmp_path / "file.pth", "--teacher: ", "resnet9", "nearest")


def test_another_data_set(tmp_path):
    run = make_run(tmp_path / "run")
    other = make_dataset(name="cifar100", num_classes=100, fingerprint="e" * 64)
    refused(run, "--dataset", "cifar10 (10 classes)", "cifar100 (100 classes)", dataset=other)
    other = make_dataset(fingerprint="e" * 64)
    refused(run, "--dataset", "other data of the name cifar10", dataset=other)


def test_the_same_data_under_another_name(tmp_path):
    run = make_run(tmp_path / "run")
    assert load(run, dataset=make_dataset(name="moved")).label == LABEL


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_without_a_fingerprint_the_name_decides(tmp_path, side):
    run = make_run(tmp_path / "run", fingerprint="" if side == "teacher" else "f" * 64)
    here = "" if side == "student" else "f" * 64
    assert load(run, dataset=make_dataset(fingerprint=here)).label == LABEL
    refused(run, "--dataset", dataset=make_dataset(name="svhn", fingerprint=here))


def test_another_split(tmp_path):
    run = make_run(tmp_path / "run")
    refused(run, "--split-seed 3", "not 0", "validate", split_seed=0)


@pytest.mark.parametrize("loss", ["FL+MDCA", LABEL])
def test_the_loss_is_confirmed(tmp_path, loss):
    assert load(make_run(tmp_path / "run"), loss=loss).label == LABEL


@pytest.mark.parametrize(("given", "recorded"), [("cross_entropy", "NLL"), ("MDCA", "NLL+MDCA")])
def test_the_loss_by_another_name(tmp_path, given, recorded):
    run = make_run(tmp_path / "run", loss=recorded, label=recorded)
    assert load(run, loss=given).label == recorded


@pytest.mark.parametrize("loss", ["NLL", "FL", "MDCA", "KD", "FL+MDCA_gamma=1_beta=1"])
def test_the_loss_contradicts(tmp_path, loss):
    run = make_run(tmp_path / "run")
    refused(run, "--teacher_path", LABEL, f"--teacher_loss {loss}", loss=loss)


def test_an_unknown_loss(tmp_path):
    refused(
        make_run(tmp_path / "run"),
        "--teacher_loss FL+MDCX: ",
        "'FL+MDCX'",
        "FL+MDCA",
        loss="FL+MDCX",
    )


def test_what_a_strangers_file_says_of_its_loss_is_not_believed(tmp_path):
    """Checkpoints of others often hold the value of the loss."""
    file, _ = third_party(
        tmp_path, change=lambda state: {"state_dict": state, "loss": torch.tensor(0.3)}
    )
    assert load(file, model="resnet8", loss="NLL").loss == "NLL"


def test_a_distilled_net_teaches(tmp_path):
    label = "KD_T=4_Lambda=0.9_from_resnet56_NLL_seed=1"
    run = make_run(tmp_path / "run", loss="KD", label=label)
    assert load(run, loss="KD").label == load(run).label == label
    refused(run, "--teacher_loss NLL", loss="NLL")


def test_a_label_cannot_leave_the_run_folder(tmp_path):
    run = make_run(tmp_path / "run", label="../../elsewhere")
    assert "/" not in load(run).label


def test_our_checkpoint_has_its_own_normalisation(tmp_path):
    mean, std = NORMALISATION["half"]
    run = make_run(tmp_path / "run", mean=list(mean), std=list(std))
    assert load(run).mean == load(run, norm="half").mean == tuple(mean)
    refused(run, "--teacher_norm imagenet", norm="imagenet")


# --- third parties' files -------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("head", ["linear", "fc", "classifier"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_heads_and_prefixes(tmp_path, wrapper, head, prefix):
    def change(state):
        state = renamed((r"^fc\.", f"{head}."), (r"^", prefix))(state)
        return {wrapper: OrderedDict(state), "epoch": 3} if wrapper else state

    file, net = third_party(tmp_path, change=change)
    teacher = load(file, model="resnet8")
    assert same_net(net, teacher.net)
    assert (teacher.label, teacher.seed, teacher.split_seed) == ("their-net,v1", None, None)


@pytest.mark.parametrize(
    ("model", "options", "changes"),
    [
        ("resnet8", {"shortcut": "pad"}, []),
        ("resnet56_bottleneck", {"shortcut": "pad"}, []),
        ("resnet8", {}, [(r"\.downsample\.", ".shortcut.")]),
        ("wrn_16_1", {}, []),
        ("wrn_16_2", {}, [(r"^layer(\d)\.", r"block\1.layer."), ("downsample", "convShortcut")]),
    ],
)
def test_shortcuts(tmp_path, model, options, changes):
    file, net = third_party(tmp_path, model, change=renamed(*changes), **options)
    teacher = load(file, model=model)
    assert same_net(net, teacher.net)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(teacher.net(images), net(images), rtol=1e-4, atol=1e-4)


def test_files_from_before_batch_norm_counted(tmp_path):
    def change(state):
        return {key: value for key, value in state.items() if "num_batches" not in key}

    file, net = third_party(tmp_path, change=change)
    assert same_net(net, load(file, model="resnet8").net)


def test_half_precision_weights(tmp_path):
    def change(state):
        return {
            key: value.half() if value.is_floating_point() else value
            for key, value in state.items()
        }

    file, _ = third_party(tmp_path, change=change)
    assert load(file, model="resnet8").net.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("norm", [None, "cifar10", "cifar100", "imagenet", "half"])
def test_their_normalisation(tmp_path, norm):
    file, _ = third_party(tmp_path)
    teacher = load(file, model="resnet8", norm=norm)
    expected = NORMALISATION[norm] if norm else (MEAN, STD)
    assert (teacher.mean, teacher.std) == tuple(map(tuple, expected))


def test_an_unknown_normalisation(tmp_path):
    file, _ = third_party(tmp_path)
    refused(file, "--teacher_norm mnist", "imagenet", model="resnet8", norm="mnist")


def test_any_split_seed_and_loss_will_do_for_a_file_that_says_neither(tmp_path):
    file, _ = third_party(tmp_path)
    assert load(file, model="resnet8", split_seed=9, loss="CutMix").split_seed is None


def test_a_file_that_names_no_architecture(tmp_path):
    file, _ = third_party(tmp_path, shortcut="pad")
    refused(file, str(file), "it looks like resnet8", "give --teacher")


def test_an_unknown_architecture(tmp_path):
    file, _ = third_party(tmp_path)
    refused(file, "--teacher: ", "resnet9", "nearest is resnet8", model="resnet9")


@pytest.mark.parametrize("options", [{}, {"shortcut": "pad"}])
@pytest.mark.parametrize("model", ["resnet20", "resnet56_bottleneck", "wrn_16_2"])
def test_weights_of_another_architecture(tmp_path, model, options):
    file, _ = third_party(tmp_path, **options)
    words = ("--teacher_path", str(file), f"--teacher {model}", "it looks like resnet8")
    refused(file, *words, model=model)


def test_weights_of_no_net_of_the_zoo(tmp_path):
    def change(state):
        return state | {"conv1.weight": torch.zeros(64, 3, 7, 7)}

    file, _ = third_party(tmp_path, change=change)
    refused(file, "conv1.weight", "(64, 3, 7, 7)", "no net of this zoo", model="resnet8")


def test_another_number_of_classes(tmp_path):
    file, _ = third_party(tmp_path, classes=100)
    refused(file, "100 classes", "--dataset cifar10", model="resnet8")


@pytest.mark.parametrize("head", [None, torch.zeros(())])
def test_no_head(tmp_path, head):
    def change(state):
        body = {key: value for key, value in state.items() if not key.startswith("fc.")}
        return body if head is None else body | {"fc.weight": head}

    file, _ = third_party(tmp_path, change=change)
    refused(file, "--teacher_path", "head", model="resnet8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite(tmp_path, bad):
    def change(state):
        return state | {"bn1.running_var": torch.full((16,), bad, dtype=torch.float64)}

    file, _ = third_party(tmp_path, change=change)
    refused(file, "--teacher_path", "NaN or infinite", model="resnet8")


# --- files that are none --------------------------------------------------------------------------


class RunsCode:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing))]
)
def test_a_file_runs_no_code(tmp_path, save):
    trace, file = tmp_path / "trace", tmp_path / "teacher.pth"
    save({"state_dict": RunsCode(trace), "model": "resnet8"}, file)
    refused(file, "--teacher_path", str(file), model="resnet8")
    assert not trace.exists()
    pickle.loads(pickle.dumps(RunsCode(trace)))
    assert trace.exists()  # so it would have run


@pytest.mark.parametrize(
    ("thing", "named"),
    [
        (build_model("resnet8"), "models.resnet.ResNet"),
        ({"state_dict": {}, "args": Namespace(lr=1)}, "argparse.Namespace"),
    ],
)
def test_more_than_tensors_is_refused_by_name(tmp_path, thing, named):
    torch.save(thing, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", named, "could run code", "state_dict", model="resnet8")


@pytest.mark.parametrize("thing", [torch.zeros(3), [1, 2], {}, {"epoch": 3}, {"state_dict": {}}])
def test_no_state_dict(tmp_path, thing):
    torch.save(thing, tmp_path / "net.pth")
    refused(tmp_path / "net.pth", "--teacher_path", "state dict", model="resnet8")


def test_an_empty_file(tmp_path):
    (tmp_path / "net.pth").touch()
    refused(tmp_path / "net.pth", "empty")


@pytest.mark.parametrize("kept", [1, 0.5, 100, 5000, -10])
def test_a_truncated_file(tmp_path, kept):
    run = make_run(tmp_path / "run")
    data = (run / "model_best.pth").read_bytes()
    kept = int(kept * len(data)) if kept == 0.5 else kept
    (run / "model_best.pth").write_bytes(data[:kept])
    refused(run, "--teacher_path", "model_best.pth", "damaged")


@pytest.mark.parametrize(
    "text", [b"hello world", bytes(100), b"PK\x03\x04", b"<html>", b"\x80\x02"]
)
def test_some_other_file(tmp_path, text):
    (tmp_path / "net.pth").write_bytes(text)
    refused(tmp_path / "net.pth", "--teacher_path", "damaged, or not written by torch.save")


def test_damage_anywhere_ends_in_one_line_or_a_teacher(tmp_path):
    run = make_run(tmp_path / "run")
    data = (run / "model_best.pth").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        # The front holds the pickled names, the end the archive's table: where damage hurts.
        at = rng.choice([rng.integers(2000), rng.integers(len(data)), -rng.integers(1, 4000)])
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        (run / "model_best.pth").write_bytes(damaged)
        try:
            load(run)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path):
    file, _ = third_party(tmp_path)
    file.chmod(0)
    refused(file, "cannot be read", model="resnet8")


# --- the published teachers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10():
    folder = Path(os.environ.get("KD_DATA", ""))
    if not (folder / "cifar10.npz").is_file():
        pytest.skip("needs cifar10.npz in the folder that KD_DATA names")
    return load_dataset("cifar10", folder, download=False)


@pytest.mark.parametrize(
    ("model", "error", "calibration_error"),
    [("resnet20", 8.27, 5.32), ("resnet56", 6.61, 4.64)],
)
def test_published_teachers(cifar10, model, error, calibration_error):
    files = sorted(Path(os.environ.get("KD_CHECKPOINTS", "/nonexistent")).glob(f"{model}-*.th"))
    if not files:
        pytest.skip(f"needs {model}-*.th in the folder that KD_CHECKPOINTS names")
    teacher = load_teacher(files[0], cifar10, split_seed=0, model=model, norm="imagenet")
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (teacher.mean, teacher.std))
    with torch.inference_mode():
        logits = torch.cat(
            [
                teacher.net(((images / 255 - mean) / std).to(memory_format=torch.channels_last))
                for images in cifar10.test.images.split(250)
            ]
        )
    metrics = classification_metrics(logits, cifar10.test.labels)
    assert 100 * (1 - metrics["top1"]) == pytest.approx(error, abs=0.005)
    assert 100 * metrics["ece"] == pytest.approx(calibration_error, abs=0.01)
