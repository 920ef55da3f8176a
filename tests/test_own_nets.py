"""Nets of the user's own, FILE.py:function: trained, teaching, evaluated; what is refused."""

import hashlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, fails, folder_of, run_script, weights

import train_student
import train_teacher
from models import build_model, check_name
from models.own import NAMED
from scripts import cache_teacher, evaluate, export, posthoc, report
from utils.program import UserError
from utils.program.files import write_json

NET = '''
import torch
from torch import nn

class Tiny(nn.Module):
    """No chain of parts: its forward pass is its own."""

    def __init__(self, num_classes, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(2 * channels, num_classes)

    def forward(self, images):
        maps = self.norm(self.stem(images)).relu()
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))

def tiny(num_classes):
    return Tiny(num_classes)
'''
NAME = "tiny/mynet.tiny/NLL_seed=42"


@pytest.fixture(autouse=True)
def nothing_is_named(monkeypatch):
    """Each test is a program of its own."""
    for name in list(NAMED):
        monkeypatch.delitem(NAMED, name)
    yield
    NAMED.clear()


def line(data: Path, root: Path, net: str, *flags) -> list[str]:
    """A run of one epoch; argparse takes the last --model."""
    return [*command(data, root), "--epochs", "1", "--model", net, *map(str, flags)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_npz) -> Path:
    """The root of a finished run of one epoch, and mynet.py, the file of its net, in it."""
    root = tmp_path_factory.mktemp("own")
    (root / "mynet.py").write_text(NET)
    train_teacher.main(line(tiny_npz, root, f"{root}/mynet.py:tiny"))
    NAMED.clear()
    return root


@pytest.fixture
def root(finished, tmp_path) -> Path:
    """A copy, which a test may change; its net is no longer named."""
    NAMED.clear()
    return Path(shutil.copytree(finished, tmp_path / "root"))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_says_which_code_made_its_net(finished):
    run = finished / NAME
    result = json.loads((run / "result.json").read_text())
    assert result["model"] == "mynet.tiny"
    sha256 = digest(finished / "mynet.py")
    assert result["model_sha256"] == result["settings"]["model_sha256"] == sha256
    assert result["settings"]["model"] == "mynet.tiny"
    assert digest(run / "net.py") == sha256
    assert weights(run)["head.weight"].shape == (4, 16)
    saved = torch.load(run / "model_best.pth")
    assert (saved["model"], saved["model_sha256"]) == ("mynet.tiny", sha256)


def test_a_net_of_the_zoo_says_nothing_new(teacher):
    result = json.loads((teacher / "result.json").read_text())
    assert "model_sha256" not in {**result, **result["settings"]}
    assert not (teacher / "net.py").exists()


def test_the_file_may_lie_elsewhere_and_its_code_must_be_the_same(root, tiny_npz, tmp_path, capsys):
    moved = shutil.move(root / "mynet.py", tmp_path / "mynet.py")
    capsys.readouterr()
    train_teacher.main(line(tiny_npz, root, f"{moved}:tiny"))
    assert "shown, not trained" in capsys.readouterr().out
    before = digest(moved)
    moved.write_text(NET + "# changed\n")
    for result in (root / NAME / "result.json", None):
        if result is None:  # and of an unfinished run
            (root / NAME / "result.json").unlink()
        error = fails(capsys, tmp_path, train_teacher.main, line(tiny_npz, root, f"{moved}:tiny"))
        assert f"model_sha256 was {before} and is {digest(moved)}" in error
    # A new run keeps the new file.
    train_teacher.main(line(tiny_npz, root, f"{moved}:tiny", "--overwrite"))
    assert digest(root / NAME / "net.py") == digest(moved)


def test_a_run_goes_on(finished, root, tiny_npz, forks):
    """Killed after its first of two epochs, it ends with the weights of an undisturbed one."""
    whole, killed = root / "whole", root / "killed"
    net = f"{root}/mynet.py:tiny"
    train_teacher.main(line(tiny_npz, whole, net, "--epochs", "2"))
    words = line(tiny_npz, killed, net, "--epochs", "2")
    # The files of a run: net.py and config.json, then three of the first epoch.
    child = forks.run(["train_teacher.py", *words], hook=["at_rename", 5, "after", "send", 9])
    assert child.code != 0 and not (killed / NAME / "result.json").exists()
    train_teacher.main(words)
    assert "going on after epoch 1" in (killed / NAME / "train_log.txt").read_text()
    first, second = weights(folder_of(whole)), weights(folder_of(killed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_code_is_that_which_was_named(tiny_npz, tmp_path, monkeypatch):
    """Its user goes on editing while the data are read."""
    file = tmp_path / "mynet.py"
    file.write_text(NET)
    load = train_teacher.load_data

    def edit_and_load(*arguments):
        file.write_text(NET.replace("channels=8", "channels=9"))
        return load(*arguments)

    monkeypatch.setattr(train_teacher, "load_data", edit_and_load)
    train_teacher.main(line(tiny_npz, tmp_path, f"{file}:tiny"))
    run = tmp_path / NAME
    assert weights(run)["head.weight"].shape == (4, 16)
    assert (run / "net.py").read_text() == NET
    result = json.loads((run / "result.json").read_text())
    assert result["model_sha256"] == hashlib.sha256(NET.encode()).hexdigest()


def test_a_class_and_a_file_beside_which_nothing_is_left(tiny_npz, tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my net.v2.py").write_text(NET)
    train_teacher.main(line(tiny_npz, tmp_path, f"{folder}/my net.v2.py:Tiny"))
    assert (tmp_path / "tiny/my-net-v2.Tiny/NLL_seed=42/result.json").exists()
    assert [path.name for path in folder.iterdir()] == ["my net.v2.py"]


def test_the_example(tmp_path):
    """That of docs/nets.md is such a net."""
    text = (ROOT / "docs/nets.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "mynet.py").write_text(example)
    net = build_model(check_name(f"{tmp_path}/mynet.py:tiny"), 7)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


# what is refused


MISTAKES = [
    ("absent.py:tiny", None, "absent.py cannot be read .No such file.*check the path"),
    ("x.py:other", NET, "x.py has no other; it has Tiny, tiny"),
    ("x.py:nn", NET, "nn of x.py is a module and no function"),
    ("x.py:tiny", "import nothing_like_this\n", "line 1, ModuleNotFoundError: No module named"),
    ("x.py:tiny", "\n\ndef tiny(:\n", "cannot be imported: line 3, SyntaxError"),
    ("x.py:tiny", "import sys\nsys.exit(3)\n", "line 2, SystemExit: 3"),
    ("x.py:tiny", "def tiny(): ...\n", r"write def tiny\(num_classes\)"),
    ("x.py:tiny", "def tiny(num_classes, width): ...\n", r"write def tiny\(num_classes\)"),
    ("x.py:tiny", "def tiny(num_classes):\n    1 / 0\n", "fails: line 2, ZeroDivisionError"),
    ("x.py:tiny", "def tiny(num_classes):\n    return 7\n", "gives a int and no torch.nn.Module"),
    ("x.py:tiny", NET + "tiny = lambda num_classes: Tiny(7)\n", r"its outputs are \(2, 7\) where"),
    (
        "x.py:tiny",
        NET + "tiny = lambda num_classes: nn.LazyLinear(num_classes)\n",
        "has lazy layers",
    ),
    ("x.py", NET, "unknown model 'x.py'.*FILE.py:function a net of your own"),
    ("x.py:", NET, "unknown model 'x.py:'"),
    ("x.py:a.b", NET, "unknown model"),
    ("resnet9", None, "FILE.py:function a net of your own"),
]


@pytest.mark.parametrize("name, content, said", MISTAKES)
def test_mistakes(tiny_npz, tmp_path, capsys, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("x.py").write_text(content)
    Path("net.pth").touch()
    error = fails(capsys, tmp_path, train_teacher.main, line(tiny_npz, tmp_path, name))
    assert re.search(f"--model.*{said}", error), error


def test_no_code_runs_that_was_not_named(root, tiny_npz, tmp_path, capsys):
    """Whatever a run says of its net: a name that is a file, a hash, a teacher's file."""
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n{NET}")
    run = root / NAME
    with pytest.raises(ValueError, match="not named on the command line"):
        build_model(f"{evil}:tiny", 4)
    saved = torch.load(run / "model_best.pth")
    for changes in ({"model": f"{evil}:tiny"}, {"model_sha256": digest(evil)}):
        torch.save(saved | changes, run / "model_best.pth")
        result = json.loads((run / "result.json").read_text())
        write_json(run / "result.json", result | changes)
        taught = line(tiny_npz, tmp_path / "students", "resnet8", "--teacher_path", run)
        assert "error" in fails(capsys, tmp_path, train_student.main, taught)
        corrupted = [str(run), "--on", "corruptions", "--corruptions", "contrast"]
        assert "error" in fails(capsys, tmp_path, evaluate.main, corrupted)
        exported = [str(run), "--format", "safetensors", "--out", str(tmp_path / "file")]
        assert "error" in fails(capsys, tmp_path, export.main, exported)
    assert not (tmp_path / "trace").exists()


# teaching


@pytest.fixture(scope="module")
def student(finished, tiny_npz) -> Path:
    """The folder of a student, of the zoo, of the run of `finished`."""
    net = f"{finished}/mynet.py:tiny"
    flags = ("--teacher", net, "--teacher_path", finished / NAME)
    root = finished.parent / f"{finished.name}_students"
    train_student.main(line(tiny_npz, root, "resnet8", *flags))
    NAMED.clear()
    return folder_of(root)


def test_a_student_of_a_run(finished, student):
    result = json.loads((student / "result.json").read_text())
    taught = json.loads((finished / NAME / "result.json").read_text())
    assert result["teacher"]["model_sha256"] == digest(finished / "mynet.py")
    assert result["settings"]["teacher"]["model_sha256"] == digest(finished / "mynet.py")
    assert result["teacher"]["test"]["raw"]["nll"] == pytest.approx(
        taught["best"]["test"]["raw"]["nll"], rel=1e-5
    )
    assert student.name == "KD_T=4_Lambda=0.9_from_mynet.tiny_NLL_seed=42"
    assert "model_sha256" not in result  # of its own net, which is the zoo's


def test_a_teachers_file_is_named_again(root, tiny_npz, tmp_path, capsys):
    run = root / NAME
    taught = line(tiny_npz, tmp_path / "students", "resnet8", "--teacher_path", run)
    error = fails(capsys, tmp_path, train_student.main, taught)
    assert "no run makes code run; name that file with --teacher FILE.py:tiny" in error
    for wrong in ("resnet8", f"{root}/mynet.py:Tiny"):
        error = fails(capsys, tmp_path, train_student.main, [*taught, "--teacher", wrong])
        assert f"and not {wrong}" in error
    (root / "mynet.py").write_text(NET + "# changed\n")
    error = fails(
        capsys, tmp_path, train_student.main, [*taught, "--teacher", f"{root}/mynet.py:tiny"]
    )
    assert f"begins with {digest(run / 'net.py')[:12]}, and not {root}/mynet.py:tiny" in error
    # The copy will do, and --model names it as well.
    train_student.main([*taught, "--teacher", f"{run}/net.py:tiny"])
    assert json.loads((folder_of(tmp_path / "students") / "result.json").read_text())
    NAMED.clear()
    own = line(tiny_npz, tmp_path / "own", f"{run}/net.py:tiny", "--teacher_path", run)
    train_student.main(own)
    assert (tmp_path / "own/tiny/net.tiny").is_dir()


def test_a_file_of_weights(root, tiny_npz, tmp_path, capsys):
    """Under the names of the own net, with a prefix that all of them share, and no others."""
    state = weights(root / NAME, "best")
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "theirs.pth")
    net = f"{root}/mynet.py:tiny"
    flags = ("--teacher", net, "--teacher_path", tmp_path / "theirs.pth")
    train_student.main(line(tiny_npz, tmp_path / "students", "resnet8", *flags))
    run = folder_of(tmp_path / "students")
    teacher = json.loads((run / "result.json").read_text())["teacher"]
    own = json.loads((root / NAME / "result.json").read_text())["best"]
    assert (teacher["model"], teacher["seed"]) == ("mynet.tiny", None)
    assert teacher["test"]["raw"]["top1"] == own["test"]["raw"]["top1"]
    # A changed file is another teacher, though the weights still fit it.
    (root / "mynet.py").write_text(NET.replace("relu()", "abs()"))
    again = line(tiny_npz, tmp_path / "students", "resnet8", *flags)
    error = fails(capsys, tmp_path, train_student.main, again)
    assert "started with other settings" in error and digest(root / "mynet.py") in error
    renamed = {name.replace("head", "classifier"): value for name, value in state.items()}
    torch.save(renamed, tmp_path / "theirs.pth")
    error = fails(capsys, tmp_path, train_student.main, [*again, "--overwrite"])
    assert f"does not fit {net} of 4 classes: head.weight is absent" in error


def test_an_ensemble_and_a_cache(root, tiny_npz, tmp_path, capsys):
    """Of an own net and one of the zoo; another file of the same weights is kept apart."""
    zoo = line(tiny_npz, tmp_path / "zoo", "resnet8")
    train_teacher.main(zoo)
    paths = ("--teacher_path", root / NAME, folder_of(tmp_path / "zoo"))
    names = ("--teacher", f"{root}/mynet.py:tiny", "resnet8")
    one_name = line(tiny_npz, tmp_path / "students", "resnet8", *paths, *names[:2])
    error = fails(capsys, tmp_path, train_student.main, one_name)
    assert error.endswith("give one for each path, resnet8 for this\n")
    train_student.main(line(tiny_npz, tmp_path / "students", "resnet8", *paths, *names))
    result = json.loads((folder_of(tmp_path / "students") / "result.json").read_text())
    assert result["teacher"]["model"] == "mynet.tiny+resnet8"
    assert sum("model_sha256" in member for member in result["teacher"]["members"]) == 1

    torch.save(weights(root / NAME, "best"), tmp_path / "theirs.pth")
    for code in (NET, NET + "# changed\n"):
        (root / "mynet.py").write_text(code)
        cache_teacher.main(
            [
                *("--dataset", str(tiny_npz), "--teacher_path", str(tmp_path / "theirs.pth")),
                *("--teacher", f"{root}/mynet.py:tiny"),
                *("--teacher_cache", str(tmp_path / "cache")),
            ]
        )
    assert len(list((tmp_path / "cache/tiny").iterdir())) == 2


# finished runs


def test_evaluation_wants_the_file(root, student, tiny_npz, tmp_path, capsys):
    run, net = root / NAME, f"{root}/mynet.py:tiny"
    shifted = [str(run), "--on", str(tiny_npz), "--dataset", str(tiny_npz)]
    error = fails(capsys, tmp_path, evaluate.main, shifted)
    assert f"{run}: its net is mynet.tiny" in error and "--model FILE.py:tiny" in error
    evaluate.main([*shifted, "--model", net])
    assert "NLL_seed=42" in capsys.readouterr().out

    # A student's teacher, found where its command found it.
    both = [str(student), "--on", str(tiny_npz), "--dataset", str(tiny_npz), "--with-teacher"]
    NAMED.clear()
    assert "--model FILE.py:tiny" in fails(capsys, tmp_path, evaluate.main, both)
    evaluate.main([*both, "--model", f"{run}/net.py:tiny"])
    assert "teacher mynet.tiny" in capsys.readouterr().out

    # What has no effect.
    NAMED.clear()
    error = fails(capsys, tmp_path, evaluate.main, [*both[:-1], "--model", net])
    assert f"--model {net}: no net here was made by that file; leave it out" in error
    error = fails(capsys, tmp_path, evaluate.main, [*both, "--model", "resnet8"])
    assert "'resnet8' is no FILE.py:function" in error
    error = fails(capsys, tmp_path, evaluate.main, [str(run), "--on", "synthetic", "--model", net])
    assert "--model has no effect with --on synthetic" in error


def test_a_third_partys_own_net_is_found_again(root, tiny_npz, tmp_path, capsys):
    torch.save(weights(root / NAME, "best"), tmp_path / "theirs.pth")
    net = f"{root}/mynet.py:tiny"
    flags = ("--teacher", net, "--teacher_path", tmp_path / "theirs.pth")
    train_student.main(line(tiny_npz, tmp_path / "students", "resnet8", *flags))
    moved = shutil.move(root / "mynet.py", tmp_path / "renamed.py")
    NAMED.clear()
    shifted = [str(tmp_path / "students"), "--on", str(tiny_npz), "--with-teacher"]
    evaluate.main([*shifted, "--model", f"{moved}:tiny"])
    assert "teacher mynet.tiny" in capsys.readouterr().out


def test_an_export_wants_the_file_and_teaches_by_it(root, tiny_npz, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    words = [str(root / NAME), "--format", "safetensors", "--out", str(file)]
    assert "--model FILE.py:tiny" in fails(capsys, tmp_path, export.main, words)
    export.main([*words, "--model", f"{root}/mynet.py:tiny"])
    NAMED.clear()
    taught = line(tiny_npz, tmp_path / "students", "resnet8", "--teacher_path", file)
    assert "--teacher FILE.py:tiny" in fails(capsys, tmp_path, train_student.main, taught)
    train_student.main([*taught, "--teacher", f"{root}/mynet.py:tiny"])


def test_reports_need_no_file(root, student, capsys):
    """Stored logits will do."""
    (root / "mynet.py").unlink()
    report.main([str(root), str(student), "--resamples", "0"])
    assert "mynet.tiny NLL" in capsys.readouterr().out
    posthoc.main([str(root)])
    assert not NAMED


def test_a_sweep_finds_its_runs(tmp_path):
    """Their folders are called otherwise than the data and the net, which students name again."""
    (tmp_path / "my-net.v2.py").write_text(NET)
    names = {"TEACHERS": "my-net.v2.py:tiny", "STUDENTS": "resnet8", "ROOT": "runs"}
    script = ROOT / "scripts/baselines.sh"
    done = run_script("bash", script, "--print", cwd=tmp_path, DATASET="my images/", **names)
    students = [shlex.split(line)[2:] for line in done.stdout.splitlines() if "student" in line]
    place = "runs/teachers/my_images/my-net-v2.tiny/"
    for words in students:
        paths = words[words.index("--teacher_path") + 1 :]
        assert paths[0].startswith(place) and paths[0].endswith("_seed=42")
        assert words[words.index("--teacher") + 1] == "my-net.v2.py:tiny"
    assert len(students) > 15


def test_two_processes(tmp_path, tiny_npz):
    """Each imports the file."""
    (tmp_path / "mynet.py").write_text(NET)
    words = line(tiny_npz, tmp_path / "runs", "mynet.py:tiny")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = Path(train_teacher.__file__)
    run_script(*launcher, script, *words, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert (tmp_path / "runs" / NAME / "net.py").read_text() == NET
    logits = np.load(tmp_path / "runs" / NAME / "predictions.npz")["best_test_logits"]
    assert logits.shape == (40, 4)


def test_a_name_of_a_file_is_no_net_of_another_command(root, tiny_npz, tmp_path):
    """In a notebook: a file that has changed since is read anew."""
    file = root / "mynet.py"
    file.write_text(NET.replace("channels=8", "channels=5"))
    train_teacher.main(line(tiny_npz, tmp_path / "new", f"{file}:tiny"))
    assert weights(folder_of(tmp_path / "new"))["head.weight"].shape == (4, 10)
    with pytest.raises(UserError, match="model_sha256 was"):
        train_teacher.main(line(tiny_npz, root, f"{file}:tiny"))
