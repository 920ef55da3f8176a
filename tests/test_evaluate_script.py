"""Shift, foreign data and label distributions: metrics, images, and the script on real runs."""

import colorsys
import io
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import fails, write_npz
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import entropy as scipy_entropy
from scipy.stats import mannwhitneyu, spearmanr
from torchmetrics.functional.classification import (
    binary_average_precision,
    binary_specificity_at_sensitivity,
)

import train_student
import train_teacher
from models import build_model
from scripts import evaluate as script
from utils.analysis.corruptions import OWN, PUBLISHED, own_corruptions, published_corruptions
from utils.analysis.shift import foreign_images, human_labels
from utils.calibration.distributions import (
    auroc,
    average_precision,
    entropy,
    fpr_at_tpr,
    label_distribution_metrics,
    ood_metrics,
    rank_correlation,
)
from utils.calibration.metrics import classification_metrics, posterior_metrics
from utils.data import load_dataset
from utils.data.views import normalise
from utils.program import UserError

# --- telling foreign data apart -------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_detection_metrics_are_torchmetrics_and_scipys(ties):
    rng = np.random.default_rng(0)
    positive = torch.from_numpy(rng.random(400) < 0.6)
    scores = torch.from_numpy(rng.normal(size=400)) + positive
    scores = (2 * scores).round() / 2 if ties else scores
    # Between 0 and 1, or torchmetrics takes a sigmoid, which rounds.
    preds, target = (scores - scores.min()) / (scores.max() - scores.min()), positive.int()
    expected = binary_average_precision(preds, target).item()
    assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-6)
    specificity, _ = binary_specificity_at_sensitivity(preds, target, min_sensitivity=0.95)
    assert fpr_at_tpr(scores, positive, 0.95) == pytest.approx(1 - specificity.item(), abs=1e-6)
    inside, outside = scores[positive].numpy(), scores[~positive].numpy()
    expected = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_ood_metrics_of_confidence_and_entropy():
    rng = np.random.default_rng(0)
    inside, outside = 3 * rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    found = ood_metrics(inside, outside, temperature=2.0)
    probs = (torch.from_numpy(np.concatenate([inside, outside])) / 2).softmax(1)
    positive = torch.arange(500) < 300
    for name, score in {"confidence": probs.amax(1), "entropy": -entropy(probs)}.items():
        assert found[f"{name}_auroc"] == pytest.approx(auroc(score, positive), abs=1e-12)
        assert found[f"{name}_fpr95"] == pytest.approx(fpr_at_tpr(score, positive, 0.95), abs=1e-12)
        aupr_out = average_precision(-score, ~positive)
        assert found[f"{name}_aupr_out"] == pytest.approx(aupr_out, abs=1e-12)
    assert found["confidence_auroc"] > 0.7


def test_confidences_that_round_to_one_are_still_ranked():
    inside = np.array([[60.0, 0, 0], [70, 0, 0]])
    found = ood_metrics(inside, np.array([[50.0, 0, 0], [45, 0, 0]]))
    assert found["confidence_auroc"] == 1.0
    for bad in (np.zeros((0, 3)), np.full((2, 3), np.nan)):
        with pytest.raises(ValueError):
            ood_metrics(bad, inside)


# --- against label distributions ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_distribution_metrics_are_scipys(temperature):
    rng = np.random.default_rng(0)
    distribution = rng.dirichlet(np.full(6, 0.3), size=300)
    distribution[:20] = np.eye(6)[rng.integers(6, size=20)]
    logits = np.log(distribution + 0.05) + 0.3 * rng.normal(size=(300, 6))
    found = label_distribution_metrics(logits, distribution, temperature)
    probs = torch.from_numpy(logits / temperature).softmax(1).numpy()
    assert found["kl"] == pytest.approx(scipy_entropy(distribution, probs, axis=1).mean())
    assert found["tv"] == pytest.approx(np.abs(distribution - probs).sum(1).mean() / 2)
    predicted = np.arange(len(probs)), probs.argmax(1)
    gap = np.abs(probs[predicted] - distribution[predicted]).mean()
    assert found["calibration_error"] == pytest.approx(gap)
    own, true = scipy_entropy(probs, axis=1), scipy_entropy(distribution, axis=1)
    assert found["entropy"] == pytest.approx(own.mean())
    assert found["entropy_gap"] == pytest.approx((own - true).mean())
    assert found["entropy_correlation"] == pytest.approx(spearmanr(own, true).statistic)
    assert found["expected_top1"] == pytest.approx(distribution[predicted].mean())


def test_soft_ece_of_certain_labels_is_the_ece():
    logits, labels = np.random.default_rng(1).normal(size=(300, 6)), np.arange(300) % 6
    found = label_distribution_metrics(logits, np.eye(6)[labels])
    expected = classification_metrics(logits, labels)
    assert (found["soft_ece"], found["kl"]) == pytest.approx((expected["ece"], expected["nll"]))


def test_rank_correlation_with_ties():
    first = np.random.default_rng(1).integers(5, size=200).astype(float)
    second = first + np.arange(200) % 4
    ours = rank_correlation(torch.from_numpy(first), torch.from_numpy(second))
    assert ours == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert rank_correlation(torch.zeros(5), torch.arange(5.0)) == 0.0


# --- corrupted images -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos():
    """Smooth random images, uint8 (6, 3, 32, 32); the first is black, the second white."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (6, 3, 5, 5)))
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    images = images.clamp(0, 255).round().to(torch.uint8)
    images[0], images[1] = 0, 255
    return images


def severities(name, images, seed=0, among=()):
    """Severity 1 to 5 of one corruption, of several that are asked for."""
    made = own_corruptions(images, [*among, name], seed)
    return [corrupted for found, _, corrupted in made if found == name]


def strengths(name, images):
    return zip(OWN[name][1], severities(name, images), strict=True)


@pytest.mark.parametrize("name", OWN)
def test_severities_rise(photos, name):
    before = photos.clone()
    made = severities(name, photos)
    assert len(made) == 5 and torch.equal(photos, before)
    assert all(one.dtype == torch.uint8 and one.shape == photos.shape for one in made)
    change = [(one[2:].double() - photos[2:].double()).abs().mean().item() for one in made]
    assert change[0] > 0 and change[4] > change[0]
    if name != "pixelate":  # a grid that happens to fit is kinder than a finer one
        assert change == sorted(change)


def test_the_seed_decides_the_noise_alone(photos):
    once = severities("gaussian_noise", photos, 3)
    for among in (("contrast", "pixelate"), tuple(reversed(OWN))[:-1]):
        assert all(map(torch.equal, once, severities("gaussian_noise", photos, 3, among)))
    assert not torch.equal(once[0], severities("gaussian_noise", photos, 4)[0])
    assert not torch.equal(once[3] - photos, once[4] - photos)


def test_noise_has_its_strength():
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    for sigma, images in strengths("gaussian_noise", grey):
        noise = (images.double() - 128) / 255
        assert noise.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(noise.mean().item()) < 0.001


def test_blur_is_scipys(photos):
    for sigma, images in strengths("gaussian_blur", photos):
        sigmas = (0, 0, sigma, sigma)
        expected = gaussian_filter(photos.numpy().astype(float), sigmas, mode="mirror", truncate=4)
        assert np.abs(images.numpy() - expected).max() <= 0.51


def test_contrast_keeps_the_mean_colour(photos):
    for share, images in strengths("contrast", photos):
        spread, mean = (images.double().std((2, 3)), images.double().mean((2, 3)))
        assert torch.allclose(mean, photos.double().mean((2, 3)), atol=0.3)
        assert torch.allclose(spread, share * photos.double().std((2, 3)), atol=0.3)


def test_brightness_raises_v_alone(photos):
    for shift, images in strengths("brightness", photos):
        pixels, brighter = (x[:, :, ::9, ::9].permute(0, 2, 3, 1) for x in (photos, images))
        for pixel, found in zip(pixels.reshape(-1, 3), brighter.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
            wanted = colorsys.hsv_to_rgb(h, s, min(1, v + shift))
            assert np.allclose(255 * np.array(wanted), found.numpy(), atol=0.51)


def test_jpeg_and_pixels_are_pillows(photos):
    image = Image.fromarray(photos[4].permute(1, 2, 0).numpy())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    worst = severities("jpeg_compression", photos)[4][4]
    assert np.array_equal(worst.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    small = image.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    pixels = severities("pixelate", photos)[4][4]
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(small))


def write_published(folder: Path, labels: np.ndarray, names=PUBLISHED, size=8) -> Path:
    """Files like the published ones: grey images of level 10 x severity + place in `names`."""
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    for place, name in enumerate(names):
        levels = 10 * np.repeat(np.arange(1, 6), len(labels)) + place
        images = np.broadcast_to(levels[:, None, None, None], (5 * len(labels), size, size, 3))
        np.save(folder / f"{name}.npy", images.astype(np.uint8))
    return folder


def test_published_files(tmp_path):
    labels = torch.tensor([3, 1, 4])
    folder = write_published(tmp_path / "CIFAR-10-C", labels.numpy(), ("fog", "snow"))
    found = list(published_corruptions("cifar10c", tmp_path, labels, ["snow", "fog"]))
    assert [one[:2] for one in found[:2]] == [("snow", 1), ("snow", 2)]
    levels = [images.unique().tolist() for _, _, images in found]
    assert levels == [[level] for level in (11, 21, 31, 41, 51, 10, 20, 30, 40, 50)]
    assert found[0][2].shape == (3, 3, 8, 8) and found[0][2].dtype == torch.uint8

    def refused(said, *names, labels=labels):
        with pytest.raises(UserError, match=said):
            published_corruptions("cifar10c", tmp_path, labels, names)

    refused("CIFAR-10-C/frost.npy.*zenodo.*--corruptions", "fog", "frost")
    refused("labels.npy is not the labels", "fog", labels=torch.tensor([3, 1, 5]))
    refused("labels.npy is not the labels", "fog", labels=torch.tensor([3, 1]))
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:-9])
    refused("fog.npy cannot be read", "fog")


# --- foreign images and human labels --------------------------------------------------------------


def test_foreign_images(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    file = tmp_path / "other.npz"
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    for arrays in ({"x_test": images, "y_test": np.zeros(5)}, {"pictures": images}):
        np.savez_compressed(file, **arrays)
        assert torch.equal(foreign_images(str(file), tmp_path), expected)
    np.savez(file, x_test=images[..., 0])
    assert foreign_images(str(file), tmp_path).shape == (5, 3, 8, 8)
    for arrays in ({"a": images, "b": images}, {"x_test": images / 255}, {"x_test": images[:, 1:]}):
        np.savez(file, **arrays)
        with pytest.raises(UserError, match=r"other\.npz"):
            foreign_images(str(file), tmp_path)
    download = Mock(side_effect=OSError("network unreachable"))
    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", download)
    with pytest.raises(UserError, match=r"svhn\.npz.*network unreachable.*test_32x32\.mat"):
        foreign_images("svhn", tmp_path)
    np.savez(tmp_path / "svhn.npz", x_test=images)
    assert torch.equal(foreign_images("svhn", tmp_path), expected)


def test_human_labels_from_counts_or_shares(tmp_path):
    votes = np.array([[48, 2, 0], [10, 30, 10], [0, 0, 51]])
    labels = torch.tensor([0, 1, 2])
    np.save(tmp_path / "cifar10h-probs.npy", votes / votes.sum(1, keepdims=True))
    from_shares = human_labels(tmp_path, labels)
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / "cifar10h" / "cifar10h-counts.npy", votes)
    from_counts = human_labels(tmp_path, labels)
    assert from_counts.dtype == torch.float64 and torch.allclose(from_counts, from_shares)
    assert from_counts[1].tolist() == [0.2, 0.6, 0.2]
    for other in ([0, 2, 1], [0, 1]):
        with pytest.raises(UserError, match="not these in their order; evaluate a run on CIFAR-10"):
            human_labels(tmp_path, torch.tensor(other))


@pytest.mark.skipif("KD_CIFAR10H" not in os.environ, reason="KD_CIFAR10H names no folder")
@pytest.mark.skipif("KD_DATA" not in os.environ, reason="KD_DATA names no folder with cifar10.npz")
def test_the_published_human_labels():
    with np.load(Path(os.environ["KD_DATA"], "cifar10.npz")) as arrays:
        labels = torch.from_numpy(arrays["y_test"])
    votes = human_labels(Path(os.environ["KD_CIFAR10H"]), labels)
    # Peterson et al. 2019: a person agrees with the label on 95 % of the images.
    assert votes[torch.arange(10_000), labels].mean().item() == pytest.approx(0.95, abs=0.01)
    agreeing = (votes.argmax(1) == labels).double().mean().item()
    assert agreeing == pytest.approx(0.992, abs=0.002)


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_npz):
    """A finished teacher and its student, on tiny.npz."""
    root = tmp_path_factory.mktemp("runs")
    common = f"--dataset {tiny_npz} --model resnet8 --epochs 1 --train-batch-size 32".split()
    train_teacher.main([*common, "--checkpoint", str(root / "teachers")])
    teacher = next(root.rglob("result.json")).parent
    train_student.main(
        [*common, "--checkpoint", str(root / "students"), "--teacher_path", str(teacher)]
    )
    return root


def run_of(runs, which) -> Path:
    return next((runs / which).rglob("result.json")).parent


@pytest.fixture
def copies(runs, tmp_path):
    """The same runs, which a test may change."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def test_labels(tiny_npz):
    with np.load(tiny_npz) as arrays:
        return arrays["y_test"]


def evaluate(*argv):
    script.main([str(word) for word in argv])


def refused(capsys, folder, *argv) -> str:
    capsys.readouterr()
    return fails(capsys, folder, lambda argv: evaluate(*argv), argv)


def read(run, what, owner="best"):
    return json.loads((run / f"evaluation_{what}.json").read_text())[owner]


def test_own_corruptions(copies, tmp_path, capsys):
    run = run_of(copies, "teachers")
    evaluate(run, "--on", "corruptions", "--write", "--out", tmp_path / "boxes.png")
    printed = capsys.readouterr().out
    assert "not CIFAR-10-C" in printed and printed.count("\n") > 2 * (6 * 6 + 7)
    found = read(run, "corruptions")
    test = json.loads((run / "result.json").read_text())["best"]["test"]
    for logits in ("raw", "scaled"):
        assert found["clean"]["0"][logits] == pytest.approx(test[logits])
        every = np.array([[found[name][s][logits]["ece"] for name in OWN] for s in "12345"])
        assert found["mean"]["mean"][logits]["ece"] == pytest.approx(every.mean())
        assert found["mean"]["3"][logits]["ece"] == pytest.approx(every[2].mean())
        assert found["pixelate"]["mean"][logits]["ece"] == pytest.approx(every[:, -1].mean())
    with Image.open(tmp_path / "boxes.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_images_are_run_in_the_precision_of_the_run(copies, tiny_npz, tmp_path, precision):
    """Clean, corrupted and foreign ones, worked out by hand from the weights."""
    run = run_of(copies, "teachers")
    result = json.loads((run / "result.json").read_text())
    result["settings"]["mixed_precision"] = precision
    (run / "result.json").write_text(json.dumps(result))
    saved = torch.load(run / "model_best.pth", weights_only=True)
    net = build_model("resnet8", 4).eval()
    net.load_state_dict(saved["state_dict"])
    test = load_dataset(str(tiny_npz), ".").test
    *_, (_, _, corrupted) = own_corruptions(test.images, ["contrast"])

    def logits(images):
        with torch.no_grad(), torch.autocast("cpu", enabled=precision == "bf16"):
            return net(normalise(images, saved["mean"], saved["std"])).float()

    clean = classification_metrics(logits(test.images), test.labels)
    float32 = result["best"]["test"]["raw"]["nll"]
    assert (abs(clean["nll"] - float32) > 1e-5) == (precision == "bf16")  # or nothing is tested
    evaluate(run, "--on", "corruptions", "--corruptions", "contrast", "--write")
    found = read(run, "corruptions")
    assert found["clean"]["0"]["raw"] == pytest.approx(clean, abs=1e-5)
    expected = classification_metrics(logits(corrupted), test.labels)
    assert found["contrast"]["5"]["raw"] == pytest.approx(expected, abs=1e-5)
    np.savez(tmp_path / "foreign.npz", x_test=corrupted.permute(0, 2, 3, 1))
    evaluate(run, "--on", tmp_path / "foreign.npz", "--write")
    expected = ood_metrics(logits(test.images), logits(corrupted))
    assert read(run, "foreign")["raw"] == pytest.approx(expected, abs=1e-5)


def test_several_runs_and_teachers_in_one_table(copies, capsys):
    student, teacher = (run_of(copies, which) for which in ("students", "teachers"))
    config = json.loads((student / "config.json").read_text())
    config["arguments"]["teacher_path"] = [str(teacher)]
    (student / "config.json").write_text(json.dumps(config))
    command = ("--on", "corruptions", "--corruptions", "pixelate", "--with-teacher")
    evaluate(copies, *command, "--write")
    _, means = capsys.readouterr().out.split("means over corruptions")
    assert means.count("clean") == 2 * 3  # student, its teacher, the teacher's own run
    own, beside = read(teacher, "corruptions"), read(student, "corruptions", "teacher")
    assert beside["mean"]["mean"]["raw"] == pytest.approx(own["mean"]["mean"]["raw"])
    assert beside["temperature"] == pytest.approx(own["temperature"])
    assert read(student, "corruptions") != own
    saved = torch.load(teacher / "model_best.pth", weights_only=True)
    torch.save(saved | {"epoch": 9}, teacher / "model_best.pth")
    assert "no longer what it learned from" in refused(capsys, copies, student, *command)
    shutil.rmtree(teacher)
    assert "leave out --with-teacher" in refused(capsys, copies, student, *command)


def test_several_teachers_are_run_as_one(runs, tiny_npz, tmp_path):
    flags = f"--dataset {tiny_npz} --model resnet8 --epochs 1 --train-batch-size 32 --checkpoint"
    train_teacher.main([*flags.split(), str(tmp_path / "second"), "--seed", "2"])
    teachers = [str(run_of(runs, "teachers")), str(run_of(tmp_path, "second"))]
    train_student.main([*flags.split(), str(tmp_path / "students"), "--teacher_path", *teachers])
    run = run_of(tmp_path, "students")
    evaluate(run, "--on", "corruptions", "--corruptions", "pixelate", "--with-teacher", "--write")
    stored = json.loads((run / "result.json").read_text())["teacher"]["test"]
    assert read(run, "corruptions", "teacher")["clean"]["0"]["raw"] == pytest.approx(stored["raw"])


def test_published_corruptions(copies, test_labels, tmp_path, capsys):
    write_published(tmp_path / "CIFAR-10-C", test_labels)
    run = run_of(copies, "students")
    evaluate(run, "--on", "cifar10c", "--data_dir", tmp_path, "--write")
    assert "CIFAR-10-C: 19 corruptions x 5 severities" in capsys.readouterr().out
    found = read(run, "cifar10c")
    assert found.keys() - set(PUBLISHED) == {"temperature", "clean", "mean"}
    # All images of one severity are alike here, so one class is predicted for all of them.
    shares = np.bincount(test_labels) / len(test_labels)
    assert np.isclose(shares, found["fog"]["3"]["raw"]["top1"]).any()
    error = refused(capsys, copies, run, "--on", "cifar100c", "--data_dir", tmp_path)
    assert "CIFAR-100-C/labels.npy" in error
    evaluate(run, "--on", "cifar10c", "--data_dir", tmp_path, "--corruptions", "fog", "snow")
    assert "2 corruptions x 5" in capsys.readouterr().out


def test_foreign_data(copies, tmp_path, capsys, tiny_npz):
    foreign = write_npz(tmp_path / "foreign.npz", 4, 20, 30, seed=9)
    evaluate(copies, "--on", foreign, "--write")
    printed = capsys.readouterr().out
    assert "its 30 images" in printed and "40 of the test split" in printed
    assert printed.count(" raw ") == 2 and printed.count(" scaled ") == 2
    np.savez(tmp_path / "svhn.npz", x_test=np.zeros((5, 8, 8, 3), np.uint8))
    evaluate(copies / "students", "--on", "svhn", "--data_dir", tmp_path, "--with-teacher")
    printed = capsys.readouterr().out
    assert "its 5 images" in printed and "teacher resnet8 NLL" in printed
    # Its own test images again: nothing tells them apart.
    evaluate(copies, "--on", tiny_npz, "--write")
    found = read(run_of(copies, "teachers"), "tiny")["raw"]
    assert found["confidence_auroc"] == found["entropy_auroc"] == pytest.approx(0.5, abs=1e-9)


def test_human_labels(copies, test_labels, tmp_path, capsys):
    rng = np.random.default_rng(0)
    votes = 40 * np.eye(4, dtype=int)[test_labels] + rng.integers(0, 10, (len(test_labels), 4))
    np.save(tmp_path / "cifar10h-counts.npy", votes)
    evaluate(copies, "--on", "cifar10h", "--data_dir", tmp_path, "--write")
    printed = capsys.readouterr().out
    assert "teacher resnet8 NLL" in printed and "... with teacher's" in printed
    run = run_of(copies, "students")
    found = read(run, "cifar10h")
    with np.load(run / "predictions.npz") as stored:
        logits, teachers = stored["best_test_logits"], stored["teacher_test_logits"]
    shares = votes / votes.sum(1, keepdims=True)
    expected = label_distribution_metrics(logits, shares, found["temperature"])
    assert expected.items() <= found["scaled"].items()
    probs = (torch.tensor(z).double().softmax(1) for z in (logits, teachers))
    own, other = (scipy_entropy(p, axis=1) for p in probs)
    correlation = spearmanr(own, other).statistic
    assert found["raw"]["teacher_entropy_correlation"] == pytest.approx(correlation)
    assert "teacher_entropy_correlation" not in read(run, "cifar10h", "teacher")["raw"]


def test_the_known_posterior(copies, tmp_path, capsys):
    """A run on synthetic data, its logits replaced by its posterior's."""
    data = load_dataset("synthetic", tmp_path)
    run = run_of(copies, "teachers")
    assert "is not known" in refused(capsys, copies, run, "--on", "synthetic")
    result = json.loads((run / "result.json").read_text())
    result |= {"dataset": "synthetic", "fingerprint": data.fingerprint, "num_classes": 10}
    (run / "result.json").write_text(json.dumps(result))
    logits = (data.test.posterior + 1e-6).log().float().numpy()
    np.savez(run / "predictions.npz", best_test_logits=logits, test_labels=data.test.labels.numpy())
    evaluate(run, "--on", "synthetic", "--write")
    found = read(run, "synthetic")["raw"]
    assert (found["kl"], found["tv"]) == pytest.approx((0, 0), abs=1e-4)
    known = posterior_metrics(logits, data.test.posterior)
    assert found["calibration_error"] == known["true_calibration_error"]


def test_last_epochs_and_bounds(copies, capsys, tiny_npz):
    run = run_of(copies, "teachers")
    path = run / "result.json"
    result = json.loads(path.read_text())
    result["last"]["temperature_at_bound"] = True
    path.write_text(json.dumps(result))
    evaluate(run, "--on", tiny_npz, "--epoch", "last", "--write")
    assert "do not trust its scaled rows" in capsys.readouterr().out
    evaluate(run, "--on", tiny_npz, "--write")
    assert "do not trust" not in capsys.readouterr().out
    assert read(run, "tiny", "last") and read(run, "tiny", "best")


def test_flags_without_effect(runs, capsys, tmp_path):
    for flags in ("synthetic --corruptions contrast", "cifar10h --dataset x", "cifar10c --seed 1"):
        said = f"has no effect with --on {flags.split()[0]}"
        assert said in refused(capsys, tmp_path, runs, "--on", *flags.split())


def test_other_data_than_the_runs(copies, capsys, tmp_path, tiny_npz):
    other = write_npz(tmp_path / "other.npz", 4, 150, 40, seed=1)
    command = (copies, "--on", "corruptions", "--dataset")
    assert "was trained on other data" in refused(capsys, tmp_path, *command, other)
    evaluate(*command, shutil.copy(tiny_npz, tmp_path / "moved.npz"), "--corruptions", "contrast")
