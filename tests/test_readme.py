"""README's examples for those who add a loss or a net work as they stand there; results repeat."""

import json
import re
import shlex
import shutil

from conftest import ROOT, run_script

from scripts import report

IMPORTS = {
    "mae": "from losses.classification import mae\n",
    "plain": "from models.plain import plain\n",
}
HEAD = re.compile(r"^# (\S+\.py)(?:, in (\w+).*)?\n", re.MULTILINE)


def add(root, file: str, registry: str | None, code: str) -> None:
    """Put a registry's line, with the import it needs, into the registry; other code behind all."""
    path = root / file
    text = path.read_text() if path.exists() else ""
    if registry:
        place = re.search(rf"^{registry}\b.*{{.*\n", text, re.MULTILINE)
        name = re.search(r"Entry\((\w+)", code)[1]
        text = text[: place.start()] + IMPORTS[name] + place[0] + code + text[place.end() :]
        path.write_text(text)
    else:
        path.write_text(f"{text}\n\n{code}")


def test_the_examples(tmp_path, tiny_npz):
    """Trained with, taught with, evaluated and reported."""
    for part in ("losses", "models", "utils", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for script in ("train_teacher.py", "train_student.py"):
        shutil.copy(ROOT / script, tmp_path)
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    files = []
    for block in blocks:
        _, *parts = HEAD.split(block)
        for file, registry, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            add(tmp_path, file, registry, code)
            files.append(file)
            assert len(code.strip().splitlines()) < 10
    assert len(files) == 4

    def run(*words) -> str:
        return run_script("python", *words, cwd=tmp_path, PYTHONPATH=str(tmp_path)).stdout

    shared = f"--dataset {tiny_npz} --model plain --epochs 1 --train-batch-size 64".split()
    run("train_teacher.py", *shared, "--loss", "MAE+MDCA", "--scale", "2")
    teacher = "checkpoint/tiny/plain/MAE+MDCA_scale=2_beta=1_seed=42"
    run("train_student.py", *shared, "--teacher_path", teacher)
    student = f"checkpoint/tiny/plain/KD_T=4_Lambda=0.9_from_plain_{teacher.split('/')[-1]}"
    result = json.loads((tmp_path / student / "result.json").read_text())
    assert result["teacher"]["model"] == "plain"
    run("-m", "scripts.evaluate", student, "--with-teacher", "--on", str(tiny_npz))
    assert "plain MAE+MDCA scale=2 beta=1" in run("-m", "scripts.report", "checkpoint")


def test_the_published_tables_come_from_the_published_logits(tmp_path, monkeypatch):
    """docs/results.md says by which command."""
    text = (ROOT / "docs/results.md").read_text()
    line = re.search(
        r"^python -m (scripts.report docs/results/\S+\.zip .*?[^\\])\n", text, re.M | re.S
    )
    monkeypatch.chdir(ROOT)
    _, *flags = shlex.split(line[1].replace("\\\n", " "))
    report.main([*flags, "--out", str(tmp_path)])
    tables = [line for line in (tmp_path / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert len(tables) > 20 and not set(tables) - set(text.splitlines())
