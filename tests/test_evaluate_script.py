"""Shift, foreign data and label distributions: metrics, images, and the script on real runs."""

import colorsys
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script, write_npz
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import entropy as scipy_entropy
from scipy.stats import mannwhitneyu, spearmanr
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_specificity_at_sensitivity,
)

import train_student
import train_teacher
from scripts import evaluate as script
from utils.analysis.corruptions import OWN, PUBLISHED, own_corruptions, published_corruptions
from utils.analysis.figures import Series, draw_boxes, severity_boxes
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
from utils.program import UserError, one_line_errors
from utils.tables import COLUMNS

# --- telling foreign data apart -------------------------------------------------------------------


def scores_and_labels(seed, ties):
    rng = np.random.default_rng(seed)
    positive = rng.random(400) < 0.6
    scores = rng.normal(size=400) + positive
    scores = np.round(scores * 2) / 2 if ties else scores
    return torch.from_numpy(scores), torch.from_numpy(positive)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_detection_metrics_are_torchmetrics(seed, ties):
    scores, positive = scores_and_labels(seed, ties)
    # Between 0 and 1, or torchmetrics takes a sigmoid, which rounds.
    preds, target = (scores - scores.min()) / (scores.max() - scores.min()), positive.int()
    assert auroc(scores, positive) == pytest.approx(binary_auroc(preds, target).item(), abs=1e-6)
    expected = binary_average_precision(preds, target).item()
    assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-6)
    specificity, _ = binary_specificity_at_sensitivity(preds, target, min_sensitivity=0.95)
    assert fpr_at_tpr(scores, positive, 0.95) == pytest.approx(1 - specificity.item(), abs=1e-6)


def test_auroc_is_the_rank_statistic():
    scores, positive = scores_and_labels(7, ties=True)
    inside, outside = scores[positive].numpy(), scores[~positive].numpy()
    expected = mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside))
    assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_detection_by_hand():
    scores, positive = torch.tensor([4.0, 3, 2, 1]), torch.tensor([True, False, True, False])
    assert auroc(scores, positive) == 0.75
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert fpr_at_tpr(scores, positive, 0.95) == 0.5
    perfect = torch.tensor([True, True, False, False])
    assert (auroc(scores, perfect), fpr_at_tpr(scores, perfect, 0.95)) == (1.0, 0.0)
    same = torch.zeros(4)
    assert (auroc(same, positive), average_precision(same, positive)) == (0.5, 0.5)


def test_ood_metrics_of_confidence_and_entropy():
    rng = np.random.default_rng(0)
    inside, outside = 3 * rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    found = ood_metrics(inside, outside, temperature=2.0)
    probs = (torch.from_numpy(np.concatenate([inside, outside])) / 2).softmax(1)
    positive = torch.arange(500) < 300
    scores = {"confidence": probs.amax(1), "entropy": -entropy(probs)}
    for name, score in scores.items():
        assert found[f"{name}_auroc"] == pytest.approx(auroc(score, positive), abs=1e-12)
        assert found[f"{name}_fpr95"] == pytest.approx(fpr_at_tpr(score, positive, 0.95), abs=1e-12)
        aupr_out = average_precision(-score, ~positive)
        assert found[f"{name}_aupr_out"] == pytest.approx(aupr_out, abs=1e-12)
    assert found["confidence_auroc"] > 0.7
    assert (
        ood_metrics(torch.from_numpy(inside).float(), outside.astype(np.float32)).keys()
        == found.keys()
    )


def test_confidences_that_round_to_one_are_still_ranked():
    inside = np.array([[60.0, 0, 0], [70, 0, 0]])
    found = ood_metrics(inside, np.array([[50.0, 0, 0], [45, 0, 0]]))
    assert found["confidence_auroc"] == 1.0


@pytest.mark.parametrize(
    "inside", [np.zeros((0, 3)), np.full((2, 3), np.nan), np.full((2, 3), np.inf)]
)
def test_bad_logits_are_refused(inside):
    with pytest.raises(ValueError):
        ood_metrics(inside, np.eye(3))


# --- against label distributions ------------------------------------------------------------------


def distribution_and_logits(n=300, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    distribution = rng.dirichlet(np.full(classes, 0.3), size=n)
    distribution[:20] = np.eye(classes)[rng.integers(classes, size=20)]
    return distribution, np.log(distribution + 0.05) + 0.3 * rng.normal(size=(n, classes))


def test_the_distribution_itself_has_no_error():
    distribution, _ = distribution_and_logits()
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(distribution), -700)
    found = label_distribution_metrics(logits, distribution)
    for key in ("kl", "tv", "calibration_error", "soft_ece", "entropy_gap"):
        assert found[key] == pytest.approx(0, abs=1e-9), key
    assert found["entropy_correlation"] == pytest.approx(1)
    assert found["expected_top1"] == pytest.approx(distribution.max(1).mean())


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_distribution_metrics_are_scipys(temperature):
    distribution, logits = distribution_and_logits()
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


def test_soft_ece_of_certain_labels_is_the_ece():
    _, logits = distribution_and_logits()
    labels = np.arange(len(logits)) % 6
    found = label_distribution_metrics(logits, np.eye(6)[labels])
    expected = classification_metrics(logits, labels)
    assert found["soft_ece"] == pytest.approx(expected["ece"], abs=1e-12)
    assert found["expected_top1"] == pytest.approx(expected["top1"])
    assert found["kl"] == pytest.approx(expected["nll"])


def test_rank_correlation_with_ties():
    rng = np.random.default_rng(1)
    first, second = (rng.integers(5, size=200).astype(float) for _ in range(2))
    second += first
    expected = spearmanr(first, second).statistic
    ours = rank_correlation(torch.from_numpy(first), torch.from_numpy(second))
    assert ours == pytest.approx(expected, abs=1e-12)
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


def test_every_corruption_and_severity_once(photos):
    before = photos.clone()
    made = list(own_corruptions(photos, list(OWN)))
    assert [(one.name, one.severity) for one in made] == [(n, s) for n in OWN for s in range(1, 6)]
    for one in made:
        assert one.images.dtype == torch.uint8 and one.images.shape == photos.shape
    assert torch.equal(photos, before)


def test_severities_rise(photos):
    change = {}
    for one in own_corruptions(photos[2:], list(OWN)):
        difference = (one.images.double() - photos[2:].double()).abs().mean().item()
        change.setdefault(one.name, []).append(difference)
    for name, differences in change.items():
        assert differences[0] > 0 and differences[4] > differences[0], name
        if name != "pixelate":  # a grid that happens to fit is kinder than a finer one
            assert differences == sorted(differences), name


def test_the_seed_decides_the_noise_alone(photos):
    def noise(seed, names=("gaussian_noise",)):
        return [one.images for one in own_corruptions(photos, list(names), seed)][-5:]

    once = noise(3)
    assert all(map(torch.equal, once, noise(3, ("contrast", "gaussian_noise"))))
    assert not torch.equal(once[0], noise(4)[0])
    assert not torch.equal(once[3] - photos, once[4] - photos)


def first_of(name, images):
    """Severity 1 to 5."""
    return [one.images for one in own_corruptions(images, [name])]


def test_noise_has_its_strength():
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    for sigma, images in zip(
        OWN["gaussian_noise"][1], first_of("gaussian_noise", grey), strict=True
    ):
        noise = (images.double() - 128) / 255
        assert noise.std().item() == pytest.approx(sigma, rel=0.02)
        assert abs(noise.mean().item()) < 0.001


def test_blur_is_scipys(photos):
    for sigma, images in zip(
        OWN["gaussian_blur"][1], first_of("gaussian_blur", photos), strict=True
    ):
        expected = gaussian_filter(
            photos.numpy().astype(float), (0, 0, sigma, sigma), mode="mirror", truncate=4
        )
        assert np.abs(images.numpy() - expected).max() <= 0.51


def test_contrast_keeps_the_mean_colour(photos):
    for share, images in zip(OWN["contrast"][1], first_of("contrast", photos), strict=True):
        spread, mean = (images.double().std((2, 3)), images.double().mean((2, 3)))
        assert torch.allclose(mean, photos.double().mean((2, 3)), atol=0.3)
        assert torch.allclose(spread, share * photos.double().std((2, 3)), atol=0.3)


def test_brightness_raises_v_alone(photos):
    for shift, images in zip(OWN["brightness"][1], first_of("brightness", photos), strict=True):
        pixels, brighter = (x[:, :, ::9, ::9].permute(0, 2, 3, 1) for x in (photos, images))
        for pixel, found in zip(pixels.reshape(-1, 3), brighter.reshape(-1, 3), strict=True):
            h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
            wanted = colorsys.hsv_to_rgb(h, s, min(1, v + shift))
            assert np.allclose(255 * np.array(wanted), found.numpy(), atol=0.51)


def test_jpeg_and_pixels_are_pillows(photos):
    image = Image.fromarray(photos[4].permute(1, 2, 0).numpy())
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    worst = first_of("jpeg_compression", photos)[4][4]
    assert np.array_equal(worst.permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    small = image.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    pixels = first_of("pixelate", photos)[4][4]
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


def test_published_files_are_cut_at_the_severities(tmp_path):
    labels = torch.tensor([3, 1, 4])
    write_published(tmp_path / "CIFAR-10-C", labels.numpy(), ("fog", "snow"))
    found = list(published_corruptions("cifar10c", tmp_path, labels, ["snow", "fog"]))
    assert [(one.name, one.severity) for one in found[:2]] == [("snow", 1), ("snow", 2)]
    assert [one.images.unique().tolist() for one in found[:5]] == [[11], [21], [31], [41], [51]]
    assert [one.images.unique().tolist() for one in found[5:]] == [[10], [20], [30], [40], [50]]
    assert found[0].images.shape == (3, 3, 8, 8) and found[0].images.dtype == torch.uint8


def test_published_files_that_are_not(tmp_path):
    labels = torch.tensor([3, 1, 4])
    folder = write_published(tmp_path / "CIFAR-100-C", labels.numpy(), ("fog", "snow"))

    def refused(*words, names=("fog",), labels=labels):
        with pytest.raises(UserError) as caught:
            published_corruptions("cifar100c", tmp_path, labels, names)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message

    refused("CIFAR-100-C", "frost.npy", "zenodo", names=("fog", "frost"))
    refused("labels.npy", labels=torch.tensor([3, 1, 5]))
    refused("labels.npy", labels=torch.tensor([3, 1]))
    np.save(folder / "fog.npy", np.zeros((14, 8, 8, 3), np.uint8))
    refused("fog.npy", "(14, 8, 8, 3)")
    np.save(folder / "fog.npy", np.zeros((15, 8, 8, 3)))
    refused("fog.npy", "float64")
    (folder / "fog.npy").write_bytes(b"no array")
    refused("fog.npy", "cannot be read")
    np.save(folder / "fog.npy", np.array([{"code": 1}]), allow_pickle=True)
    refused("fog.npy", "cannot be read")


# --- foreign images and human labels --------------------------------------------------------------


def test_foreign_images_of_any_npz(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    file = tmp_path / "other.npz"
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    for arrays in ({"x_test": images, "y_test": np.zeros(5)}, {"pictures": images}):
        np.savez_compressed(file, **arrays)
        assert torch.equal(foreign_images(str(file), tmp_path), expected)
    np.savez(file, x_test=images[..., 0])
    assert foreign_images(str(file), tmp_path).shape == (5, 3, 8, 8)
    np.savez(tmp_path / "svhn.npz", x_test=images)
    assert torch.equal(foreign_images("svhn", tmp_path), expected)


@pytest.mark.parametrize(
    "arrays",
    [
        {"a": np.zeros((2, 8, 8, 3), np.uint8), "b": np.zeros(2)},
        {"x_test": np.zeros((2, 8, 8, 3))},
        {"x_test": np.zeros((2, 8, 9, 3), np.uint8)},
        {"x_test": np.zeros((0, 8, 8, 3), np.uint8)},
        {"x_test": np.array([{"code": 1}])},
    ],
)
def test_npz_without_images(tmp_path, arrays):
    file = tmp_path / "bad.npz"
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=r"bad\.npz"):
        foreign_images(str(file), tmp_path)


def test_no_svhn_and_no_network(tmp_path, monkeypatch):
    import torchvision

    def no_network(*args, **options):
        raise OSError("network unreachable")

    monkeypatch.setattr(torchvision.datasets.svhn, "download_url", no_network)
    with pytest.raises(UserError, match=r"test_32x32\.mat.*svhn\.npz"):
        foreign_images("svhn", tmp_path)


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


def test_human_labels_of_something_else(tmp_path):
    def refused(*words, labels):
        with pytest.raises(UserError) as caught:
            human_labels(tmp_path, torch.tensor(labels))
        assert all(word in str(caught.value) for word in words), caught.value

    refused("cifar10h-counts.npy", "--data_dir", labels=[0])
    file = tmp_path / "cifar10h-counts.npy"
    np.save(file, np.eye(3, dtype=int))
    refused("CIFAR-10", labels=[0, 2, 1])
    refused("CIFAR-10", "2 images", labels=[0, 1])
    for votes in (np.zeros((3, 3)), np.full((3, 3), np.nan), -np.eye(3), np.ones(3)):
        np.save(file, votes)
        refused("votes", labels=[0, 1, 2])
    file.write_bytes(b"no array")
    refused("cannot be read", labels=[0, 1, 2])


@pytest.mark.skipif(
    "KD_CIFAR10H" not in os.environ, reason="KD_CIFAR10H names no folder of CIFAR-10H"
)
@pytest.mark.skipif("KD_DATA" not in os.environ, reason="KD_DATA names no folder with cifar10.npz")
def test_the_published_human_labels():
    file = Path(os.environ["KD_DATA"], "cifar10.npz")
    if not file.is_file():
        pytest.skip(f"no {file}")
    with np.load(file) as arrays:
        labels = torch.from_numpy(arrays["y_test"])
    votes = human_labels(Path(os.environ["KD_CIFAR10H"]), labels)
    assert votes.shape == (10_000, 10)
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


def read(run, what, owner="best"):
    return json.loads((run / f"evaluation_{what}.json").read_text())[owner]


def test_own_corruptions(copies, tiny_npz, tmp_path, capsys):
    run = run_of(copies, "teachers")
    evaluate(run, "--on", "corruptions", "--write", "--out", tmp_path / "boxes.png")
    printed = capsys.readouterr().out
    assert "not CIFAR-10-C" in printed
    found = read(run, "corruptions")
    result = json.loads((run / "result.json").read_text())["best"]
    assert found["clean"]["raw"] == pytest.approx(result["test"]["raw"])
    assert found["clean"]["scaled"] == pytest.approx(result["test"]["scaled"])
    assert found["corruptions"].keys() == OWN.keys()
    for way in ("raw", "scaled"):
        every = [one[s][way] for one in found["corruptions"].values() for s in "12345"]
        overall = found["means"]["mean"][way]
        third = [one["3"][way]["ece"] for one in found["corruptions"].values()]
        assert found["means"]["3"][way]["ece"] == pytest.approx(np.mean(third))
        for metric in overall:
            assert overall[metric] == pytest.approx(np.mean([one[metric] for one in every]))
    assert printed.count("\n") > 2 * (6 * 6 + 7)
    with Image.open(tmp_path / "boxes.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert not list(run.glob(".*.tmp"))


def test_a_corruption_is_what_the_net_says_of_its_images(copies, tiny_npz):
    """Worked out by hand from the weights: contrast at severity 5."""
    from models import build_model
    from utils.data.views import normalise

    run = run_of(copies, "teachers")
    evaluate(run, "--on", "corruptions", "--corruptions", "contrast", "--write")
    found = read(run, "corruptions")["corruptions"]["contrast"]["5"]
    saved = torch.load(run / "model_best.pth", weights_only=True)
    net = build_model("resnet8", 4).eval()
    net.load_state_dict(saved["state_dict"])
    test = load_dataset(str(tiny_npz), ".").test
    *_, last = own_corruptions(test.images, ["contrast"])
    with torch.no_grad():
        logits = net(normalise(last.images, saved["mean"], saved["std"]))
    expected = classification_metrics(logits, test.labels)
    assert found["raw"] == pytest.approx(expected, abs=1e-5)


def test_several_runs_and_teachers_in_one_table(copies, capsys):
    evaluate(
        *(copies, "--on", "corruptions", "--corruptions", "pixelate", "--with-teacher", "--write")
    )
    printed = capsys.readouterr().out
    _, means = printed.split("\n\n")
    assert printed.count("means over corruptions") == 1
    assert means.count("clean") == 2 * 3  # student, its teacher, the teacher's own run
    teacher = read(run_of(copies, "teachers"), "corruptions")
    student_run = run_of(copies, "students")
    beside = read(student_run, "corruptions", "teacher")
    assert beside["means"]["mean"]["raw"] == pytest.approx(teacher["means"]["mean"]["raw"])
    assert beside["temperature"] == pytest.approx(teacher["temperature"])
    assert read(student_run, "corruptions") != teacher


def test_a_teacher_that_has_changed_is_refused(copies, capsys):
    student, teacher = (run_of(copies, which) for which in ("students", "teachers"))
    config = json.loads((student / "config.json").read_text())
    config["arguments"]["teacher_path"] = str(teacher)
    (student / "config.json").write_text(json.dumps(config))
    command = (student, "--on", "corruptions", "--corruptions", "contrast", "--with-teacher")
    evaluate(*command)
    saved = torch.load(teacher / "model_best.pth", weights_only=True)
    saved["epoch"] += 1
    torch.save(saved, teacher / "model_best.pth")
    assert "no longer the teacher" in fails(capsys, command)
    shutil.rmtree(teacher)
    assert "leave out --with-teacher" in fails(capsys, command)


def test_published_corruptions(copies, test_labels, tmp_path, capsys):
    write_published(tmp_path / "CIFAR-10-C", test_labels)
    run = run_of(copies, "students")
    evaluate(run, "--on", "cifar10c", "--data_dir", tmp_path, "--write")
    assert "CIFAR-10-C: 19 corruptions x 5 severities" in capsys.readouterr().out
    found = read(run, "cifar10c")
    assert found["corruptions"].keys() == set(PUBLISHED)
    # All images of one severity are alike here, so one class is predicted for all of them.
    shares = np.bincount(test_labels) / len(test_labels)
    assert np.isclose(shares, found["corruptions"]["fog"]["3"]["raw"]["top1"]).any()
    command = (run, "--on", "cifar100c", "--data_dir", tmp_path)
    error = fails(capsys, command)
    assert "labels.npy, gaussian_noise.npy" in error and "CIFAR-100-C" in error
    evaluate(run, "--on", "cifar10c", "--data_dir", tmp_path, "--corruptions", "fog", "snow")
    assert "2 corruptions x 5" in capsys.readouterr().out


def test_foreign_data(copies, tmp_path, capsys):
    foreign = write_npz(tmp_path / "foreign.npz", 4, 20, 30, seed=9)
    evaluate(copies, "--on", foreign, "--write")
    printed = capsys.readouterr().out
    assert "its 30 images" in printed and "40 of the test split" in printed
    assert printed.count(" raw ") == 2 and printed.count(" scaled ") == 2
    found = read(run_of(copies, "teachers"), "foreign")
    assert 0 <= found["raw"]["confidence_auroc"] <= 1
    np.savez(tmp_path / "svhn.npz", x_test=np.zeros((5, 8, 8, 3), np.uint8))
    evaluate(copies / "students", "--on", "svhn", "--data_dir", tmp_path, "--with-teacher")
    printed = capsys.readouterr().out
    assert "its 5 images" in printed and "teacher resnet8 NLL" in printed


def test_the_test_split_is_not_foreign_to_itself(copies, tiny_npz):
    """Its own images again: nothing tells them apart."""
    run = run_of(copies, "teachers")
    evaluate(run, "--on", tiny_npz, "--write")
    found = read(run, "tiny")["raw"]
    assert found["confidence_auroc"] == pytest.approx(0.5, abs=1e-3)
    assert found["entropy_auroc"] == pytest.approx(0.5, abs=1e-3)


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
        logits = stored["best_test_logits"]
    shares = votes / votes.sum(1, keepdims=True)
    expected = label_distribution_metrics(logits, shares, found["temperature"])
    assert expected.items() <= found["scaled"].items()
    assert -1 <= found["raw"]["teacher_entropy_correlation"] <= 1
    assert "teacher_entropy_correlation" not in read(run, "cifar10h", "teacher")["raw"]
    np.save(tmp_path / "cifar10h-counts.npy", votes[::-1])
    assert "order" in fails(capsys, (copies, "--on", "cifar10h", "--data_dir", tmp_path))


def test_the_known_posterior(copies, tmp_path, capsys, monkeypatch):
    """A run on synthetic data, its images replaced by its posterior's logits."""
    data = load_dataset("synthetic", tmp_path)
    run = run_of(copies, "teachers")
    assert "whose posterior is not known" in fails(capsys, (run, "--on", "synthetic"))
    result = json.loads((run / "result.json").read_text())
    result |= {"dataset": "synthetic", "fingerprint": data.fingerprint, "num_classes": 10}
    (run / "result.json").write_text(json.dumps(result))
    logits = (data.test.posterior + 1e-6).log().float().numpy()
    np.savez(run / "predictions.npz", best_test_logits=logits, test_labels=data.test.labels.numpy())
    evaluate(run, "--on", "synthetic", "--write")
    found = read(run, "synthetic")["raw"]
    assert found["kl"] == pytest.approx(0, abs=1e-4)
    assert found["tv"] == pytest.approx(0, abs=1e-4)
    known = posterior_metrics(logits, data.test.posterior)
    assert found["calibration_error"] == known["true_calibration_error"]


def test_last_epochs_and_bounds(copies, tmp_path, capsys, tiny_npz):
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


def fails(capsys, argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, one_line_errors("script"):
        evaluate(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("script: error: ") and error.count("\n") == 1, error
    return error


BAD = [
    ("", "--on"),
    ("--on cifar10q", "cifar10c"),
    ("--on missing.npz", "missing.npz"),
    ("--on svhn --out boxes.png", "--out has no effect"),
    ("--on synthetic --corruptions contrast", "--corruptions has no effect"),
    ("--on cifar10c --seed 1", "--seed has no effect"),
    ("--on cifar10c --dataset other.npz", "--dataset has no effect"),
    ("--on corruptions --corruptions fog", "has only gaussian_noise"),
    ("--on corruptions --corruptions smoke", "smoke"),
    ("--on corruptions --out boxes.pdf", ".png"),
    ("--on corruptions --out nowhere/boxes.png", "nowhere"),
    ("--on corruptions --seed -1", "--seed"),
    ("--on corruptions --dataset missing.npz", "missing.npz"),
    ("--on corruptions --test-batch-size 0", "--test-batch-size"),
    ("--on cifar10h --data_dir nowhere", "nowhere"),
    ("--on cifar10c --data_dir nowhere", "nowhere/CIFAR-10-C"),
    ("--on corruptions --writ", "'--writ'"),
]


@pytest.mark.parametrize("flags, said", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input(runs, capsys, flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, (runs, *flags.split()))
    assert not list(tmp_path.iterdir())


def test_other_data_than_the_runs(copies, capsys, tmp_path):
    other = write_npz(tmp_path / "other.npz", 4, 150, 40, seed=1)
    command = (copies, "--on", "corruptions", "--dataset", other)
    assert "trained on other data" in fails(capsys, command)


def test_weights_that_are_gone_or_damaged(copies, capsys):
    weights = run_of(copies, "teachers") / "model_best.pth"
    command = (copies / "teachers", "--on", "corruptions", "--corruptions", "contrast")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "model_best.pth" in fails(capsys, command)
    saved = torch.load(io.BytesIO(content), weights_only=True)
    saved["state_dict"].pop("fc.bias")
    torch.save(saved, weights)
    assert "model_best.pth" in fails(capsys, command)
    weights.unlink()
    assert "model_best.pth" in fails(capsys, command)


def test_boxes_are_quartiles_over_corruptions():
    figure = Figure()
    one = Series("net", 0, False, {})
    draw_boxes(figure.subplots(), one, [[0.1, 0.2, 0.3, 0.4, 0.9]], place=0, count=2)
    [panel] = figure.axes
    [box] = panel.patches
    heights = box.get_path().vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.2, 0.4))
    whiskers = [y for line in panel.lines for y in line.get_ydata()]
    assert (min(whiskers), max(whiskers)) == pytest.approx((0.1, 0.9))


def test_boxes_of_names_that_look_like_formulas(tmp_path):
    values = [[0.5], [0.1, 0.2, 0.3, 0.4, 0.5]]
    series = [Series("a_$net$", 0, scaled, {"ece": values}) for scaled in (False, True)]
    with open(tmp_path / "boxes.png", "wb") as file:
        severity_boxes(series, ["clean", "1"], {"ece": COLUMNS["ece"]}, file)
    with Image.open(tmp_path / "boxes.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_as_a_user_runs_it(runs, tmp_path):
    command = ("python", "-m", "scripts.evaluate", run_of(runs, "teachers"), "--on", "corruptions")
    done = run_script(*command, "--corruptions", "contrast", cwd=tmp_path)
    assert "means over corruptions" in done.stdout and done.stderr == ""
