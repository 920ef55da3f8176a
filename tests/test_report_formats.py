"""A report as CSV, LaTeX, Markdown and a page that Chromium renders."""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from written_runs import (
    identity,
    measured,
    write_predicted_run,
    write_run,
)

from scripts import report
from utils.analysis.rendering import Table, TableCell, latex_text, render


def test_a_table_in_every_format():
    rows = [
        [TableCell("a", indent=1), TableCell("1.00 ± 0.10", "best")],
        [TableCell("b"), TableCell("2.00")],
    ]
    table = Table(["net", "ECE %"], rows)
    shown = ["net      ECE %", "---  ----------", "  a  1.00±0.10*", "b         2.00"]
    assert render(table, "terminal").splitlines()[:4] == shown

    nasty = [[TableCell(r"a|b*c_d<e>\f`g`"), TableCell("~50%&#$^{}", "close")]]
    table = Table(["x", "y"], nasty)
    assert r"a\|b\*c\_d\<e\>\\f\`g\`" in render(table, "markdown")
    latex = render(table, "latex")
    assert r"a$|$b*c\_d$<$e$>$\textbackslash{}f`g`" in latex
    assert r"\textasciitilde{}50\%\&\#\$\textasciicircum{}\{\}" in latex


# Maps of five metrics; scatter and curves of two data sets; reliability of teacher, student, other.
PICTURES = 5 + 2 * 2 + 3
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{1&amp;'


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A report with a sweep, several seeds, curves, and names that try to be markup."""
    folder = tmp_path_factory.mktemp("written")
    runs = folder / "runs"
    for seed in (1, 2):
        top1 = measured(test={"top1": 0.86 + seed / 25, "true_kl": 0.25})
        write_run(runs, seed=seed, model="resnet20", best=top1)
        folder = write_predicted_run(runs, seed=seed, model="resnet56")
        trained = json.loads((folder / "result.json").read_text())["best"]
        for temperature, weight in product((1, 4), (0.9, 1)):
            knobs = {"T": temperature, "Lambda": weight}
            options = {"seed": seed, "teacher": trained | identity(seed=seed)}
            write_predicted_run(runs, loss="KD", parameters=knobs, **options)
    # A folder's name cannot hold a slash, but what a file says can be anything.
    hostile = write_predicted_run(runs / "<b>bold", command=HOSTILE)
    for name in ("result.json", "config.json"):
        content = json.loads((hostile / name).read_text())
        content |= {"model": HOSTILE, "loss": HOSTILE, "dataset": "a_b & 50%" + HOSTILE}
        content |= {"arguments": {"exp_name": HOSTILE}, "label": HOSTILE}
        (hostile / name).write_text(json.dumps(content))
    stopped = write_run(runs, seed=9)
    (stopped / "result.json").unlink()
    (stopped / "train_log.txt").write_text(HOSTILE)
    report.main([str(runs), "--out", str(folder / "out"), "--resamples", "50"])
    return folder / "out"


def test_csv_has_every_digit_and_every_metric(written):
    names = {f"report.{kind}" for kind in ("html", "md", "csv", "tex")}
    assert {path.name for path in written.iterdir()} == names | {"runs.csv"}
    with open(written / "report.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 1 + 4 + 1)
    [row] = [one for one in rows if one["net"] == "resnet20 NLL" and one["logits"] == "raw"]
    assert float(row["top-1 %"]) == pytest.approx(92)
    assert float(row["top-1 % sd"]) == pytest.approx(100 * np.std([0.9, 0.94], ddof=1))
    assert (row["n"], row["seeds"], row["dataset"]) == ("2", "1 2", "toy")
    assert float(row["true KL"]) == 0.25 and "Brier sd" in row
    students = [one for one in rows if one["teacher"] == "resnet56 NLL"]
    assert len(students) == 8 and sum(one["chosen"] == "yes" for one in students) == 2
    [row] = [one for one in rows if one["dataset"] != "toy" and one["logits"] == "scaled"]
    assert float(row["ECE % low"]) <= float(row["ECE %"]) <= float(row["ECE % high"])
    with open(written / "runs.csv") as file:
        runs = list(csv.DictReader(file))
    raw = [one for one in runs if one["net"] == "resnet20 NLL" and one["logits"] == "raw"]
    assert [(one["seeds"], float(one["top-1 %"])) for one in raw] == [("1", 90), ("2", 94)]
    assert len({one["folder"] for one in raw}) == 2 and {one["T"] for one in raw} == {""}
    for one in runs:
        result = json.loads((Path(one["folder"]) / "result.json").read_text())
        if one["logits"] == "scaled" and one["epoch"]:
            temperature = result[one["epoch"]]["temperature"]
            assert float(one["T"]) == pytest.approx(temperature)
        elif one["logits"] == "raw" and one["epoch"]:
            nll = result[one["epoch"]]["val"]["nll"]
            assert float(one["validation NLL"]) == pytest.approx(nll)


def test_latex_is_whole_tables(written):
    text = (written / "report.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert latex_text("– of --T") == "-- of -{}-T"
    labels = re.findall(r"\\label{tab:([a-z0-9-]+)}", text)
    assert len(set(labels)) == 2
    for table in re.findall(r"\\begin{tabular}.*?\\end{tabular}", text, re.DOTALL):
        columns = len(re.search(r"{(lr+)}", table)[1])
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert r"a\_b \& 50\%" in text
    assert r"92.00 $\pm$ 2.83" in text and r"\quad resnet8 KD T=1" in text
    assert not re.search(r"(?<!\\)%", text)  # it would comment out the rest of its line
    text.encode("ascii")


def test_markdown_reads_back(written):
    text = (written / "report.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3  # two data sets, the unfinished run
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "**92.00 ± 2.83**" in text


def test_the_page_fetches_nothing_and_names_are_text(written):
    page = (written / "report.html").read_text()
    assert HOSTILE not in page and page.count(html.escape(HOSTILE)) >= 4
    assert "<script" not in page and "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert "url(" not in page and "@import" not in page
    assert all(text.startswith("data:") for text in re.findall(r'(?:src|href)="([^"]*)"', page))
    for tag in ("table", "tr", "td", "div", "figure", "ul", "li", "details"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>") > 0
    assert page.count("python train_teacher.py") == 12  # the command of every run
    pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(pictures) == PICTURES
    for picture in pictures:
        text = base64.b64decode(picture).decode()
        assert text.rstrip().endswith("</svg>") and "<script" not in text


PROBE = """
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, pictures = [...page.images];
  document.body.dataset.seen = JSON.stringify({
    inner: frame.contentWindow.innerWidth,
    content: page.documentElement.scrollWidth,
    pictures: pictures.length,
    broken: pictures.filter((one) => !one.naturalWidth).length,
  });
});
"""


def test_chromium_renders_it(written, tmp_path):
    """No console message, no broken picture, nothing wider than a narrow page.

    It stands in a frame, for a window is never so narrow.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    wrapper, page = tmp_path / "frame.html", (written / "report.html").read_text()
    wrapper.write_text(
        '<!DOCTYPE html><iframe style="border:0" width="360" height="3000" '
        f'srcdoc="{html.escape(page)}"></iframe><script>{PROBE}</script>'
    )
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [chromium, "--headless", "--no-sandbox", "--no-first-run", "--window-size=1400,1000"]
    command += [f"--disable-{part}" for part in off]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, wrapper.as_uri()], capture_output=True, timeout=120)
    found = re.search(r'data-seen="([^"]*)"', done.stdout.decode())
    assert found, done.stderr.decode()[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["pictures"] == PICTURES and seen["broken"] == 0
    assert seen["inner"] == 360 and seen["content"] <= 360
    assert b"CONSOLE" not in done.stderr
