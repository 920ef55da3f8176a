"""A trained net as a file for other programs: uint8 images in, calibrated probabilities out."""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models import build_model
from models.own import name_of_saved
from utils.data.views import shift_and_scale
from utils.program.files import unpack_safetensors


class CalibratedNet(nn.Module):
    """Images uint8 (N, 3, H, W) to probabilities float32 (N, K): softmax(weight * z + bias).

    z are the net's logits of the images normalised with `mean` and `std`; `weight` and `bias` (K,)
    are temperature scaling (all weights 1 / T), vector scaling, or 1 and 0.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        weight: Sequence[float],
        bias: Sequence[float],
    ):
        super().__init__()
        self.net = net
        shift, scale = shift_and_scale(tuple(mean), tuple(std), torch.device("cpu"))
        self.mean = mean
        self.std = std
        # Copies: others hold the same tensors.
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("weight", torch.as_tensor(weight, dtype=torch.float32))
        self.register_buffer("bias", torch.as_tensor(bias, dtype=torch.float32))
        self.eval().requires_grad_(False)

    def with_softmax(self, weight: Sequence[float], bias: Sequence[float]) -> "CalibratedNet":
        """The same net with other weights and biases of its logits."""
        return CalibratedNet(self.net, self.mean, self.std, weight, bias)

    def logits(self, images: Tensor) -> Tensor:
        """z, as they are."""
        return self.net(torch.addcmul(self.shift, images.float(), self.scale))

    def calibrated_logits(self, images: Tensor) -> Tensor:
        """weight * z + bias, float64: no two logits that differ become equal."""
        return self.logits(images).double() * self.weight + self.bias

    def forward(self, images: Tensor) -> Tensor:
        return (self.logits(images) * self.weight + self.bias).softmax(dim=1)


def to_onnx(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    import onnx

    model = onnx_model(net, images, output="probabilities")
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def onnx_model(net: nn.Module, images: Tensor, output: str):
    """The ONNX model of a net whose forward takes `images`, uint8 (N, 3, H, W), any N."""
    exported = torch.onnx.export(
        net,
        (two_images(images),),
        input_names=["images"],
        output_names=[output],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        verbose=False,
    )
    model = exported.model_proto
    for node in model.graph.node:
        # Where in the code it comes from: paths of this machine, which are nobody else's business.
        node.ClearField("metadata_props")
    return model


def two_images(images: Tensor) -> Tensor:
    """The first twice: what is traced with one image takes one image alone ever after."""
    return images[:1].repeat(2, 1, 1, 1)


def with_sets(content: bytes, level: str, threshold: float) -> bytes:
    """An ONNX file with a second output, `set_at_LEVEL`: bool (N, K), which classes are in the set.

    Those whose probability is at least the threshold, by LAC's rule: it can be none.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(content)
    graph = model.graph
    [probabilities] = graph.output
    members = helper.make_tensor_value_info(f"set_at_{level}", TensorProto.BOOL, None)
    members.type.tensor_type.shape.CopyFrom(probabilities.type.tensor_type.shape)
    inside = helper.make_node(
        "GreaterOrEqual", [probabilities.name, "set_threshold"], [members.name]
    )
    graph.initializer.append(
        helper.make_tensor("set_threshold", TensorProto.FLOAT, [], [threshold])
    )
    graph.node.append(inside)
    graph.output.append(members)
    return model.SerializeToString()


def open_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    return partial(probabilities_of, onnx_session(content))


def onnx_session(content: bytes):
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return InferenceSession(content, options, providers=["CPUExecutionProvider"])


def probabilities_of(session, images: Tensor) -> Tensor:
    """What an ONNX file makes (N, K) of images uint8 (N, 3, H, W)."""
    [output] = session.run(["probabilities"], {"images": images.numpy()})
    return torch.from_numpy(output)


def logits_from(session, images: Tensor) -> Tensor:
    """The calibrated logits (N, K), float64, up to a number for each image, from probabilities.

    -inf where float32 has rounded the probability to 0, or to so few digits that its logarithm is
    wrong.
    """
    probabilities = probabilities_of(session, images)
    too_small = probabilities < torch.finfo(torch.float32).tiny
    return probabilities.double().masked_fill(too_small, 0.0).log()


def to_torchscript(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    files = {"metadata.json": json.dumps(metadata)}
    with warnings.catch_warnings(action="ignore"):  # that it will give way to torch.export
        program = torch.jit.trace(net, two_images(images))
        torch.jit.save(program, file, _extra_files=files)
    return file.getvalue()


def open_torchscript(content: bytes) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.load(io.BytesIO(content))


def to_safetensors(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    """The weights alone; what makes probabilities of their logits is in the metadata."""
    return safetensors_of(net.net.state_dict(), metadata)


def safetensors_of(state: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    # It saves no tensor whose memory is ordered in another way, as channels_last is, and no two
    # that share it, as tied weights do.
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    return save(copies, metadata)


def open_safetensors(content: bytes, name: str | None = None) -> CalibratedNet:
    """It computes in float32, also with weights in half precision.

    `name`: of the net, as `build_model` takes it; else what the file says. Raises ValueError where
    that is a user's own which no command line has named.
    """
    saved = unpack_safetensors(content)
    net = build_model(name or name_of_saved(saved, flag="--model"), saved["num_classes"])
    net.load_state_dict(saved["state_dict"])
    return CalibratedNet(net, saved["mean"], saved["std"], **saved["softmax"])


Write = Callable[[CalibratedNet, Tensor, dict[str, str]], bytes]
Reopen = Callable[[bytes], Callable[[Tensor], Tensor]]
# format: what makes a file's content, what gives probabilities (N, K) of images with that
FORMATS: dict[str, tuple[Write, Reopen]] = {
    "onnx": (to_onnx, open_onnx),
    "safetensors": (to_safetensors, open_safetensors),
    "torchscript": (to_torchscript, open_torchscript),
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TORCH = (2, 11)  # the oldest it was tried with; the exporter of 2.6 fails
