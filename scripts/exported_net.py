"""A trained net as a file for other programs: uint8 images in, calibrated probabilities out."""

import io
import json
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models import build_model
from utils.data.views import shift_and_scale
from utils.program.files import unpack_safetensors


class CalibratedNet(nn.Module):
    """Images uint8 (N, 3, H, W) to probabilities float32 (N, K): softmax(weight * z + bias).

    z are the net's logits of the images normalised with `mean` and `std`; `weight` and `bias` (K,)
    are temperature scaling (all weights 1 / T), vector scaling, or 1 and 0.
    """

    def __init__(self, net: nn.Module, mean, std, weight: Sequence[float], bias: Sequence[float]):
        super().__init__()
        self.net = net
        shift, scale = shift_and_scale(tuple(mean), tuple(std), torch.device("cpu"))
        constants = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
        for name, values in constants.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(torch.addcmul(self.shift, images.float(), self.scale))
        return (logits * self.weight + self.bias).softmax(dim=1)


def to_onnx(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    import onnx

    names = {"input_names": ["images"], "output_names": ["probabilities"]}
    names["dynamic_shapes"] = {"images": {0: torch.export.Dim("N")}}
    exported = torch.onnx.export(net, (images[:2],), **names, verbose=False)
    model = exported.model_proto
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def open_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def to_torchscript(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # that it will give way to torch.export
        files = {"metadata.json": json.dumps(metadata)}
        torch.jit.save(torch.jit.trace(net, images[:2]), file, _extra_files=files)
    return file.getvalue()


def open_torchscript(content: bytes) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.load(io.BytesIO(content))


def to_safetensors(net: CalibratedNet, images: Tensor, metadata: dict[str, str]) -> bytes:
    """The weights alone; what makes probabilities of their logits is in the metadata."""
    from safetensors.torch import save

    return save({name: x.contiguous() for name, x in net.net.state_dict().items()}, metadata)


def open_safetensors(content: bytes) -> Callable[[Tensor], Tensor]:
    saved = unpack_safetensors(content)
    net = build_model(saved["model"], saved["num_classes"])
    net.load_state_dict(saved["state_dict"])
    return CalibratedNet(net, saved["mean"], saved["std"], **saved["softmax"])


# format: what makes a file's content, what gives probabilities (N, K) of images with that
FORMATS: dict[str, tuple[Callable, Callable]] = {
    "onnx": (to_onnx, open_onnx),
    "safetensors": (to_safetensors, open_safetensors),
    "torchscript": (to_torchscript, open_torchscript),
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TORCH = (2, 11)  # the oldest it was tried with; the exporter of 2.6 fails
