"""Files for other programs: what they hold, what they compute, and when none is written."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, fails
from onnxruntime import InferenceSession
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from scipy.special import softmax
from torch.torch_version import TorchVersion

import train_student
import train_teacher
from models import build_model
from scripts import export, posthoc, predict
from scripts.deployment.exported_net import (
    FORMATS,
    ONNX_PACKAGES,
    ONNX_TORCH,
    CalibratedNet,
    safetensors_of,
    with_sets,
)
from scripts.deployment.half_net import round_to_half
from utils.data import load_dataset
from utils.data.views import normalise
from utils.program import UserError, files
from utils.program.files import check_not_input


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_npz):
    root = tmp_path_factory.mktemp("finished")
    train_teacher.main(command(tiny_npz, root, "--epochs", "1"))
    return next(root.rglob("result.json")).parent


@pytest.fixture
def run(finished, tmp_path):
    """A copy, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def images(tiny_npz):
    return load_dataset(str(tiny_npz), ".").test.images.contiguous()


def export_to(file, run, *flags):
    export.main([str(run), "--out", str(file), *flags])
    return file


@pytest.fixture(scope="module")
def onnx_file(finished, tmp_path_factory):
    if torch.__version__ < ONNX_TORCH:
        pytest.skip("this torch is too old for ONNX")
    return export_to(tmp_path_factory.mktemp("onnx") / "net.onnx", finished)


def stored(run, weight=1.0, bias=0.0):
    """The calibrated probabilities of the run's stored logits."""
    with np.load(run / "predictions.npz") as arrays:
        return softmax(arrays["best_test_logits"].astype(float) * weight + bias, axis=1)


def from_onnx(file, images):
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"images": images.numpy()})
    return found, session.get_modelmeta().custom_metadata_map


def from_torchscript(file, images):
    files = {"metadata.json": ""}
    return torch.jit.load(file, _extra_files=files)(images).numpy(), json.loads(files.popitem()[1])


def from_safetensors(file, images):
    with safe_open(file, "pt") as content:
        about = content.metadata()
    saved = json.loads(about["checkpoint"])
    net = build_model(saved["model"], saved["num_classes"]).eval()
    net.load_state_dict(load_file(file))
    with torch.no_grad():
        logits = net(normalise(images, saved["mean"], saved["std"])).numpy()
    return softmax(logits * saved["softmax"]["weight"] + saved["softmax"]["bias"], axis=1), about


READERS = {"onnx": from_onnx, "torchscript": from_torchscript, "safetensors": from_safetensors}


def test_tied_weights_are_saved_once_for_each_name():
    layer = torch.nn.Linear(3, 3)
    state = torch.nn.Sequential(layer, layer).state_dict()
    saved = load_safetensors(safetensors_of(state, {}))
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_file_gives_calibrated_probabilities(finished, onnx_file, images, tmp_path, form):
    file = onnx_file
    if form != "onnx":
        file = export_to(tmp_path / "file", finished, "--format", form)
    result = json.loads((finished / "result.json").read_text())
    best = result["best"]
    for n in (1, 7, len(images)):
        found, about = READERS[form](str(file), images[:n])
        expected = stored(finished, 1 / best["temperature"])[:n]
        assert found.dtype != np.float16 and np.abs(found - expected).max() < 1e-5
    texts = ("dataset", "command", "calibration", "precision")
    assert json.loads(about["images"]) == {"train": 135, "val": 15, "test": 40}
    assert json.loads(about["image_side"]) == 8
    told = {key: text if key in texts else json.loads(text) for key, text in about.items()}
    assert told["checkpoint"]["fingerprint"] == result["fingerprint"]
    assert told["temperature"] == best["temperature"]
    assert told["ece"] == {logits: best["test"][logits]["ece"] for logits in ("raw", "scaled")}
    assert (told["dataset"], told["classes"], told["class_names"]) == ("tiny", 4, None)
    assert told["command"] == json.loads((finished / "config.json").read_text())["command"]


def test_what_a_file_says_of_its_worth(finished, onnx_file, images):
    """Of the test split, with sets of the validation split: from their stored logits."""
    with np.load(finished / "predictions.npz") as arrays:
        labels = arrays["test_labels"]
    best = json.loads((finished / "result.json").read_text())["best"]
    _, about = from_onnx(onnx_file, images[:1])
    own = stored(finished, 1 / best["temperature"])[range(len(labels)), labels]
    thresholds = json.loads(about["sets"])
    assert list(thresholds) == ["0.8", "0.9"]  # 15 validation images
    expected = {level: (own >= thresholds[level]).mean() for level in thresholds}
    assert json.loads(about["coverage"]) == expected
    everyone = stored(finished, 1 / best["temperature"])
    sizes = {level: (everyone >= thresholds[level]).sum(1).mean() for level in thresholds}
    assert json.loads(about["set_size"]) == pytest.approx(sizes)
    assert json.loads(about["top1"]) == best["test"]["raw"]["top1"]
    assert best["test"]["scaled"]["ece"] <= json.loads(about["ece_upper"]) < 1
    assert about["precision"] == "float32"


def test_a_file_says_nothing_of_where_the_code_lies(onnx_file):
    assert str(ROOT / "scripts").encode() not in onnx_file.read_bytes()


def test_sets_inside(onnx_file, images):
    found, about = from_onnx(onnx_file, images)
    threshold = float(np.sort(found.ravel())[len(found.ravel()) // 3])  # some are in, one exactly
    session = InferenceSession(with_sets(onnx_file.read_bytes(), "0.9", threshold))
    for n in (1, len(images)):
        outputs = ["probabilities", "set_at_0.9"]
        probabilities, inside = session.run(outputs, {"images": images[:n].numpy()})
        assert inside.dtype == bool and (probabilities == found[:n]).all()
        assert (inside == (probabilities >= np.float32(threshold))).all()
    assert 0 < inside.mean() < 1
    assert session.get_modelmeta().custom_metadata_map == about


def test_names_of_classes_are_in_the_file(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    for names in (["red", "green", "blue", "grey"], None):
        content = config | {"class_names": names}
        if names is None:  # a run of before they were kept
            del content["class_names"]
        (run / "config.json").write_text(json.dumps(content))
        export_to(tmp_path / "file", run, "--format", "safetensors")
        with safe_open(tmp_path / "file", "pt") as content:
            about = content.metadata()
        assert json.loads(about["class_names"]) == names


def test_other_calibrations(run, images, tmp_path, capsys):
    flags = ("--format", "safetensors", "--calibration")
    found, _ = from_safetensors(export_to(tmp_path / "raw", run, *flags, "none"), images)
    assert np.abs(found - stored(run)).max() < 1e-5
    out = ("--out", str(tmp_path / "vector"))
    error = fails(capsys, tmp_path, export.main, [str(run), *out, *flags, "vector"])
    assert f"scripts.posthoc {run} --write" in error
    posthoc.main([str(run), "--write"])
    fitted = json.loads((run / "posthoc.json").read_text())["best"]["vector"]
    found, about = from_safetensors(export_to(tmp_path / "vector", run, *flags, "vector"), images)
    assert np.abs(found - stored(run, fitted["weight"], fitted["bias"])).max() < 1e-5
    assert json.loads(about["ece"])["vector"] == fitted["test"]["ece"]


def test_what_differs_is_not_written(run, finished, tmp_path, capsys, monkeypatch):
    def change_predictions(by):
        with np.load(run / "predictions.npz") as arrays:
            changed = dict(arrays)
        changed["best_test_logits"] = changed["best_test_logits"] + np.float32([by, 0, 0, 0])
        np.savez(run / "predictions.npz", **changed)

    flags = [str(run), "--format", "safetensors", "--out", str(tmp_path / "file")]
    change_predictions(0.01)
    assert "from the run's stored predictions" in fails(capsys, tmp_path, export.main, flags)
    result = json.loads((run / "result.json").read_text())
    result["settings"]["mixed_precision"] = "bf16"  # whose logits are as coarse as that
    (run / "result.json").write_text(json.dumps(result))
    export.main(flags)
    said = r"differ by up to \S+e-0[78] .* and [1-9]\.\de-0[34] "
    printed = capsys.readouterr().out
    assert re.search(said, printed)
    # Its figures are those of the file, and not of predictions that are a little off.
    assert "in float32, as the file computes: top-1" in printed
    about = files.safetensors_metadata((tmp_path / "file").read_bytes())
    temperature = json.loads((finished / "result.json").read_text())["best"]["temperature"]
    assert json.loads(about["temperature"]) == pytest.approx(temperature, rel=1e-4)
    (tmp_path / "file").unlink()
    change_predictions(9)
    assert "0.2 is allowed" in fails(capsys, tmp_path, export.main, flags)
    wrong = lambda content: lambda images: torch.full((len(images), 4), 0.25)  # noqa: E731
    monkeypatch.setitem(FORMATS, "safetensors", (FORMATS["safetensors"][0], wrong))
    assert "from the net in float32" in fails(capsys, tmp_path, export.main, flags)


def test_rounding_of_logits_counts_for_more_at_a_small_temperature(run, tmp_path, capsys):
    """What is 1e-5 at T = 1 is 2e-4 at T = 0.05; the logits of another net stay refused."""
    result = json.loads((run / "result.json").read_text())
    result["best"]["temperature"] = 0.05
    (run / "result.json").write_text(json.dumps(result))
    with np.load(run / "predictions.npz") as arrays:
        exact = dict(arrays)
    logits = exact["best_test_logits"].astype(float)
    flags = [str(run), "--format", "safetensors", "--out", str(tmp_path / "file")]

    def shift(by):
        logits_shifted = (logits + [by, 0, 0, 0]).astype(np.float32)
        np.savez(run / "predictions.npz", **exact | {"best_test_logits": logits_shifted})
        there = softmax(logits_shifted.astype(float) / 0.05, axis=1)
        return np.abs(there - softmax(logits / 0.05, axis=1)).max()

    steepest = shift(1e-6) / 1e-6  # of a probability by the first logit
    assert 4e-5 < shift(1e-4 / steepest) < 2e-4
    export.main(flags)
    (tmp_path / "file").unlink()
    shift(1e-3 / steepest)
    assert "0.0002 is allowed" in fails(capsys, tmp_path, export.main, flags)


@pytest.mark.parametrize("form", ["onnx", "torchscript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_one_image_makes_a_file_for_any_number(form, images):
    """Where a split has but one, as that which sets the ranges of int8."""
    if form == "onnx" and torch.__version__ < ONNX_TORCH:
        pytest.skip("this torch is too old for ONNX")
    net = build_model("resnet8", 4)
    calibrated = CalibratedNet(net, [0.5] * 3, [0.25] * 3, weight=[1.0] * 4, bias=[0.0] * 4)
    write, reopen = FORMATS[form]
    # In memory as a data set has it: channels last.
    first = images[:1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    probabilities = reopen(write(calibrated, first, {}))
    for n in (1, 3):
        assert (probabilities(images[:n]) - calibrated(images[:n])).abs().max() < 1e-5


def test_only_a_run_that_says_it_was_on_the_cpu_is_held_to_every_digit(run, tmp_path, capsys):
    """Its hardware's name may be any text; a run of an older version names no device."""
    with np.load(run / "predictions.npz") as arrays:
        changed = dict(arrays)
    changed["best_test_logits"] = changed["best_test_logits"] + np.float32([0.01, 0, 0, 0])
    np.savez(run / "predictions.npz", **changed)
    flags = [str(run), "--format", "safetensors", "--out", str(tmp_path / "file")]
    config = json.loads((run / "config.json").read_text())
    assert config["device"] == "cpu"
    (run / "config.json").write_text(json.dumps(config | {"hardware": "a GPU"}))
    assert "1e-05 is allowed" in fails(capsys, tmp_path, export.main, flags)
    del config["device"]
    for content in (config, config | {"device": "cuda", "hardware": "8 cores, NVIDIA"}):
        (run / "config.json").write_text(json.dumps(content))
        export.main(flags)
        (tmp_path / "file").unlink()


BAD = """
run | required: --out
run --out nowhere/f | --out nowhere/f: its folder is not there
run --out run | --out run.*give a file
run --out f --format pickle | --format.*'pickle'.*onnx
run --out f --dataset other.npz | trained on other data.*other.npz
unfinished --out f | unfinished.*no finished run.*train it first
. --out f | 2 finished runs lie there; name one
run --out f --int8 --format torchscript | --int8: --format onnx alone has it, and not torchscript
run --out f --with-sets --format safetensors | --with-sets: --format onnx alone has it
run --out f --half | --half: --format safetensors alone has it, and not onnx
run --out f --format safetensors --half --calibration vector | --half fits a temperature of its own
run --out f --card run | --card run: give a file
run --out f --card f | --card f: that is --out
run --out f --card ./run/../f | --card run/../f: that is --out
run --out run/predictions.npz | --out run/predictions.npz: would write over what is read
run --out link/config.json | --out link/config.json: would write over what is read
run --out f --card run/model_best.pth | --card run/model_best.pth: would write over what is read
run --out other.npz --dataset other.npz | --out other.npz: would write over what is read
run --out f --int8 --calibration vector | --calibration vector: --int8 fits a temperature
packed --out f --with-sets | --with-sets: packed/predictions.npz has no validation logits, or too
"""


def test_mistakes(run, tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "ONNX_TORCH", (0,))  # here any torch will do
    monkeypatch.chdir(tmp_path)
    with np.load(tiny_npz) as arrays:
        np.savez("other.npz", **dict(arrays) | {"x_test": 255 - arrays["x_test"]})
    Path("link").symlink_to("run")
    for copy in ("unfinished", "packed"):
        shutil.copytree(run, copy)
    Path("unfinished/result.json").unlink()
    with np.load("packed/predictions.npz") as arrays:
        kept = {name: arrays[name] for name in arrays if "val" not in name}
    np.savez("packed/predictions.npz", **kept)
    for line in BAD.strip().splitlines():
        words, said = line.split(" | ")
        assert re.search(said, fails(capsys, tmp_path, export.main, words.split())), line
    monkeypatch.setattr(export, "find_spec", lambda name: name in ONNX_PACKAGES or None)
    error = fails(capsys, tmp_path, export.main, ["run", "--out", "file", "--int8"])
    assert "--int8: this onnxruntime has no onnxruntime.quantization; first run pip" in error
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    error = fails(capsys, tmp_path, export.main, ["run", "--out", "file"])
    assert "pip install onnx onnxscript onnxruntime" in error


def test_what_is_read_is_not_written_over(tmp_path):
    """A folder stands for all that lies below it, by whichever way; a new file may lie there."""
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "a").write_text("a")
    (tmp_path / "way").symlink_to(folder / "below")
    (tmp_path / "b").write_text("b")
    (tmp_path / "hard").hardlink_to(tmp_path / "b")
    inputs = [folder, tmp_path / "b", tmp_path / "absent"]
    for name in ("folder/below/a", "folder/../folder/below/a", "way/a", "b", "hard"):
        with pytest.raises(UserError, match="--out .* would write over what is read"):
            check_not_input(tmp_path / name, "--out", inputs)
    (tmp_path / "folders").write_text("beside it")
    for name in ("folder/new", "way/new", "folders", "absent"):
        check_not_input(tmp_path / name, "--out", inputs)


def test_an_older_torch_exports_in_other_formats(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    line = [str(run), "--out", str(tmp_path / "net")]
    error = fails(capsys, tmp_path, export.main, line)
    assert "needs torch 2.11 or later, this is 2.6.0+cu124; give --format safetensors" in error
    export.main([*line, "--format", "safetensors"])


def test_the_example(finished, onnx_file, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "export.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^\S", example, re.MULTILINE)) <= 11
    shutil.copy(onnx_file, tmp_path)
    np.save("images.npy", images.numpy())
    capsys.readouterr()
    names = {}
    exec(example, names)
    temperature = json.loads((finished / "result.json").read_text())["best"]["temperature"]
    assert np.abs(names["probabilities"] - stored(finished, 1 / temperature)).max() < 1e-5
    assert re.fullmatch(r"tiny, ECE .*\n\d+% of .*\n", capsys.readouterr().out)


def test_half_precision(run, images, tmp_path, capsys):
    """The rounded net in float32, calibrated anew; what the card says is what the file says."""
    whole = export_to(tmp_path / "float.safetensors", run, "--format", "safetensors")
    file, card = tmp_path / "half.safetensors", tmp_path / "half.md"
    flags = ("--format", "safetensors", "--half", "--card", str(card))
    capsys.readouterr()
    export_to(file, run, *flags)
    said = capsys.readouterr().out
    assert "float32: top-1" in said and "half:    top-1" in said
    weights, halves = load_file(whole), load_file(file)
    assert list(weights) == list(halves)
    for name, tensor in weights.items():
        kept = torch.float16 if tensor.is_floating_point() else tensor.dtype
        assert halves[name].dtype == kept and halves[name].equal(tensor.to(kept))

    found, about = from_safetensors(file, images)
    assert about["precision"] == "half"
    with np.load(run / "predictions.npz") as arrays:
        labels = arrays["test_labels"]
    assert json.loads(about["top1"]) == (found.argmax(axis=1) == labels).mean()
    own = found[range(len(labels)), labels]
    threshold = json.loads(about["sets"])["0.9"]
    assert json.loads(about["coverage"])["0.9"] == (own >= threshold).mean()
    # Not the run's own temperature: that of the logits which the halves give.
    result = json.loads((run / "result.json").read_text())["best"]
    assert 0 < abs(json.loads(about["temperature"]) / result["temperature"] - 1) < 0.01

    text = card.read_text()
    assert text.startswith("# ") and len(text.splitlines()) == 12
    assert f"Top-1: {100 * json.loads(about['top1']):.2f} %" in text
    assert f"T = {json.loads(about['temperature']):.3f}" in text
    assert f"`--teacher_path {file}`" in text and about["command"] in text


def test_a_temperature_at_the_bound_of_its_range_is_said(run, tmp_path, capsys):
    note = "T lies at the bound of its range: do not trust confidences that it scales"
    path = run / "result.json"
    result = json.loads(path.read_text())
    best = result["best"]
    card = tmp_path / "card.md"
    flags = ("--format", "safetensors", "--card", str(card))
    for at_bound in (False, True):
        path.write_text(json.dumps(result | {"best": best | {"temperature_at_bound": at_bound}}))
        capsys.readouterr()
        file = export_to(tmp_path / "file", run, *flags)
        assert (note in capsys.readouterr().out) == at_bound
        with safe_open(file, "pt") as content:
            assert json.loads(content.metadata()["temperature_at_bound"]) == at_bound
        assert (f"- {note}.\n" in card.read_text()) == at_bound
        assert ("which suits validation" in card.read_text()) != at_bound
        np.save(tmp_path / "images.npy", np.zeros((1, 8, 8, 3), np.uint8))
        predict.main([str(file), str(tmp_path / "images.npy")])
        assert (note in capsys.readouterr().out) == at_bound


def test_weights_too_large_for_half():
    net = build_model("resnet8", 4)
    net.layer1[0].bn1.running_var[0] = 1e6
    with pytest.raises(UserError, match="--half: layer1.0.bn1.running_var has values beyond"):
        round_to_half(net)


def test_safetensors_teach(finished, tiny_npz, tmp_path, capsys):
    """Through the same strict door as the run, and with the same student."""
    file = export_to(tmp_path / "net.safetensors", finished, "--format", "safetensors")
    results = []
    for place, teacher in (("run", finished), ("file", file)):
        root = tmp_path / place
        flags = command(tiny_npz, root, "--epochs", "1", "--teacher_path", str(teacher))
        train_student.main(flags)
        results.append(json.loads(next(root.rglob("result.json")).read_text()))
    assert results[0]["best"]["test"] == results[1]["best"]["test"]
    assert results[0]["label"] == results[1]["label"]
    error = fails(capsys, tmp_path, train_student.main, [*flags, "--split-seed", "1"])
    assert "trained with --split-seed 0" in error
