"""Validation against test, and conformal sets, of the nets of weights/: what their teachers know.

    python -m docs.results.cifar100_validation DATA_DIR      from the repository's root

DATA_DIR has cifar100.npz, or what torchvision downloads. Prints the table of cifar100.md, and
writes the logits of each net, for python -m scripts.report logits_of_weights/*.npz.
"""

import argparse
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from scripts.deployment.certificate import evidence_of
from scripts.deployment.exported_net import open_safetensors
from utils.calibration import fit_temperature, set_metrics
from utils.columns import text_table
from utils.data import load_dataset

REFERENCE = "cifar100_resnet8"  # no teacher, NLL
SEED = re.compile(r"_seed\d+$")  # ends the names of nets of other seeds than 42
LOGITS = Path("logits_of_weights")


class Net(NamedTuple):
    """A net's scaled logits: the NLL (N,) of every image of each split, and what was fitted."""

    nll: dict[str, np.ndarray]
    top1: dict[str, float]
    temperature: float
    test_temperature: float
    coverage: float  # of sets at 90 %
    set_size: float  # their mean number of classes, with the threshold that covers 90 % of test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir")
    data = load_dataset("cifar100", parser.parse_args().data_dir)

    LOGITS.mkdir(exist_ok=True)
    nets = {}
    for file in sorted(Path("weights").glob("*.safetensors")):
        evidence = evidence_of(open_safetensors(file.read_bytes()).logits, data, name=file.stem)
        splits = {"val": evidence.val, "test": evidence.test}
        write_logits(LOGITS / f"{file.stem}.npz", splits)
        nets[file.stem] = measure(splits)

    heads = ["net", "top-1 % on validation", "on test", "NLL: validation - test"]
    heads += ["less that of the net from scratch", "T / T of test", "coverage %", "size at 90 %"]
    print(text_table(heads, [row(name, net, nets) for name, net in nets.items()]))


def write_logits(file: Path, splits: dict[str, tuple[Tensor, Tensor]]) -> None:
    arrays = {}
    for split, (logits, labels) in splits.items():
        arrays[f"{split}_logits"] = logits.numpy()
        arrays[f"{split}_labels"] = labels.numpy()
    np.savez(file, **arrays)


def measure(splits: dict[str, tuple[Tensor, Tensor]]) -> Net:
    """`splits`: logits (N, K) and labels (N,) of val and test."""
    temperature, _ = fit_temperature(*splits["val"])
    test_temperature, _ = fit_temperature(*splits["test"])
    nll = {}
    top1 = {}
    for split, (logits, labels) in splits.items():
        log_probs = (logits.double() / temperature).log_softmax(dim=1)
        nll[split] = -log_probs.gather(1, labels[:, None]).squeeze(1).numpy()
        top1[split] = (logits.argmax(dim=1) == labels).double().mean().item()

    sets = set_metrics(*splits["val"], *splits["test"], temperature=temperature)
    return Net(
        nll=nll,
        top1=top1,
        temperature=temperature,
        test_temperature=test_temperature,
        coverage=sets["coverage"],
        set_size=sets["set_size_matched"],
    )


def row(name: str, net: Net, nets: dict[str, Net]) -> list[str]:
    seed = SEED.search(name)
    reference = REFERENCE + (seed[0] if seed else "")
    is_compared = reference in nets and name != reference
    return [
        name,
        f"{100 * net.top1['val']:.2f}",
        f"{100 * net.top1['test']:.2f}",
        f"{net.nll['val'].mean() - net.nll['test'].mean():+.3f}",
        gap_beyond(net, nets[reference]) if is_compared else "",
        f"{net.temperature / net.test_temperature:.3f}",
        f"{100 * net.coverage:.1f}",
        f"{net.set_size:.2f}",
    ]


def gap_beyond(net: Net, reference: Net) -> str:
    """How much further apart the splits are than for the reference, with a 95 % interval.

    Images of one split are compared in pairs, so that hard images do not count; the two splits are
    independent.
    """
    differences = {split: net.nll[split] - reference.nll[split] for split in net.nll}
    gap = differences["val"].mean() - differences["test"].mean()
    variance = sum(values.var() / len(values) for values in differences.values())
    margin = 1.96 * math.sqrt(variance)
    return f"{gap:+.3f} [{gap - margin:+.3f}, {gap + margin:+.3f}]"


if __name__ == "__main__":
    main()
