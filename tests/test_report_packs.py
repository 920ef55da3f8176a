"""--pack: a report comes again from it, and nothing is lost for it."""

import io
import json
import zipfile

import numpy as np
import pytest
from conftest import fails
from written_runs import (
    CLASSES,
    divided,
    identity,
    with_logits,
    write_posthoc,
    write_predicted_run,
)

from scripts import report
from utils.analysis.records import read_runs


def test_a_report_comes_again_from_its_pack(tmp_path, capsys):
    trained = json.loads(
        (write_predicted_run(tmp_path / "runs", model="resnet56") / "result.json").read_text()
    )["best"]
    write_posthoc(
        write_predicted_run(
            tmp_path / "runs", loss="KD", teacher=identity("foreign", "best", None, "abc")
        )
    )
    write_predicted_run(tmp_path / "runs", loss="DKD", teacher=trained | identity())
    write_predicted_run(tmp_path / "runs", loss="DIST", teacher=trained | divided("auto"))
    write_predicted_run(tmp_path / "runs", loss="LSKD", teacher=divided(2))
    options = ["--columns", "top1", "nll", "--out", str(tmp_path / "out"), "--resamples", "50"]
    pages = []
    for root in ("runs", "runs.zip"):
        pack = ["--pack", str(tmp_path / "runs.zip")] if root == "runs" else []
        report.main([str(tmp_path / root), *options, *pack])
        table = capsys.readouterr().out.split("written")[0]
        pages.append((table, (tmp_path / "out/report.html").read_text().count("<img")))
    assert pages[0] == pages[1] and "vector" in pages[0][0]
    with zipfile.ZipFile(tmp_path / "runs.zip") as archive:
        packed = {
            name: set(np.load(io.BytesIO(archive.read(name)))) & {"teacher_test_logits"}
            for name in archive.namelist()
            if name.endswith(".npz")
        }
    # A teacher's logits are there once: in its own run, or where it has none, or one that measured
    # something else, with its student.
    assert [name.split("/")[-2][:4] for name, of in packed.items() if of] == ["KD_f", "LSKD"]
    for student in (one for one in read_runs([tmp_path / "runs.zip"], "best")[0] if one.taught_by):
        assert student.taught_by.stored("test")[0].shape == (2000, CLASSES)


def test_a_pack_takes_the_place_of_no_other_file(tmp_path, capsys):
    """Neither of a picture, nor of what is a .zip file inside: arrays, a text document."""
    write_predicted_run(tmp_path / "runs")
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"no pack")
    data = tmp_path / "data.npz"
    np.savez(data, images=np.zeros(3))
    for file in (photo, data):
        before = file.read_bytes()
        argv = [str(tmp_path / "runs"), "--pack", str(file)]
        message = fails(capsys, tmp_path, report.main, argv)
        assert "--pack" in message and "no pack" in message and file.read_bytes() == before
    for _ in range(2):  # an older pack is written anew
        report.main([str(tmp_path / "runs"), "--pack", str(tmp_path / "runs.zip")])
    assert "half precision" in capsys.readouterr().out


@pytest.mark.parametrize("offset, scale", [(3e3, 1), (7e4, 1), (-7e4, 1), (0, 1e4), (7e4, 1e5)])
def test_a_pack_keeps_probabilities_whatever_the_size_of_the_logits(tmp_path, offset, scale):
    folder = write_predicted_run(tmp_path / "runs")
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(2000, CLASSES)) + offset).astype(np.float32)
    with_logits(folder, logits)
    report.main([str(tmp_path / "runs"), "--resamples", "0", "--pack", str(tmp_path / "p.zip")])
    [packed], [] = read_runs([tmp_path / "p.zip"], "best")
    with np.load(folder / "predictions.npz") as stored:
        labels = stored["test_labels"]
    for kind, temperature in (("raw", 1.0), ("scaled", 1.5)):
        values = logits.astype(np.float64) / temperature
        shares = np.exp(values - values.max(1, keepdims=True))
        found, theirs = packed.probabilities(kind)
        np.testing.assert_allclose(found, shares / shares.sum(1, keepdims=True), atol=1e-3)
        assert np.array_equal(theirs, labels)


def test_a_teacher_that_rules_classes_out_is_read_and_packed(tmp_path, capsys):
    teacher = identity("foreign", "best", None, "abc")
    folder = write_predicted_run(tmp_path / "runs", loss="KD", teacher=teacher)
    with np.load(folder / "predictions.npz") as stored:
        arrays = dict(stored)
    arrays["teacher_test_logits"][:, 2] = -np.inf
    np.savez(folder / "predictions.npz", **arrays)
    pack = ["--resamples", "20", "--pack", str(tmp_path / "runs.zip")]
    report.main([str(tmp_path / "runs"), *pack])
    assert "Not in the tables" not in capsys.readouterr().out
    for root in ("runs", "runs.zip"):
        [student], [] = read_runs([tmp_path / root], "best")
        probabilities, _ = student.taught_by.probabilities("raw")
        assert not probabilities[:, 2].any() and probabilities.isfinite().all()
