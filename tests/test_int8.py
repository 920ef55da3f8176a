"""A net in 8-bit integers: what it computes, and that its file says what it is worth."""

import csv
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import command, write_npz
from onnx import numpy_helper
from onnxruntime import InferenceSession
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

import train_teacher
from scripts import export, predict
from scripts.deployment.exported_net import ONNX_TORCH
from utils.calibration.bootstrap import bins_of, error_interval, gaps
from utils.data import load_dataset

LEVELS = ("0.8", "0.9", "0.95")  # 60 validation images are too few for 0.99


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Of which every fifth label is wrong: a temperature other than its bound suits its nets."""
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_npz(file, classes=4, train=600, test=200)
    with np.load(file) as arrays:
        changed = dict(arrays)
    for part in ("y_train", "y_test"):
        changed[part][::5] = (changed[part][::5] + 1) % 4
    np.savez(file, **changed)
    return file


@pytest.fixture(scope="module")
def run(npz, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    train_teacher.main(command(npz, root, "--epochs", "2"))
    return next(root.rglob("result.json")).parent


@pytest.fixture(scope="module")
def int8_file(run, tmp_path_factory):
    if torch.__version__ < ONNX_TORCH:
        pytest.skip("this torch is too old for ONNX")
    file = tmp_path_factory.mktemp("int8") / "net.onnx"
    export.main([str(run), "--out", str(file), "--int8", "--with-sets"])
    return file


@pytest.fixture(scope="module")
def about(int8_file):
    """Its metadata, decoded."""
    texts = ("dataset", "command", "calibration", "precision")
    metadata = InferenceSession(int8_file).get_modelmeta().custom_metadata_map
    return {key: text if key in texts else json.loads(text) for key, text in metadata.items()}


def outputs(file, split):
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    images = split.images.contiguous().numpy()
    return session.run(["probabilities", "set_at_0.9"], {"images": images})


def raw_logits(file, split, temperature):
    """Up to a number for each image."""
    probabilities, _ = outputs(file, split)
    return np.log(probabilities.astype(float)) * temperature


def test_its_weights_are_integers_of_7_bits_with_a_scale_for_each_channel(run, int8_file):
    """Nothing but normalisation and softmax is computed in float32."""
    graph = onnx.load(int8_file).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    weighted = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(weighted) == 10  # 7 in the blocks and their stem, 2 shortcuts, the classifier
    weights = torch.load(run / "model_best.pth", weights_only=True)["state_dict"]
    for node in weighted:
        integers, scales, _ = (arrays[name] for name in made_by[node.input[1]].input)
        assert integers.dtype == np.int8 and np.abs(integers).max() == 64
        assert made_by[node.input[0]].op_type == "DequantizeLinear"
        assert len(scales) == len(integers)
    classifier = integers * scales[:, None]
    assert np.abs(classifier - weights["fc.weight"].numpy()).max() <= scales.max() / 2 + 1e-7
    assert made_by[made_by["weighted"].input[0]].op_type == "Gemm"  # logits are not rounded


def test_it_predicts_as_the_net_does(run, int8_file, npz):
    probabilities, _ = outputs(int8_file, load_dataset(str(npz), ".").test)
    with np.load(run / "predictions.npz") as arrays:
        logits = arrays["best_test_logits"].astype(float)
    temperature = json.loads((run / "result.json").read_text())["best"]["temperature"]
    difference = np.abs(probabilities - softmax(logits / temperature, axis=1))
    assert 1e-5 < difference.mean() < 0.02
    assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).mean() > 0.95


def test_its_temperature_is_fitted_on_its_own_logits(run, int8_file, about, npz):
    val = load_dataset(str(npz), ".").val
    logits = raw_logits(int8_file, val, about["temperature"])
    own = np.arange(len(logits)), val.labels.numpy()

    def nll(log_temperature):
        return -log_softmax(logits / np.exp(log_temperature), axis=1)[own].mean()

    best = minimize_scalar(
        nll, bounds=np.log([0.05, 20]), method="bounded", options={"xatol": 1e-9}
    )
    assert about["temperature"] == pytest.approx(np.exp(best.x), rel=1e-4)
    float32 = json.loads((run / "result.json").read_text())["best"]["temperature"]
    assert about["temperature"] != pytest.approx(float32, rel=1e-4)


def test_its_sets_are_fitted_on_its_own_probabilities(int8_file, about, npz):
    data = load_dataset(str(npz), ".")
    of_label = {}
    for name, split in (("val", data.val), ("test", data.test)):
        probabilities, members = outputs(int8_file, split)
        of_label[name] = probabilities[np.arange(len(probabilities)), split.labels.numpy()]
    assert tuple(about["sets"]) == tuple(about["coverage"]) == LEVELS
    for level in LEVELS:
        rank = int(np.ceil(round(61 * float(level), 9)))
        threshold = np.sort(of_label["val"])[::-1][rank - 1]
        assert about["sets"][level] == pytest.approx(threshold, abs=1e-6)
        covered = (of_label["test"] >= threshold - 1e-6).mean()
        assert about["coverage"][level] == pytest.approx(covered, abs=1e-9)
    assert (members == (probabilities >= np.float32(about["sets"]["0.9"]))).all()
    assert 0 < members.mean() < 1


def test_what_it_is_worth_on_test(int8_file, about, npz):
    test = load_dataset(str(npz), ".").test
    probabilities, _ = outputs(int8_file, test)
    labels = test.labels.numpy()
    assert about["precision"] == "int8" and about["classes"] == 4
    assert about["top1"] == (probabilities.argmax(axis=1) == labels).mean()
    logits = raw_logits(int8_file, test, about["temperature"])
    for name, temperature in (("raw", 1.0), ("scaled", about["temperature"])):
        ece = ece_by_hand(softmax(logits / temperature, axis=1), labels)
        assert about["ece"][name] == pytest.approx(ece, abs=1e-5)
    scaled = torch.from_numpy(softmax(logits / about["temperature"], axis=1))
    _, upper = error_interval(bins_of([gaps(scaled, test.labels)]))
    assert about["ece_upper"] == pytest.approx(upper, abs=1e-4)
    assert about["checkpoint"]["softmax"]["weight"] == [1 / about["temperature"]] * 4


def ece_by_hand(probabilities, labels):
    error = 0.0
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        error += abs((right[inside] - confidence[inside]).sum()) / len(labels)
    return error


def test_scripts_predict_reads_it(int8_file, about, npz, tmp_path):
    test = load_dataset(str(npz), ".").test
    np.save(tmp_path / "images.npy", test.images.permute(0, 2, 3, 1).numpy())
    table = tmp_path / "rows.csv"
    predict.main([str(int8_file), str(tmp_path / "images.npy"), "--out", str(table)])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities, members = outputs(int8_file, test)
    raw = softmax(raw_logits(int8_file, test, about["temperature"]), axis=1).max(axis=1)
    assert len(rows) == len(test.labels)
    for row, of_classes, inside, confidence in zip(rows, probabilities, members, raw, strict=True):
        assert row["class"] == str(of_classes.argmax())
        assert float(row["confidence"]) == pytest.approx(of_classes.max(), abs=1e-5)
        assert float(row["raw_confidence"]) == pytest.approx(confidence, abs=1e-5)
        expected = set(np.flatnonzero(inside)) | {of_classes.argmax()}
        assert {int(label) for label in row["set_at_0.9"].split("|")} == expected
