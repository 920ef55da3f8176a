"""Examples of what can be added work as the docs have them; links lead somewhere; tables repeat."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_script
from scipy.special import softmax

from docs.results import cifar100_tables, temperatures
from scripts import report

IMPORTS = {
    "mae": "from losses.classification import mae\n",
    "squared_error": "from losses.distillation import squared_error\n",
    "plain": "from models.plain import plain\n",
}
# Where an example goes: the end of a file, above a registry, or behind the brace that opens one.
HEAD = re.compile(r"^# (\S+\.py)(?:, (in|above) (\w+).*)?\n", re.MULTILINE)
OPENS = r"^(?:{0}\b[^\n]* = |def {0}\b.*?){{(?:  #[^\n]*)?\n"


def add(root, file: str, where: str | None, name: str | None, code: str) -> None:
    """Put an example where its first line says, with the import that a registry's entry needs."""
    path = root / file
    text = path.read_text() if path.exists() else ""
    if where is None:
        path.write_text(f"{text}\n\n{code}")
        return

    place = re.search(OPENS.format(name), text, re.MULTILINE | re.DOTALL)
    if where == "above":
        path.write_text(f"{text[: place.start()]}{code}\n\n{text[place.start() :]}")
        return

    entry = re.search(r"Entry\((\w+)", code)
    needed = IMPORTS.get(entry[1], "") if entry else ""
    path.write_text(
        f"{text[: place.start()]}{needed}{place[0]}{code.rstrip()}\n{text[place.end() :]}"
    )


@pytest.mark.long
def test_the_examples(tmp_path, tiny_npz):
    """Trained with, taught with, evaluated and reported."""
    for part in ("losses", "models", "utils", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for script in ("train_teacher.py", "train_student.py"):
        shutil.copy(ROOT / script, tmp_path)
    page = (ROOT / "docs/extending.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    files = []
    for block in blocks:
        _, *parts = HEAD.split(block)
        for file, where, name, code in zip(*(parts[i::4] for i in range(4)), strict=True):
            add(tmp_path, file, where, name, code)
            files.append(file)
            assert len(code.strip().splitlines()) < 10
    assert len(files) == 10

    def run(*words) -> str:
        return run_script("python", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout

    shared = f"--dataset {tiny_npz} --model plain --epochs 1 --train-batch-size 64".split()
    run("train_teacher.py", *shared, "--loss", "MAE+MDCA", "--scale", "2")
    teacher = "checkpoint/tiny/plain/MAE+MDCA_scale=2_beta=1_seed=42"
    adam = ["--optimizer", "adam", "--lr", "0.001"]
    run("train_student.py", *shared, *adam, "--distill", "MSE", "--teacher_path", teacher)
    (student,) = (tmp_path / "checkpoint/tiny/plain").glob("MSE_*")
    result = json.loads((student / "result.json").read_text())
    assert result["teacher"]["model"] == "plain"
    assert result["settings"]["optimizer"] == "adam"

    predictions = np.load(student / "predictions.npz")
    logits = predictions["best_test_logits"].astype(float)
    probabilities = softmax(logits, axis=1)
    right = logits.argmax(axis=1) == predictions["test_labels"]
    gap = abs(probabilities.max(axis=1).mean() - right.mean())
    assert result["best"]["test"]["raw"]["confidence_gap"] == pytest.approx(gap, abs=1e-9)

    run("-m", "scripts.evaluate", student, "--with-teacher", "--on", str(tiny_npz))
    columns = ["--columns", "top1", "confidence_gap"]
    table = run("-m", "scripts.report", "checkpoint", *columns)
    assert "plain MAE+MDCA scale=2 beta=1" in table and "confidence gap %" in table


def test_every_file_and_section_that_a_page_points_to_is_there():
    """Links of README and docs; a section's anchor is its heading as GitHub writes it."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            file, _, section = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name}: {target}"
            if section:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert section in anchors, f"{page.name}: {target}"


@pytest.mark.long
@pytest.mark.parametrize("pages", [("cifar10.md", "cifar10_more.md"), ("cifar10_whole.md",)])
def test_the_published_tables_come_from_the_published_logits(pages, tmp_path, monkeypatch):
    """The first page says by which command."""
    text, *others = [(ROOT / "docs/results" / page).read_text() for page in pages]
    shown = set("\n".join([text, *others]).splitlines())
    line = re.search(
        r"^python -m (scripts.report docs/results/\S+\.zip .*?[^\\])\n", text, re.M | re.S
    )
    monkeypatch.chdir(ROOT)
    _, *flags = shlex.split(line[1].replace("\\\n", " "))
    report.main([*flags, "--out", str(tmp_path)])
    tables = [line for line in (tmp_path / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert len(tables) > 20 and not set(tables) - shown


def test_the_tables_of_cifar100_come_from_its_csv():
    runs = cifar100_tables.read_runs()
    page = (ROOT / "docs/results/cifar100.md").read_text()
    for table in cifar100_tables.tables_of_page(runs):
        assert table in page
    assert cifar100_tables.table_of_readme(runs) in (ROOT / "README.md").read_text()


def test_the_table_of_temperatures_comes_from_its_csv():
    table = temperatures.table(temperatures.read_pairs())
    assert table in (ROOT / "docs/results.md").read_text()
