"""Runs of a distillation with a term on features: folders, files, resumed runs, what is refused."""

import json
import re
from functools import partial

import pytest
import torch
from conftest import ROOT, assert_same_run, command, fails, folder_of, run_script

import train_student
from losses import features, registry
from models import build_model
from scripts import report
from utils.runs import Run


def student_run(data, root, teacher, *flags):
    line = command(data, root, "--epochs", "2", "--teacher_path", str(teacher), *flags)
    train_student.main(line)
    return folder_of(root)


@pytest.fixture(scope="module")
def fitnet_run(tmp_path_factory, tiny_npz, teacher):
    return student_run(tiny_npz, tmp_path_factory.mktemp("fitnet"), teacher, "--distill=KD+FitNet")


def test_what_a_run_says_of_its_term(fitnet_run):
    name = "KD+FitNet_T=4_Lambda=0.9_feature_weight=100_from_resnet8_NLL_seed=42"
    assert fitnet_run.name == name
    result = json.loads((fitnet_run / "result.json").read_text())
    assert result["loss_parameters"] == {"T": 4, "Lambda": 0.9, "feature_weight": 100}
    for line in (fitnet_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        parts = [record[f"train_{part}"] for part in ("distillation", "labels", "features")]
        assert sum(parts) == pytest.approx(record["train_loss"]) and min(parts) > 0


def test_a_regressor_is_trained_and_belongs_to_the_task_alone(fitnet_run):
    saved = torch.load(fitnet_run / "checkpoint.pth", weights_only=True)
    regressor = {key for key in saved["task"] if key.startswith("features.")}
    assert len(regressor) == 4
    momenta = saved["optimizer"]["state"]
    assert len(momenta) == len([k for k in saved["task"] if "running" not in k and "num" not in k])
    assert all(state["momentum_buffer"].any() for state in momenta.values())
    best = torch.load(fitnet_run / "model_best.pth", weights_only=True)["state_dict"]
    assert best.keys() == build_model("resnet8").state_dict().keys()


def test_a_killed_run_goes_on_bit_for_bit(fitnet_run, tiny_npz, tmp_path, teacher, monkeypatch):
    save = Run.save

    def save_and_stop(self, checkpoint, improved):
        save(self, checkpoint, improved)
        raise KeyboardInterrupt

    again = partial(student_run, tiny_npz, tmp_path, teacher, "--distill=KD+FitNet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save_and_stop)
        again()
    assert_same_run(fitnet_run, again())
    states = [
        torch.load(run / "checkpoint.pth", weights_only=True)["task"]
        for run in (fitnet_run, folder_of(tmp_path))
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_another_layer_is_another_run(tiny_npz, tmp_path, teacher, capsys):
    """In folders, and in the report, where both stand below one teacher."""
    flags = ("--distill", "KD+SP", "--feature_weight", "10", "--epochs", "1")
    line = command(tiny_npz, tmp_path, "--teacher_path", str(teacher), *flags)
    usual = train_student.main(line)
    other = train_student.main([*line, "--feature_layer", "layer1:layer2"])
    begin = "KD+SP_T=4_Lambda=0.9_feature_weight=10"
    assert usual["label"] == f"{begin}_from_resnet8_NLL"
    assert other["label"] == f"{begin}_feature_layer=layer1-layer2_from_resnet8_NLL"
    assert usual["last"]["val"]["nll"] != other["last"]["val"]["nll"]
    capsys.readouterr()
    report.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("KD+SP T=4 Lambda=0.9 feature_weight=10 ") == 2
    assert "KD+SP T=4 Lambda=0.9 feature_weight=10 feature_layer=layer1:layer2 " in printed


def test_mixup_and_a_student_of_other_channels(tiny_npz, tmp_path):
    """Weights of a third party: nothing but the architecture is known."""
    torch.save(build_model("wrn_16_2", 4).state_dict(), tmp_path / "theirs.pth")
    flags = ["--teacher", "wrn_16_2", "--mix", "mixup", "--distill", "DIST+AT", "--epochs", "1"]
    folder = student_run(tiny_npz, tmp_path / "runs", tmp_path / "theirs.pth", *flags)
    [line] = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train_features"] > 0


def test_half_precision(tiny_npz, tmp_path, teacher):
    """The teacher's weights are in bf16 then, and the term is computed in float32."""
    flags = ["--distill", "KD+FitNet", "--epochs", "1", "--teacher_path", str(teacher)]
    line = command(tiny_npz, tmp_path, *flags)
    run_script("train_student.py", *line, cwd=tmp_path, ACCELERATE_MIXED_PRECISION="bf16")
    folder = folder_of(tmp_path)
    assert "mixed precision: bf16" in (folder / "train_log.txt").read_text()
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)["task"]
    regressor = [value for key, value in saved.items() if key.startswith("features.")]
    assert {value.dtype for value in regressor} == {torch.float32}


def test_a_larger_view_for_the_teacher(tiny_npz, tmp_path):
    """Its maps are larger then, too."""
    torch.save(build_model("resnet8", 4).state_dict(), tmp_path / "theirs.pth")
    flags = ["--teacher", "resnet8", "--teacher_size", "12", "--distill", "KD+AT", "--epochs", "1"]
    folder = student_run(tiny_npz, tmp_path / "runs", tmp_path / "theirs.pth", *flags)
    assert (folder / "result.json").exists()


def test_the_example_of_the_docs(tiny_npz, tmp_path, teacher, monkeypatch):
    """A function and its entry are all that another term needs."""
    text = (ROOT / "docs/features.md").read_text()
    [code] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    function, entry = code.split("# losses/registry.py, in FEATURES (and import it)\n")
    names = dict(vars(features))
    exec(function, names)
    [(name, entry)] = eval(f"{{{entry}}}", vars(registry) | names).items()
    monkeypatch.setitem(registry.FEATURES, name, entry)
    folder = student_run(tiny_npz, tmp_path, teacher, f"--distill=KD+{name}", "--epochs", "1")
    assert folder.name.startswith("KD+NST_T=4_Lambda=0.9_feature_weight=50_from_resnet8_NLL")


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ("--distill KD+XT", "unknown distillation 'KD[+]XT'.*did you mean 'KD[+]AT'.*DIST.*[+]PKT"),
    ("--distill AT", "unknown distillation 'AT'"),
    ("--distill KD --feature_weight 5", "--feature_weight 5 has no effect.*[+]FitNet"),
    ("--feature_layer layer1", "--feature_layer layer1 has no effect with --distill KD"),
    ("--distill KD+AT --feature_weight -1", "--feature_weight"),
    ("--distill KD+AT --teacher_cache cache", "--distill KD[+]AT: compares.*--teacher_cache"),
    ("--distill KD+AT --feature_layer layer9",
     "--feature_layer layer9: the student has no layer 'layer9'; its layers are conv1, bn1, .*fc$"),
    ("--distill KD+AT --feature_layer layer1:block1",
     "layer1:block1: the teacher resnet8 has no layer 'block1'; its layers are conv1"),
    ("--distill KD+AT --feature_layer layer1:", "--feature_layer: 'layer1:' .* STUDENT:TEACHER"),
    ("--distill KD+AT --feature_layer :layer1", "--feature_layer: ':layer1' .* STUDENT:TEACHER"),
    ("--distill KD+AT --feature_layer pool", "KD[+]AT: cannot compare.*places.*--feature_layer"),
    ("--distill KD+FitNet --feature_layer pool", "KD[+]FitNet: cannot compare.*places"),
])  # fmt: skip
def test_what_is_refused(tiny_npz, tmp_path, teacher, capsys, flags, words):
    line = command(tiny_npz, tmp_path / "runs", "--teacher_path", str(teacher), *flags.split())
    error = fails(capsys, tmp_path, train_student.main, line).strip()
    assert re.search(words, error), error


def test_an_ensemble_is_refused(tiny_npz, tmp_path, teacher, capsys):
    line = command(
        tiny_npz, tmp_path, "--teacher_path", str(teacher), str(teacher / "model_last.pth")
    )
    error = fails(capsys, tmp_path, train_student.main, [*line, "--distill", "KD+AT"])
    assert "--distill KD+AT: compares maps with those of one net, and 2 teach" in error


def test_a_net_without_parts_is_refused(tiny_npz, tmp_path, teacher, capsys):
    pytest.importorskip("timm")
    model = ["--model", "timm/resnet10t", "--distill", "KD+RKD"]
    line = command(tiny_npz, tmp_path, "--teacher_path", str(teacher), *model)
    error = fails(capsys, tmp_path, train_student.main, line)
    words = "--distill KD+RKD: compares maps of layers, and the student has no layers by name"
    assert words in error
