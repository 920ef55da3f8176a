"""Predictions of a user's own images: they are the run's, and the sets those of its split."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, fails, run_script
from PIL import Image
from safetensors.torch import load, save, save_file
from scipy.special import softmax
from test_folders import write_part

import train_student
import train_teacher
from scripts import export, predict
from scripts.deployment.exported_net import ONNX_TORCH
from utils.data import load_dataset
from utils.data.given import GivenImages
from utils.program.files import safetensors_metadata, write_json

LINEAR = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
"""  # takes 8 x 8 pixels alone


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_npz):
    root = tmp_path_factory.mktemp("finished")
    train_teacher.main(command(tiny_npz, root))
    run = next(root.rglob("result.json")).parent
    config = json.loads((run / "config.json").read_text())
    assert config["image_side"] == 8
    names = ["red", "green", "blue", "red, or blue"]
    write_json(run / "config.json", {**config, "class_names": names})
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def photos(tiny_npz, tmp_path_factory):
    """The 40 test images as PNG files, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(images_tested(tiny_npz)):
        place = folder / f"{number // 20}" / f"{number:02d}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(place)
    return folder


@pytest.fixture(scope="module")
def onnx_file(finished, tmp_path_factory, tiny_npz):
    if torch.__version__ < ONNX_TORCH:
        pytest.skip("this torch is too old for ONNX")
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export.main([str(finished), "--out", str(file), "--dataset", str(tiny_npz)])
    return file


def images_tested(npz) -> np.ndarray:
    """uint8 (N, H, W, 3)."""
    return load_dataset(str(npz), ".").test.images.permute(0, 2, 3, 1).numpy()


def predicted(*words, out: Path) -> list[dict[str, str]]:
    predict.main([*map(str, words), "--out", str(out)])
    with open(out, newline="") as file:
        return list(csv.DictReader(file))


def stored(run: Path, epoch: str = "best") -> dict:
    with np.load(run / "predictions.npz") as arrays:
        val = arrays[f"{epoch}_val_logits"].astype(float)
        test = arrays[f"{epoch}_test_logits"].astype(float)
        labels = arrays["val_labels"]
    temperature = json.loads((run / "result.json").read_text())[epoch]["temperature"]
    return {"val": val, "test": test, "labels": labels, "T": temperature}


def lac_sets(run: Path, level: float, epoch: str = "best") -> list[set[int]]:
    """By the definition of LAC, with the predicted class in."""
    of = stored(run, epoch)
    val = softmax(of["val"] / of["T"], axis=1)
    scores = np.sort(1 - val[np.arange(len(val)), of["labels"]])
    highest = scores[int(np.ceil(round((len(scores) + 1) * level, 9))) - 1]
    test = softmax(of["test"] / of["T"], axis=1)
    return [set(np.flatnonzero(1 - row <= highest + 1e-12)) | {int(row.argmax())} for row in test]


def assert_rows(rows: list[dict], run: Path, epoch: str = "best", level: float = 0.9) -> None:
    """They are those of the run's stored test logits."""
    of = stored(run, epoch)
    config = json.loads((run / "config.json").read_text())
    names = config["class_names"] or [str(label) for label in range(of["test"].shape[1])]
    raw = softmax(of["test"], axis=1)
    scaled = softmax(of["test"] / of["T"], axis=1)
    members = lac_sets(run, level, epoch)
    assert len(rows) == len(raw)
    for place, row in enumerate(rows):
        order = np.argsort(-scaled[place])
        assert row["class"] == row["class_1"] == names[order[0]]
        assert float(row["confidence"]) == pytest.approx(scaled[place].max(), abs=1e-4)
        assert float(row["raw_confidence"]) == pytest.approx(raw[place].max(), abs=1e-4)
        for rank, label in enumerate(order[:5], start=1):
            expected = pytest.approx(scaled[place, label], abs=1e-4)
            assert float(row[f"probability_{rank}"]) == expected
        names_in_set = {names[label] for label in members[place]}
        assert set(row[f"set_at_{level:g}"].split("|")) == names_in_set


def test_they_are_those_of_the_run(finished, photos, tmp_path, capsys):
    rows = predicted(finished, photos, out=tmp_path / "rows.csv")
    assert_rows(rows, finished)
    assert [row["file"] for row in rows] == [str(path) for path in sorted(photos.rglob("*.png"))]
    assert len({row["class"] for row in rows}) > 1
    assert len({row["set_at_0.9"].count("|") for row in rows}) > 1
    assert f"written: {tmp_path}/rows.csv, 40 images" in capsys.readouterr().out


def test_arrays_and_files_by_name(finished, photos, tiny_npz, tmp_path):
    """In the order of the command line."""
    images = images_tested(tiny_npz)
    np.save(tmp_path / "last.npy", images[30:].transpose(0, 3, 1, 2))
    np.savez(tmp_path / "middle.npz", x=images[1:30], y=np.arange(29))
    first = photos / "0" / "00.png"
    places = [first, tmp_path / "middle.npz", tmp_path / "last.npy"]
    rows = predicted(finished, *places, out=tmp_path / "rows.csv")
    assert_rows(rows, finished)
    names = [row["file"] for row in rows]
    assert names[:2] == [str(first), f"{tmp_path}/middle.npz[0]"]
    assert names[-1] == f"{tmp_path}/last.npy[9]"
    # x_test comes first: a data set's own file.
    assert_rows(predicted(finished, tiny_npz, out=tmp_path / "rows.csv"), finished)


def test_a_class_name_may_hold_what_separates_them(run, photos, tmp_path):
    config = json.loads((run / "config.json").read_text())
    names = ["a|b", "a", "b\\", "c\\|d"]
    write_json(run / "config.json", {**config, "class_names": names})
    rows = predicted(run, photos, "--level", "0.9", out=tmp_path / "rows.csv")
    sets = lac_sets(run, level=0.9)
    assert any(len(members) > 1 for members in sets)
    for row, members in zip(rows, sets, strict=True):
        # Read by one character after the other: what follows a backslash belongs to the name.
        read, is_escaped = [""], False
        for char in row["set_at_0.9"]:
            if char == "|" and not is_escaped:
                read.append("")
            elif char != "\\" or is_escaped:
                read[-1] += char
            is_escaped = char == "\\" and not is_escaped
        assert {names.index(name) for name in read} == members and row["class"] in names


def test_many_names_are_one_piece(photos, tiny_npz):
    """They are decoded and predicted together, as a folder is; an array keeps its place."""
    files = sorted(photos.rglob("*.png"))
    pieces = list(GivenImages([*files[:5], photos / "1", tiny_npz, files[0]]).pieces(side=8))
    names = [*files[:5], *sorted((photos / "1").glob("*.png"))]
    assert pieces[0].names == [str(name) for name in names]
    assert pieces[1].names[0] == f"{tiny_npz}[0]"
    assert pieces[2].names == [str(files[0])]


def test_another_epoch_and_level(finished, photos, tmp_path):
    flags = ["--epoch", "last", "--level", "0.7", "--test-batch-size", "7"]
    rows = predicted(finished, photos, *flags, out=tmp_path / "rows.csv")
    assert_rows(rows, finished, epoch="last", level=0.7)


def test_images_are_resized_as_the_runs_own(tmp_path):
    """Of a folder with --image_size: wide ones, whose middle is cut out; and their arrays."""
    rng = np.random.default_rng(0)
    data = tmp_path / "shapes"
    for part in ("train", "test"):
        write_part(data / part, count=12)
        for file in (data / part).rglob("*.png"):
            pixels = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    flags = ["--image_size", "12", "--train-batch-size", "10", "--data_dir", str(tmp_path)]
    train_teacher.main([*command(data, tmp_path / "runs"), *flags])
    run = next(tmp_path.rglob("result.json")).parent
    rows = predicted(run, data / "test", "--level", "0.5", out=tmp_path / "rows.csv")
    assert {row["class"] for row in rows} <= {"cat", "dog"}
    assert_rows(rows, run, level=0.5)

    # A square array of another size is read as the picture of it would be.
    square = rng.integers(0, 256, (1, 24, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "square.npy", square)
    Image.fromarray(square[0]).save(tmp_path / "square.png")
    places = [tmp_path / "square.npy", tmp_path / "square.png"]
    first, second = predicted(run, *places, out=tmp_path / "rows.csv")
    assert first | {"file": ""} == second | {"file": ""}


def test_an_exported_net_says_the_same(finished, onnx_file, photos, tmp_path):
    rows = predicted(onnx_file, photos, out=tmp_path / "rows.csv")
    assert_rows(rows, finished)
    rows = predicted(onnx_file, photos, "--level", "0.8", out=tmp_path / "rows.csv")
    assert_rows(rows, finished, level=0.8)


@pytest.mark.parametrize("half", [(), ("--half",)])
def test_weights_alone_say_the_same(run, photos, tiny_npz, tmp_path, half, capsys):
    file = tmp_path / "net.safetensors"
    words = [str(run), "--format", "safetensors", *half, "--out", str(file)]
    export.main([*words, "--dataset", str(tiny_npz)])
    rows = predicted(file, photos, out=tmp_path / "rows.csv")
    raw = softmax(stored(run)["test"], axis=1).max(axis=1)
    allowed = 5e-3 if half else 1e-5  # the halves are another net
    assert np.abs([float(row["raw_confidence"]) for row in rows] - raw).max() < allowed
    if not half:
        assert_rows(rows, run)
    net = ["--model", f"{tmp_path}/mynet.py:tiny"]
    (tmp_path / "mynet.py").write_text(LINEAR)
    words = [str(file), str(photos), "--out", str(tmp_path / "rows.csv"), *net]
    error = fails(capsys, tmp_path, predict.main, words)
    assert f"--model has no effect with {file}; leave it out" in error


def test_sets_of_an_exported_file(onnx_file, photos, tmp_path, capsys):
    """The 15 validation images are too few for 95 % (19 are needed)."""
    words = [str(onnx_file), str(photos), "--level", "0.95", "--out", str(tmp_path / "rows.csv")]
    error = fails(capsys, tmp_path, predict.main, words)
    assert f"--level 0.95: {onnx_file} has sets at 0.8, 0.9; give one" in error


@pytest.mark.parametrize(
    "levels, images, note",
    [
        (("0.8",), 15, "no sets: the file has them at 0.8, not at 0.9; give one as --level"),
        ((), 3, "no sets: it was fitted on 3 validation images, too few"),
        ((), 1, "no sets: it was fitted on 1 validation image, too few"),
        ((), 4, "no sets: the run that the file was made from stored no validation logits"),
        (None, 15, "no sets: the file is of an older version; export the run again"),
    ],
)
def test_why_an_exported_file_has_no_sets(
    finished, tiny_npz, photos, tmp_path, capsys, levels, images, note
):
    file = tmp_path / "net.safetensors"
    words = [str(finished), "--format", "safetensors", "--out", str(file)]
    export.main([*words, "--dataset", str(tiny_npz)])
    content = file.read_bytes()
    about = safetensors_metadata(content)
    thresholds = json.loads(about["sets"])
    about["images"] = json.dumps({"train": 135, "val": images, "test": 40})
    del about["sets"]
    if levels is not None:
        about["sets"] = json.dumps({level: thresholds[level] for level in levels})
    file.write_bytes(save(load(content), about))
    capsys.readouterr()

    rows = predicted(file, photos / "0", out=tmp_path / "rows.csv")
    assert len(rows) == 20 and "set_at_0.9" not in rows[0]
    assert note in capsys.readouterr().out.splitlines()
    if levels:
        rows = predicted(file, photos / "0", "--level", "0.8", out=tmp_path / "rows.csv")
        assert rows[0]["set_at_0.8"]
        out = ["--out", str(tmp_path / "rows.csv")]
        flags = [str(file), str(photos), "--level", "0.9", *out]
        error = fails(capsys, tmp_path, predict.main, flags)
        assert f"--level 0.9: {file} has sets at 0.8; give one" in error


def test_other_calibrations_of_an_exported_file(run, onnx_file, photos, tiny_npz, tmp_path, capsys):
    file = tmp_path / "raw.onnx"
    words = [str(run), "--out", str(file), "--dataset", str(tiny_npz), "--calibration", "none"]
    export.main(words)
    rows = predicted(file, photos, out=tmp_path / "rows.csv")
    assert all(row["confidence"] == row["raw_confidence"] for row in rows)
    raw = softmax(stored(run)["test"], axis=1).max(axis=1)
    assert np.abs([float(row["confidence"]) for row in rows] - raw).max() < 1e-4
    assert "exported with --calibration none" in capsys.readouterr().out


def test_probabilities_too_small_for_float32(run, photos, tiny_npz, tmp_path, capsys):
    """At a small T those of a softmax are rounded to 0, and say nothing of the logits any more."""
    with np.load(run / "predictions.npz") as arrays:
        spread = np.ptp(arrays["best_test_logits"].astype(float), axis=1)
    result = json.loads((run / "result.json").read_text())
    # Where one in two images has a probability of less than exp(-100).
    result["best"]["temperature"] = float(np.median(spread)) / 100
    write_json(run / "result.json", result)
    expected = predicted(run, photos, out=tmp_path / "rows.csv")
    columns = ["raw_confidence", "confidence", *(f"probability_{rank}" for rank in range(1, 5))]

    words = [str(run), "--dataset", str(tiny_npz), "--out"]
    weights = tmp_path / "net.safetensors"
    export.main([*words, str(weights), "--format", "safetensors"])
    capsys.readouterr()
    for row, of_run in zip(
        predicted(weights, photos, out=tmp_path / "rows.csv"), expected, strict=True
    ):
        for column in columns:
            assert float(row[column]) == pytest.approx(float(of_run[column]), abs=1e-4)
        assert all(row[f"class_{rank}"] == of_run[f"class_{rank}"] for rank in range(1, 5))
    assert "rounds" not in capsys.readouterr().out

    if torch.__version__ < ONNX_TORCH:
        pytest.skip("this torch is too old for ONNX")
    export.main([*words, str(tmp_path / "net.onnx")])
    capsys.readouterr()
    rows = predicted(tmp_path / "net.onnx", photos, out=tmp_path / "rows.csv")
    for row, of_run in zip(rows, expected, strict=True):
        if row["raw_confidence"]:
            assert float(row["raw_confidence"]) == pytest.approx(
                float(of_run["raw_confidence"]), abs=1e-4
            )
        else:
            assert row["class_4"] == "" and row["probability_4"] == "0.000000"
        for rank in range(1, 5):
            assert row[f"class_{rank}"] in ("", of_run[f"class_{rank}"])
    emptied = sum(not row["raw_confidence"] for row in rows)
    assert 10 < emptied < 30
    assert f"rounds a probability of {emptied} images to 0" in capsys.readouterr().out


def test_what_cannot_be_read_is_counted(finished, photos, tmp_path, capsys):
    mixed = Path(shutil.copytree(photos, tmp_path / "mixed"))
    (mixed / "notes.txt").write_text("notes")
    (mixed / ".hidden.png").write_text("hidden")
    (mixed / "0" / "07.png").write_text("no image")
    rows = predicted(finished, mixed, out=tmp_path / "rows.csv")
    assert len(rows) == 39 and not any(row["file"].endswith("07.png") for row in rows)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert f"1 hidden (first {mixed}/.hidden.png)" in line
    assert f"1 *.txt (first {mixed}/notes.txt)" in line
    assert f"1 that cannot be read (first {mixed}/0/07.png (cannot identify" in line

    (tmp_path / "no.png").write_text("no image")
    out = ["--out", str(tmp_path / "other.csv")]
    error = fails(capsys, tmp_path, predict.main, [str(finished), str(tmp_path / "no.png"), *out])
    assert "IMAGES: none of 1 can be read; not read: 1 that cannot be read (first" in error


def test_the_table_at_the_terminal(finished, photos, capsys):
    predict.main([str(finished), str(photos)])
    lines = capsys.readouterr().out.splitlines()
    head, _, first = lines[:3]
    assert head.split() == ["file", "class", "confidence", "raw_confidence", "set_at_0.9"]
    assert first.split()[0] == str(photos / "0/00.png")
    assert sum(str(photos) in line for line in lines) == 20
    assert lines[-1] == "and 20 more; --out FILE.csv writes all"


def test_a_run_without_validation_logits_has_no_sets(run, photos, tmp_path, capsys):
    (run / "predictions.npz").unlink()
    rows = predicted(run, photos, out=tmp_path / "rows.csv")
    assert "set_at_0.9" not in rows[0] and len(rows) == 40
    assert f"no sets: {run}/predictions.npz has no validation" in capsys.readouterr().out


def test_too_few_validation_images_for_the_level(run, photos, tmp_path, capsys):
    rows = predicted(run, photos, "--level", "0.99", out=tmp_path / "rows.csv")
    assert "set_at_0.99" not in rows[0]
    said = capsys.readouterr().out
    assert "no sets: sets at level 0.99 need 99 validation samples" in said
    assert "take a lower level" in said


def test_a_run_of_an_older_version(run, photos, tmp_path, capsys):
    """It does not say the size of its images, and has no names."""
    config = json.loads((run / "config.json").read_text())
    del config["image_side"]
    write_json(run / "config.json", config | {"class_names": None})
    words = [str(run), str(photos), "--out", str(tmp_path / "rows.csv")]
    error = fails(capsys, tmp_path, predict.main, words)
    assert "--image_size PIXELS says of how many pixels a side" in error
    rows = predicted(run, photos, "--image_size", "8", out=tmp_path / "rows.csv")
    assert {row["class"] for row in rows} <= set("0123")
    assert_rows(rows, run)


def test_the_run_of_a_net_of_ones_own(tiny_npz, photos, tmp_path, capsys):
    (tmp_path / "mynet.py").write_text(LINEAR)
    net = ["--model", f"{tmp_path}/mynet.py:tiny"]
    train_teacher.main([*command(tiny_npz, tmp_path / "runs"), "--epochs", "1", *net])
    run = next(tmp_path.rglob("result.json")).parent
    out = ["--out", str(tmp_path / "rows.csv")]
    other = ["--model", f"{tmp_path}/other.py:tiny"]
    (tmp_path / "other.py").write_text(LINEAR + "\n")
    error = fails(capsys, tmp_path, predict.main, [str(run), str(photos), *out, *other])
    assert "its net is mynet.tiny of a file whose SHA-256 begins with" in error
    rows = predicted(run, photos, *net, out=tmp_path / "rows.csv")
    assert_rows(rows, run)

    file = tmp_path / "net.safetensors"
    words = [str(run), "--format", "safetensors", "--out", str(file), *net]
    card = tmp_path / "card.md"
    export.main([*words, "--dataset", str(tiny_npz), "--card", str(card)])
    # The commands on the card are those that work.
    use = f"`python -m scripts.predict {file} photos/ --model FILE.py:tiny`"
    assert use in card.read_text()
    assert f"`--teacher FILE.py:tiny --teacher_path {file}`" in card.read_text()
    teach = ["--teacher", net[1], "--teacher_path", str(file), "--epochs", "1"]
    train_student.main([*command(tiny_npz, tmp_path / "students"), *teach])
    error = fails(capsys, tmp_path, predict.main, [str(file), str(photos), *out, *other])
    assert f"{file}: its net is mynet.tiny of a file whose SHA-256 begins with" in error
    assert_rows(predicted(file, photos, *net, out=tmp_path / "rows.csv"), run)


BAD = """
run absent.png --out f | IMAGES absent.png: no such file or folder
run empty --out f | IMAGES: no image among them; not read: 1 \\*.txt.*; name image files, folders
run void --out f | IMAGES: no image among them; the folders are empty; name image files, folders
run text.npz --out f | IMAGES text.npz: no images in it
run floats.npy --out f | IMAGES floats.npy.*is float64; images are grey levels from 0 to 255
run other.npz --out f | IMAGES other.npz.*it has a, b
run photos --out nowhere/f | --out nowhere/f: its folder is not there
run photos --out /dev/null | --out /dev/null: this is no regular file
run photos --out photos | --out photos.*give a file
run images.npy --out images.npy | --out images.npy: would write over what is read
run images.npy --out link.npy | --out link.npy: would write over what is read
run photos --out photos/0/../0/01.png | --out photos/0/../0/01.png: would write over .*01.png
run photos --out run/predictions.npz | --out run/predictions.npz: would write over what is read
run photos --out run/result.json | --out run/result.json: would write over what is read
net.safetensors images.npy --out net.safetensors | --out net.safetensors: would write over what
run photos --level 1 | --level.*a number between 0 and 1
run photos --image_size 9 --out f | --image_size 9: run was trained on images of 8 x 8 pixels
run photos --model resnet8 | --model.*'resnet8' is no FILE.py:function
text.npz photos --out f | text.npz: no ONNX or safetensors file of python -m scripts.export
bare.safetensors photos --out f | bare.safetensors: no ONNX or safetensors file of python -m
run/model_best.pth photos --out f | model_best.pth: holds weights or .* not read here; give a run
text.npz photos --epoch best | --epoch has no effect with text.npz
nothing photos --out f | nothing: it is not there; name a run folder or an exported net
unfinished photos --out f | unfinished.*no finished run.*train it first
. photos --out f | 2 finished runs lie there; name one
run | IMAGES
"""


def test_mistakes(run, photos, tiny_npz, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "photos")
    for copy in ("unfinished", "another"):
        shutil.copytree(run, copy)
    Path("unfinished/result.json").unlink()
    Path("empty").mkdir()
    Path("void").mkdir()
    Path("empty/a.txt").write_text("text")
    Path("text.npz").write_text("text")
    save_file({"weight": torch.zeros(2)}, "bare.safetensors")
    np.save("images.npy", np.zeros((2, 8, 8, 3), np.uint8))
    Path("link.npy").symlink_to("images.npy")
    words = ["run", "--format", "safetensors", "--out", "net.safetensors"]
    export.main([*words, "--dataset", str(tiny_npz)])
    np.save("floats.npy", np.zeros((2, 8, 8, 3)))
    np.savez("other.npz", a=np.zeros(2), b=np.zeros(2))
    for line in BAD.strip().splitlines():
        words, said = line.split(" | ")
        assert re.search(said, fails(capsys, tmp_path, predict.main, words.split())), line


def test_a_table_is_written_again(run, photos, tmp_path):
    """Beside the images, and in the run folder: nothing reads it."""
    mixed = Path(shutil.copytree(photos, tmp_path / "mixed"))
    for out in (mixed / "rows.csv", run / "rows.csv"):
        first = predicted(run, mixed, out=out)
        assert predicted(run, mixed, out=out) == first


def test_a_wrong_size_for_a_run_that_does_not_say_it(tmp_path, tiny_npz, photos, capsys):
    """A net that takes one size alone."""
    root = tmp_path / "runs"
    (tmp_path / "mynet.py").write_text(LINEAR)
    net = ["--model", f"{tmp_path}/mynet.py:tiny"]
    train_teacher.main([*command(tiny_npz, root), "--epochs", "1", *net])
    run = next(root.rglob("result.json")).parent
    config = json.loads((run / "config.json").read_text())
    del config["image_side"]
    write_json(run / "config.json", config)
    words = [str(run), str(photos), *net, "--image_size", "9", "--out", str(tmp_path / "f")]
    error = fails(capsys, tmp_path, predict.main, words)
    assert "its net cannot take images of 9 x 9 pixels" in error and "--image_size" in error


def test_as_a_script(finished, photos, tmp_path):
    done = run_script("scripts/predict.py", finished, photos / "0" / "00.png", cwd=tmp_path)
    assert "00.png" in done.stdout and "UserWarning" not in done.stderr
    assert list(tmp_path.iterdir()) == []
