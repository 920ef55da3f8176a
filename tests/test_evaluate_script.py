"""scripts.evaluate and scripts.posthoc on real runs, and the images that they are evaluated on."""

import colorsys
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import command, fails, run_script, write_npz
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import softmax
from scipy.stats import entropy, spearmanr

import train_student
import train_teacher
from models import build_model
from scripts import evaluate as script
from scripts import posthoc, report
from utils.analysis.corruptions import OWN, PUBLISHED, own_corruptions, published_corruptions
from utils.analysis.known_labels import human_labels
from utils.analysis.shift import foreign_images
from utils.calibration.distributions import label_distribution_metrics, ood_metrics
from utils.calibration.metrics import classification_metrics, posterior_metrics
from utils.calibration.posthoc import METHODS
from utils.data import load_dataset
from utils.data.views import normalise
from utils.program import UserError, wheels

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


def test_the_seed_decides_the_noise_alone(photos):
    once = severities("gaussian_noise", photos, 3)
    for among in (("contrast", "pixelate"), tuple(reversed(OWN))[:-1]):
        assert all(map(torch.equal, once, severities("gaussian_noise", photos, 3, among)))
    assert not torch.equal(once[0], severities("gaussian_noise", photos, 4)[0])
    assert not torch.equal(once[3] - photos, once[4] - photos)


def noise_fits(sigma, before, after):
    noise = (after.double() - 128) / 255
    return noise.std().item() == pytest.approx(sigma, rel=0.02) and abs(noise.mean().item()) < 1e-3


def blur_is_scipys(sigma, before, after):
    sigmas, before = (0, 0, sigma, sigma), before.numpy().astype(float)
    return np.allclose(after, gaussian_filter(before, sigmas, mode="nearest", truncate=4), 0, 0.51)


def contrast_keeps_the_mean_colour(share, before, after):
    before, after = before.double(), after.double()
    same = torch.allclose(after.mean((2, 3)), before.mean((2, 3)), atol=0.3)
    return same and torch.allclose(after.std((2, 3)), share * before.std((2, 3)), atol=0.3)


def brightness_raises_v_alone(shift, before, after):
    pixels, found = (x[..., ::9, ::9].permute(0, 2, 3, 1).reshape(-1, 3) for x in (before, after))
    hsv = [colorsys.rgb_to_hsv(*(pixel / 255).tolist()) for pixel in pixels]
    wanted = [colorsys.hsv_to_rgb(h, s, min(1, v + shift)) for h, s, v in hsv]
    return np.allclose(255 * np.array(wanted), found, 0, 0.51)


def jpeg_is_pillows(quality, before, after):
    image = Image.fromarray(before[4].permute(1, 2, 0).numpy())
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.array_equal(after[4].permute(1, 2, 0), Image.open(file))


def pixels_are_boxes(share, before, after, box=Image.Resampling.BOX):
    image = Image.fromarray(before[4].permute(1, 2, 0).numpy())
    expected = image.resize((int(32 * share),) * 2, box).resize((32, 32), box)
    return np.array_equal(after[4].permute(1, 2, 0), expected)


STRENGTHS = [noise_fits, blur_is_scipys, contrast_keeps_the_mean_colour, brightness_raises_v_alone]
STRENGTHS += [jpeg_is_pillows, pixels_are_boxes]


@pytest.mark.parametrize("name, fits", list(zip(OWN, STRENGTHS, strict=True)))
def test_a_corruption_has_its_strength(photos, name, fits):
    if name == "gaussian_noise":
        photos = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    before, every = photos.clone(), severities(name, photos)
    for constant, made in zip(OWN[name][1], every, strict=True):
        assert made.dtype == torch.uint8 and fits(constant, before, made)
    assert torch.equal(photos, before) and not torch.equal(photos, every[0])


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
    levels = [images.unique().tolist() for _, _, images in found]
    assert levels == [[level] for level in (11, 21, 31, 41, 51, 10, 20, 30, 40, 50)]
    assert found[1][:2] == ("snow", 2) and found[0][2].shape == (3, 3, 8, 8)
    (folder / "snow.npy").write_bytes((folder / "fog.npy").read_bytes()[:-9])
    for said, labels, *names in (
        ("CIFAR-10-C/frost.npy.*zenodo.*--corruptions", [3, 1, 4], "fog", "frost"),
        ("labels.npy is not the labels", [3, 1, 5], "fog"),
        ("labels.npy is not the labels", [3, 1], "fog"),
        ("snow.npy cannot be read", [3, 1, 4], "snow"),
    ):
        with pytest.raises(UserError, match=said):
            published_corruptions("cifar10c", tmp_path, torch.tensor(labels), names)


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
    with pytest.raises(UserError, match=r"svhn\.npz.*network unreachable.*numpy.savez"):
        foreign_images("svhn", tmp_path)
    np.savez(tmp_path / "svhn.npz", x_test=images)
    assert torch.equal(foreign_images("svhn", tmp_path), expected)


def test_human_labels_from_counts_or_shares(tmp_path):
    votes, labels = np.array([[48, 2, 0], [10, 30, 10], [0, 0, 51]]), torch.tensor([0, 1, 2])
    np.save(tmp_path / "cifar10h-probs.npy", votes / votes.sum(1, keepdims=True))
    from_shares = human_labels(tmp_path, labels)
    (tmp_path / "cifar10h").mkdir()
    np.save(tmp_path / "cifar10h" / "cifar10h-counts.npy", votes)
    from_counts = human_labels(tmp_path, labels)
    assert torch.allclose(from_counts, from_shares) and from_counts[1].tolist() == [0.2, 0.6, 0.2]
    for other in ([0, 2, 1], [0, 1]):
        with pytest.raises(UserError, match="not these in their order; evaluate a run on CIFAR-10"):
            human_labels(tmp_path, torch.tensor(other))


# --- the script -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_npz):
    """A finished teacher and its student, on tiny.npz."""
    root = tmp_path_factory.mktemp("runs")
    train_teacher.main(flags(tiny_npz, root / "teachers"))
    teacher = str(run_of(root, "teachers"))
    train_student.main([*flags(tiny_npz, root / "students"), "--teacher_path", teacher])
    return root


def flags(data, root) -> list[str]:
    return command(data, root, "--epochs", "1", "--train-batch-size", "32")


def run_of(runs, which) -> Path:
    return next((runs / which).rglob("result.json")).parent


@pytest.fixture
def copies(runs, tmp_path):
    """The same runs, which a test may change."""
    return Path(shutil.copytree(runs, tmp_path / "runs"))


@pytest.fixture(scope="module")
def test_labels(tiny_npz):
    with np.load(tiny_npz) as arrays:
        return arrays["y_test"]


def evaluate(*argv):
    script.main([str(word) for word in argv])


def refused(capsys, folder, *argv) -> str:
    capsys.readouterr()
    return fails(capsys, folder, lambda argv: evaluate(*argv), argv)


def change(path: Path, **what) -> None:
    """Change a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | what))


def read(run, what, part="best"):
    return json.loads((run / f"evaluation_{what}.json").read_text())[part]


def name_of(file: Path) -> str:
    """What the evaluation on a file is called: files of one name are told apart by their bytes."""
    return f"{file.stem}_{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"


def test_own_corruptions(copies, tmp_path, capsys):
    run = run_of(copies, "teachers")
    evaluate(run, "--on", "corruptions", "--write", "--out", tmp_path / "boxes.png")
    printed = capsys.readouterr().out
    assert "not CIFAR-10-C" in printed and printed.count("\n") > 2 * (6 * 6 + 7)
    found = read(run, "corruptions")
    for logits in ("raw", "scaled"):
        every = np.array([[found[name][s][logits]["ece"] for name in OWN] for s in "12345"])
        assert found["mean"]["mean"][logits]["ece"] == pytest.approx(every.mean())
        assert found["mean"]["3"][logits]["ece"] == pytest.approx(every[2].mean())
        assert found["pixelate"]["mean"][logits]["ece"] == pytest.approx(every[:, -1].mean())
    with Image.open(tmp_path / "boxes.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_images_are_run_in_the_precision_of_the_run(copies, tiny_npz, tmp_path, precision):
    """Clean, corrupted and foreign ones, worked out by hand from the weights."""
    run = run_of(copies, "teachers")
    result = json.loads((run / "result.json").read_text())
    change(run / "result.json", settings=result["settings"] | {"mixed_precision": precision})
    saved = torch.load(run / "model_best.pth", weights_only=True)
    net = build_model("resnet8", 4).eval()
    net.load_state_dict(saved["state_dict"])
    moved = shutil.copy(tiny_npz, tmp_path / "moved.npz")
    test = load_dataset(str(moved), ".").test
    *_, (_, _, corrupted) = own_corruptions(test.images, ["contrast"])

    def logits(images):
        with torch.no_grad(), torch.autocast("cpu", enabled=precision == "bf16"):
            return net(normalise(images, saved["mean"], saved["std"])).float()

    clean = classification_metrics(logits(test.images), test.labels)
    float32 = result["best"]["test"]["raw"]["nll"]
    assert (abs(clean["nll"] - float32) > 1e-5) == (precision == "bf16")  # or nothing is tested
    evaluate(run, "--on", "corruptions", "--corruptions", "contrast", "--write", "--dataset", moved)
    found = read(run, "corruptions")
    assert found["clean"]["0"]["raw"] == pytest.approx(clean, abs=1e-5)
    expected = classification_metrics(logits(corrupted), test.labels)
    assert found["contrast"]["5"]["raw"] == pytest.approx(expected, abs=1e-5)
    foreign = tmp_path / "foreign.npz"
    for images in (corrupted, test.images):
        np.savez(foreign, x_test=images.permute(0, 2, 3, 1))
        evaluate(run, "--on", foreign, "--write")
        expected = ood_metrics(logits(test.images), logits(images))
        assert read(run, name_of(foreign))["raw"] == pytest.approx(expected, abs=1e-5)
    assert len(list(run.glob("evaluation_foreign*.json"))) == 2


def test_several_runs_and_teachers_in_one_table(copies, capsys):
    student, teacher = (run_of(copies, which) for which in ("students", "teachers"))
    arguments = json.loads((student / "config.json").read_text())["arguments"]
    change(student / "config.json", arguments=arguments | {"teacher_path": [str(teacher)]})
    words = ("--on", "corruptions", "--corruptions", "pixelate", "--with-teacher")
    evaluate(copies, *words, "--write")
    _, means = capsys.readouterr().out.split("means over corruptions")
    assert means.count("clean") == 2 * 2  # student, and the teacher's own run
    evaluate(student, *words, "--write")
    own, beside = read(teacher, "corruptions"), read(student, "corruptions", "teacher")
    assert beside["mean"]["mean"]["raw"] == pytest.approx(own["mean"]["mean"]["raw"])
    assert beside["temperature"] == pytest.approx(own["temperature"])
    assert read(student, "corruptions") != own
    saved = torch.load(teacher / "model_best.pth", weights_only=True)
    torch.save(saved | {"epoch": 9}, teacher / "model_best.pth")
    assert "no longer what it learned from" in refused(capsys, copies, student, *words)
    shutil.rmtree(teacher)
    assert "leave out --with-teacher" in refused(capsys, copies, student, *words)


def test_the_teacher_of_a_run_of_an_earlier_version(copies):
    """Its flags were texts before there were ensembles, and some did not exist."""
    student, teacher = (run_of(copies, which) for which in ("students", "teachers"))
    words = ("--on", "corruptions", "--corruptions", "pixelate", "--with-teacher", "--write")
    arguments = json.loads((student / "config.json").read_text())["arguments"]
    for key in ("teacher_key", "teacher_size", "teacher_temperature"):
        del arguments[key]
    shutil.move(teacher, copies / "elsewhere")  # so that it is not in the table by itself
    for name in (None, "resnet8"):
        given = {"teacher_path": str(copies / "elsewhere"), "teacher": name}
        change(student / "config.json", arguments=arguments | given)
        evaluate(student, *words)
        found = read(student, "corruptions", "teacher")["clean"]["0"]["raw"]
        stored = json.loads((student / "result.json").read_text())["teacher"]["test"]["raw"]
        assert found == pytest.approx(stored)
        (student / "evaluation_corruptions.json").unlink()


def test_a_third_partys_teacher_has_raw_rows_alone(tiny_npz, tmp_path, capsys):
    torch.manual_seed(3)
    torch.save(build_model("resnet8", 4).state_dict(), tmp_path / "theirs.pth")
    root = tmp_path / "students"
    taught = ("--teacher", "resnet8", "--teacher_path", str(tmp_path / "theirs.pth"))
    train_student.main([*flags(tiny_npz, root), *taught])
    assert "The teacher has no scaled row" in capsys.readouterr().out
    words = ("--on", "corruptions", "--corruptions", "pixelate", "contrast", "--with-teacher")
    evaluate(root, *words, "--write", "--out", tmp_path / "boxes.png")
    assert (tmp_path / "boxes.png").read_bytes().startswith(b"\x89PNG")
    assert list(read(run_of(tmp_path, "students"), "corruptions", "teacher")["mean"]["mean"]) == [
        "raw"
    ]
    posthoc.main([str(root), "--with-teacher", "--folds", "2", "--write"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("vector ")]
    assert len(rows) == 1 and "nothing is fitted" in printed
    votes = np.ones((40, 4)) + 9 * np.eye(4)[load_dataset(str(tiny_npz), ".").test.labels]
    np.save(tmp_path / "cifar10h-counts.npy", votes)
    evaluate(root, "--on", "cifar10h", "--data_dir", tmp_path)
    assert capsys.readouterr().out.count(" scaled ") == 1


def test_several_teachers_are_run_as_one(runs, tiny_npz, tmp_path):
    train_teacher.main([*flags(tiny_npz, tmp_path / "second"), "--seed", "2"])
    teachers = [str(run_of(runs, "teachers")), str(run_of(tmp_path, "second"))]
    train_student.main([*flags(tiny_npz, tmp_path / "students"), "--teacher_path", *teachers])
    run = run_of(tmp_path, "students")
    evaluate(run, "--on", "corruptions", "--corruptions", "pixelate", "--with-teacher", "--write")
    stored = json.loads((run / "result.json").read_text())["teacher"]["test"]
    assert read(run, "corruptions", "teacher")["clean"]["0"]["raw"] == pytest.approx(stored["raw"])


def test_published_corruptions(copies, test_labels, tmp_path, capsys):
    write_published(tmp_path / "CIFAR-10-C", test_labels)
    run = run_of(copies, "students")
    evaluate(run, "--data_dir", tmp_path, "--on", "cifar10c", "--write")
    assert "CIFAR-10-C: 19 corruptions x 5 severities" in capsys.readouterr().out
    found = read(run, "cifar10c")
    assert found.keys() - set(PUBLISHED) == {"temperature", "clean", "mean"}
    # All images of one severity are alike here, so one class is predicted for all of them.
    shares = np.bincount(test_labels) / len(test_labels)
    assert np.isclose(shares, found["fog"]["3"]["raw"]["top1"]).any()


def test_foreign_data(copies, tmp_path, capsys, tiny_npz):
    run = run_of(copies, "teachers")
    last = json.loads((run / "result.json").read_text())["last"]
    change(run / "result.json", last=last | {"temperature_at_bound": True})
    foreign = write_npz(tmp_path / "foreign.npz", 4, 20, 30, seed=9)
    evaluate(copies, "--on", foreign, "--epoch", "last", "--write")
    printed = capsys.readouterr().out
    assert "its 30 images" in printed and "40 of the test split" in printed
    assert printed.count(" raw ") == 2
    assert printed.count("do not trust its scaled rows") == 1
    np.savez(tmp_path / "svhn.npz", x_test=np.zeros((5, 8, 8, 3), np.uint8))
    evaluate(copies / "students", "--on", "svhn", "--data_dir", tmp_path, "--with-teacher")
    printed = capsys.readouterr().out
    assert "its 5 images" in printed and "teacher resnet8 NLL" in printed
    evaluate(copies, "--on", foreign, "--write")
    assert "do not trust" not in capsys.readouterr().out and read(run, name_of(foreign), "last")
    # Its own test images again: nothing tells them apart.
    evaluate(run, "--on", tiny_npz, "--write")
    assert "THE TEST SPLIT ITSELF" in capsys.readouterr().out
    found = read(run, name_of(tiny_npz))["raw"]
    assert found["confidence_auroc"] == found["entropy_auroc"] == pytest.approx(0.5, abs=1e-9)


def test_human_labels(copies, test_labels, tmp_path, capsys):
    rng = np.random.default_rng(0)
    votes = 40 * np.eye(4, dtype=int)[test_labels] + rng.integers(0, 10, (len(test_labels), 4))
    np.save(tmp_path / "cifar10h-counts.npy", votes)
    run, human = run_of(copies, "students"), ("--on", "cifar10h", "--data_dir", tmp_path)
    evaluate(run, *human, "--write")
    printed = capsys.readouterr().out
    assert "teacher resnet8 NLL" in printed and "... with teacher's" in printed
    found = read(run, "cifar10h")
    with np.load(run / "predictions.npz") as stored:
        logits, teachers = stored["best_test_logits"], stored["teacher_test_logits"]
    shares = votes / votes.sum(1, keepdims=True)
    expected = label_distribution_metrics(logits, shares, found["temperature"])
    assert expected.items() <= found["scaled"].items()
    of_teacher = read(run, "cifar10h", "teacher")
    temperatures = {"raw": (1, 1), "scaled": (found["temperature"], of_teacher["temperature"])}
    correlations = {}
    for kind, divisors in temperatures.items():
        probabilities = [
            softmax(z.astype(float) / divisor, axis=1)
            for z, divisor in zip((logits, teachers), divisors, strict=True)
        ]
        entropies = (entropy(probs, axis=1) for probs in probabilities)
        correlations[kind] = spearmanr(*entropies).statistic
        assert found[kind]["teacher_entropy_correlation"] == pytest.approx(correlations[kind])
    assert "teacher_entropy_correlation" not in of_teacher["raw"]
    # Test logits alone will do; the teacher's are those of its own run.
    report.main([str(copies), "--resamples", "0", "--pack", str(tmp_path / "runs.zip")])
    evaluate(tmp_path / "runs.zip", *human)
    printed = capsys.readouterr().out.split("with teacher's")[1]
    shown = float(re.search(r" raw .* (\S+)\n", printed)[1])
    assert (
        shown == pytest.approx(correlations["raw"], abs=0.005) and "teacher resnet8" not in printed
    )
    for words in (("--write",), ("--on", "svhn")):
        assert "name run folders" in refused(capsys, copies, tmp_path / "runs.zip", *human, *words)


def test_a_gpu_that_cannot_be_used_is_not_passed_over(copies, tiny_npz, capsys, monkeypatch):
    """Neither for corrupted nor for foreign images; stored logits need none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(wheels, "driver_version", lambda: 580)
    monkeypatch.setattr(wheels, "capabilities", lambda: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = run_of(copies, "teachers")
    for what in ("corruptions", tiny_npz):
        error = refused(capsys, copies, run, "--on", what, "--write")
        assert "there is an NVIDIA driver (580), but" in error and "CUDA_VISIBLE_DEVICES=" in error
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    evaluate(run, "--on", tiny_npz)


def test_the_known_posterior(copies, tmp_path):
    """A run on synthetic data, its logits replaced by its posterior's."""
    data = load_dataset("synthetic", tmp_path)
    run = run_of(copies, "teachers")
    about = {"dataset": "synthetic", "fingerprint": data.fingerprint, "num_classes": 10}
    change(run / "result.json", **about)
    logits = (data.test.posterior + 1e-6).log().float().numpy()
    np.savez(run / "predictions.npz", best_test_logits=logits, test_labels=data.test.labels.numpy())
    evaluate(run, "--on", "synthetic", "--write")
    found = read(run, "synthetic")["raw"]
    assert (found["kl"], found["tv"]) == pytest.approx((0, 0), abs=1e-4)
    known = posterior_metrics(logits, data.test.posterior)
    assert found["calibration_error"] == known["true_calibration_error"]


# --- scripts.posthoc ------------------------------------------------------------------------------


def test_posthoc_of_every_net_is_kept_side_by_side(copies, capsys):
    stopped, run = copies / "stopped", run_of(copies, "students")
    stopped.mkdir()
    (stopped / "config.json").write_text("{}")
    posthoc.main([str(run), str(stopped), "--with-teacher", "--folds", "2", "--write"])
    printed = capsys.readouterr().out
    assert printed.count("val NLL: on the images that") == 2
    assert f"left out: {stopped}, unfinished" in printed
    for method in METHODS:
        assert printed.count(f"\n{method} ") == 2
    assert "no finished run" in fails(capsys, copies, posthoc.main, [str(stopped)])

    def written(*flags):
        posthoc.main([str(run), "--write", *flags])
        return json.loads((run / "posthoc.json").read_text()).keys() - {"predictions", "folds"}

    assert written("--epoch", "last", "--folds", "2") == {"best", "teacher", "last"}
    assert written("--folds", "3") == {"best"}


def test_posthoc_reads_the_stored_logits(copies, tmp_path):
    """As a user runs it; the rows none and temperature repeat the run's own result."""
    run = run_of(copies, "teachers")
    result = json.loads((run / "result.json").read_text())
    done = run_script("python", "-m", "scripts.posthoc", run, "--write", cwd=tmp_path)
    assert "Dirichlet ODIR" in done.stdout and done.stderr == ""
    found = json.loads((run / "posthoc.json").read_text())
    predictions = (run / "predictions.npz").read_bytes()
    assert found["predictions"] == hashlib.sha256(predictions).hexdigest()
    assert found["folds"] == 5
    best, own = found["best"], result["best"]
    assert best["temperature"]["temperature"] == own["temperature"]
    assert best["none"]["val"] == pytest.approx(own["val"])
    assert best["none"]["test"] == pytest.approx(own["test"]["raw"])
    assert best["temperature"]["test"] == pytest.approx(own["test"]["scaled"])
    with np.load(run / "predictions.npz") as stored:
        logits, labels = stored["best_test_logits"], stored["test_labels"]
    one = best["vector"]
    mapped = logits.astype(np.float64) * one["weight"] + one["bias"]
    assert classification_metrics(mapped, labels) == pytest.approx(one["test"])


def test_posthoc_refuses_other_predictions(copies, capsys):
    path, key = run_of(copies, "teachers") / "predictions.npz", "best_val_logits"
    with np.load(path) as stored:
        arrays = dict(stored)
    without, many = {"val_labels": np.zeros(3)}, np.full_like(arrays[key], np.nan)
    for changed in (without, arrays | {key: many}, arrays | {key: arrays[key][:, :2]}):
        np.savez(path, **changed)
        assert "predictions.npz" in fails(capsys, copies, posthoc.main, [str(copies)])
    path.unlink()
    assert "predictions.npz" in fails(capsys, copies, posthoc.main, [str(copies)])
