"""The teacher that has nets: one ready to teach, or several together.

loading.py makes it from runs and from weights of third parties.
"""

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from utils.data import Dataset, Statistics
from utils.data.views import normalise
from utils.evaluation import DTYPES, logits_of_splits
from utils.program.files import safe_name
from utils.teachers.teacher import Teacher

# On a CPU a logit's last bits depend on how many images it was computed with, so it is always
# this many. Larger pieces are no faster (they leave the caches), and would be filled up more often.
PIECE = 64
TRIED_SIZE = 32  # pixels a side of the images that a folded net is compared on
SAME_LOGITS = 1e-9  # of the largest logit, in float64


@dataclass
class Member:
    """A net ready to teach (eval mode, no gradients), and where it comes from."""

    net: nn.Module
    model: str
    mean: Statistics  # its inputs are pixels / 255, normalised with these two
    std: Statistics
    label: str  # how it was trained; of a third party's file its stem and `key`
    sha256: str
    path: Path
    model_sha256: str | None = None  # of the file of --teacher FILE.py:function
    loss: str | None = None  # of a third party's file what --teacher_loss says
    seed: int | None = None  # None for a third party's file
    size: int | None = None  # pixels a side that its normalised inputs are enlarged to
    key: str | None = None  # of the weights in a third party's file
    folded: bool = False  # batch norms lie in convolutions, which changes a logit's last bits

    def logits(self, images: Tensor) -> Tensor:
        """(B, K) of images uint8 (B, 3, H, W)."""
        return self.net(self.inputs(images))

    def inputs(self, images: Tensor) -> Tensor:
        """What the net takes of images uint8 (B, 3, H, W): float32 (B, 3, size, size)."""
        pixels = normalise(images, self.mean, self.std)
        if self.size is not None:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear")
        return pixels

    @property
    def identity(self) -> dict:
        """What decides its logits, and what it is called; ready for JSON."""
        identity = {
            "model": self.model,
            "label": self.label,
            "seed": self.seed,
            "sha256": self.sha256,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        if self.model_sha256 is not None:
            identity["model_sha256"] = self.model_sha256
        if self.size is not None:
            identity["size"] = self.size
        if self.key is not None:
            identity["key"] = self.key
        return identity


@dataclass
class NetTeacher(Teacher):
    """One net or several that teach together, on any images."""

    members: Sequence[Member]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images uint8 (B, 3, H, W), before the temperature.

        Of several members the log of their mean probabilities (Lakshminarayanan et al., "Deep
        Ensembles", NeurIPS 2017). On a CPU a row's bits do not depend on its batch.
        """
        size = PIECE if images.device.type == "cpu" else len(images)
        missing = -len(images) % size  # in the last piece, which the last image fills up
        whole = images
        if missing > 0:
            whole = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        pieces = [self.piece_logits(piece) for piece in whole.split(size)]
        return torch.cat(pieces)[: len(images)]

    def piece_logits(self, images: Tensor) -> Tensor:
        """`logits` of images that are run at once."""
        logits = [member.logits(images) for member in self.members]
        if len(logits) == 1:
            return logits[0]
        log_probabilities = torch.stack([rows.float().log_softmax(dim=1) for rows in logits])
        mean = log_probabilities.logsumexp(dim=0) - math.log(len(logits))
        return mean.to(logits[0].dtype)

    @torch.no_grad()
    def logits_and_maps(
        self, images: Tensor, layers: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`logits` of a single net that is not folded, and its maps by the names of its layers."""
        [member] = self.members
        return member.net(member.inputs(images), keep=layers)

    def logits_of_splits(
        self, data: Dataset, accelerator: Accelerator, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        return logits_of_splits(self.logits, data, accelerator, batch_size, name="teacher")

    def to(self, device: torch.device, precision: str = "no", fold: bool = True) -> "NetTeacher":
        """Move its nets there, ready to be run often: with their batch norms folded.

        `precision`: no, fp16 or bf16, of the autocast that they are run in. A net that is folded
        has no layers any more whose maps could be asked for.
        """
        for member in self.members:
            size = member.size or TRIED_SIZE
            net = folded(member.net, size) if fold else member.net
            member.folded = member.folded or net is not member.net
            member.net = net.to(device)
            if precision != "no":
                member.net = in_half(member.net, DTYPES[precision], size)
        return self

    @property
    def model(self) -> str:
        """`resnet56`, `3xresnet20`, `2xresnet20+resnet56`."""
        counts = Counter(sorted(member.model for member in self.members))
        names = [f"{count}x{name}" if count > 1 else name for name, count in counts.items()]
        return safe_name("+".join(names))

    @property
    def own_label(self) -> str:
        """How its members were trained, whatever their seeds."""
        return safe_name("_and_".join(sorted({member.label for member in self.members})))

    @property
    def own_identity(self) -> dict:
        if len(self.members) > 1:
            return self.joint_identity()
        member = self.members[0]
        return member.identity | {"path": str(member.path), "loss": member.loss}

    def joint_identity(self) -> dict:
        """Several nets have one seed, `42+43+44`, and no normalisation in common."""
        seeds = [member.seed for member in self.members]
        losses = {member.loss for member in self.members} - {None}
        hashes = "".join(member.sha256 for member in self.members)
        return {
            "seed": None if None in seeds else "+".join(map(str, sorted(seeds))),
            "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "path": [str(member.path) for member in self.members],
            "loss": "+".join(sorted(losses)) or None,
            "mean": None,
            "std": None,
            "members": [member.identity for member in self.members],
        }


def folded(net: nn.Module, size: int = TRIED_SIZE) -> nn.Module:
    """The net with batch norms in the convolutions before them; itself where that fails.

    It fails where its code cannot be traced, where it does not take images of `size` pixels a
    side, or where the folded net is another one, as of a convolution that is called twice.
    """
    with suppress(Exception):  # third-party code may do anything, and the library is experimental
        from torch.fx.experimental.optimization import fuse

        # Within another module a net is traced as it is called: its options have their defaults.
        # In float64 folding costs no more than its rounding, so any real difference shows.
        exact = nn.Sequential(copy.deepcopy(net).double())
        if agree(exact, fuse(exact), size):
            return fuse(nn.Sequential(net))
    return net


@torch.no_grad()
def in_half(net: nn.Module, dtype: torch.dtype, size: int = TRIED_SIZE) -> nn.Module:
    """The net with the weights of its products in half precision; itself where a bit would change.

    Autocast would cast them anew in every step: it keeps the casts of trained weights alone.
    """
    with suppress(Exception):  # third-party code may do anything
        half = copy.deepcopy(net)
        for module in half.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)

        device = next(net.parameters()).device
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, size, size, generator=generator).to(device)
        with torch.autocast(device.type, dtype):
            if torch.equal(half(images), net(images)):
                return half
    return net


@torch.no_grad()
def agree(net: nn.Module, other: nn.Module, size: int) -> bool:
    """Whether two nets in float64 have the same logits of a batch of noise, but for rounding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    logits = net(images)
    others = other(images)
    allowed = SAME_LOGITS * logits.abs().max().item()
    return torch.allclose(others, logits, rtol=0, atol=allowed)
